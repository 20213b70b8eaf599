"""The status page with a past, in a browser: six runs, three devices, 15,000 rounds in one of them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hosl_cloud.runs.fleet import Waiting
from services import Service, serving
from statuspage.browsing import SIZES, Watch, browser, devices, sign_in, take_screenshots
from statuspage.histories import LINE, ROUNDS, RUN, SETTINGS, TICKETS, write_past, write_reports

RECORD_CHARTS = """() => {
    const known = window.uPlot;
    window.drawn = [];
    window.uPlot = Object.assign(function (options, data, parent) {
        window.drawn.push({ options, data });
        return new known(options, data, parent);
    }, known);
}"""


@pytest.fixture
def bundle(make_bundle: Callable[[str, int], Path]) -> Path:
    return make_bundle("lora", 2)


def test_a_long_past_is_shown_whole_and_in_words(bundle: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with browser() as context, serving(bundle, tmp_path, SETTINGS, run_id=RUN, stays=True) as service:
            await asyncio.to_thread(write_past, service)
            with devices(service, "garage", "kitchen", "workshop"):
                page = await context.new_page()
                watch = Watch(page)
                await sign_in(page, service, RUN)
                await page.locator("#f-devices", has_text="3 of 3").wait_for()
                await asyncio.to_thread(write_reports, service)
                await time_left_is_for_rounds_that_run(page, service)
                await a_run_in_line_says_behind_which(page)
                await charts_say_what_they_show(page, watch)
                await the_best_checkpoint_is_marked(page)
                await classes_are_told_apart(page)
                await devices_fit_a_phone(page)
                await no_width_is_too_small(page)
                await messages_are_summed_up(page)
                await settings_are_shown_changed_ones_first(page)
                await words_are_explained(page)
                await take_screenshots(page, "past")
                assert watch.problems == []

    asyncio.run(main())


async def time_left_is_for_rounds_that_run(page: Any, service: Service) -> None:
    await page.get_by_text("Waits for more devices (3 of 4 are there)").wait_for()
    assert await page.locator("#f-left").text_content() == "–"
    service.coordinator.fleet.waiting = Waiting("anchor", ("garage",), time.time() - 12)
    await page.get_by_text(re.compile("Waits for the activations of garage, since .* for 1[0-9] s")).wait_for()
    await page.locator("#f-left", has_text="105 min").wait_for()
    await page.locator("#devices tr", has_text="garage").get_by_text(re.compile("^activations, 1. s$")).wait_for()


async def a_run_in_line_says_behind_which(page: Any) -> None:
    row = page.locator("#runs tr", has_text=LINE)
    assert await row.get_by_text(f"in line behind {RUN}").is_visible()


async def charts_say_what_they_show(page: Any, watch: Watch) -> None:
    keys = await page.locator(".chart").first.locator(".key").all_text_contents()
    assert keys[:3] == ["each 20 rounds, lowest to highest", "training, mean of the last 200 rounds", "held-out data"]
    assert re.fullmatch(r"best checkpoint, round 1\d,\d+", keys[3])
    assert not [url for url in watch.requests if "/history?after=0" in url], "not every round is asked for"

    await page.evaluate(RECORD_CHARTS)
    await page.emulate_media(color_scheme="dark")  # they are drawn anew
    await page.wait_for_function("window.drawn.length >= 4")
    drawn = await page.evaluate("""window.drawn.slice(0, 4).map(({ options, data }) => ({
        axes: options.axes.map((axis) => axis.label),
        rounds: options.scales.x.range(),
        shares: options.scales.y.range(null, 0.45, 0.53),
        points: data[0].length,
    }))""")
    assert [chart["axes"] for chart in drawn] == [
        ["round", "loss"],
        ["round", "right answers"],
        ["round", "time"],
        ["round", "a round, both ways"],
    ]
    assert [chart["rounds"] for chart in drawn] == [[0, ROUNDS]] * 4
    assert all(500 < chart["points"] < 900 for chart in drawn)
    assert drawn[1]["shares"] == [0.2, 0.7]
    await page.emulate_media(color_scheme="light")


async def the_best_checkpoint_is_marked(page: Any) -> None:
    best = page.locator("#checkpoints tr", has_text="· best")
    assert await best.count() == 1
    round_ = await best.locator("th").text_content()
    assert await page.locator("#f-best-round").text_content() == f"after round {round_}"
    assert await page.locator("#f-accuracy-round").text_content() == "on held-out data, after round 15,000"


async def classes_are_told_apart(page: Any) -> None:
    assert await page.locator("#by-class tbody th").all_text_contents() == TICKETS["labels"]
    assert re.search(
        r"^After round 15,000: \d+ of 120 right, .*F1 is", await page.locator("#classes-what").text_content()
    )
    assert await page.locator("#matrix thead th").all_text_contents() == ["true class", *TICKETS["labels"]]
    rows = [await row.locator("td").all_text_contents() for row in await page.locator("#matrix tbody tr").all()]
    assert [sum(map(int, row)) for row in rows] == [30, 30, 30, 30]
    right = sum(int(row[place]) for place, row in enumerate(rows))
    assert (await page.locator("#classes-what").text_content()).startswith(f"After round 15,000: {right} of 120 right")
    await page.get_by_label("Evaluation to show").select_option("best")
    best = (await page.locator("#f-best-round").text_content()).removeprefix("after ")
    await page.locator("#classes-what", has_text=f"After {best}:").wait_for()


async def devices_fit_a_phone(page: Any) -> None:
    await page.set_viewport_size({"width": 390, "height": 844})
    for name in ("garage", "kitchen", "workshop"):
        row = page.locator("#devices tr", has_text=name)
        assert (await row.bounding_box())["height"] < 190
        assert await row.get_by_text("40 training, 10 held-out").is_visible()
    scrolls = "(node) => node.scrollHeight > node.clientHeight + 1 && getComputedStyle(node).overflowY !== 'visible'"
    assert not await page.locator("#devices").evaluate(scrolls)
    assert not await page.locator("section:has(> #devices)").evaluate(scrolls)


async def no_width_is_too_small(page: Any) -> None:
    cut = """() => { const log = document.querySelector('#log'), top = log.getBoundingClientRect().top;
        return [...log.children].filter((line) => { const box = line.getBoundingClientRect();
            return box.top < top - 1 && box.bottom > top + 1; }).length; }"""
    for width, height in (*SIZES.values(), (360, 740)):
        await page.set_viewport_size({"width": width, "height": height})
        await page.wait_for_timeout(300)
        assert await page.evaluate("document.documentElement.scrollWidth") == width
        assert await page.evaluate(cut) == 0
        end = "(line) => line.getBoundingClientRect().bottom - line.parentNode.getBoundingClientRect().bottom"
        assert await page.locator("#log li").last.evaluate(end) < 1
        lines = "(dates) => dates.map((date) => date.getClientRects().length)"
        assert set(await page.locator("#runs .date").evaluate_all(lines)) == {1}


async def messages_are_summed_up(page: Any) -> None:
    groups = ["activations", "λ", "updates", "weights", "other", "all"]
    assert await page.locator("#wire tbody th").all_text_contents() == groups
    assert await page.locator("#kinds").is_hidden()
    await page.get_by_text("By type of message").click()
    kinds = {
        await row.locator("th").text_content(): await row.locator("td").first.text_content()
        for row in await page.locator("#kinds tbody tr").all()
    }
    assert kinds["hello"] == "other"
    assert kinds["shard"] == "weights"
    assert not re.match(r"0 B", await page.locator("#wire tr", has_text="weights").locator("td").last.text_content())


async def settings_are_shown_changed_ones_first(page: Any) -> None:
    await page.locator("#settings > summary").click()
    row = page.locator("#changed tr", has=page.get_by_role("rowheader", name="rounds", exact=True))
    await row.wait_for()
    assert await row.locator("td").all_text_contents() == ["30000", "100"]
    assert await page.locator("#changed tr", has_text="seed").count() == 0
    assert await page.locator("#unchanged").is_hidden()
    await page.locator("#unchanged-title").click()
    assert await page.locator("#unchanged tr", has_text="seed").is_visible()
    await page.locator("#unchanged-title").click()


async def words_are_explained(page: Any) -> None:
    await page.get_by_text("What the words mean").click()
    assert await page.locator("#terms dt", has_text="λ").is_visible()
    assert await page.locator("#devices .badge").first.get_attribute("title") == "can take part in a round"
    text = "import('/page/text.js').then(({ bytes, duration }) => [bytes(1019.7e6), bytes(112), duration(0)])"
    assert await page.evaluate(text) == ["1.02 GB", "112 B", "0 s"]
