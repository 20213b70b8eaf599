"""The status page: its files, their headers and the build; and in a browser, with a real service and real devices."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hosl_cloud.runs.queue import RunQueue
from hosl_cloud.service import page_routes
from hosl_cloud.service.access import Authenticator, DeviceTokens
from hosl_cloud.service.app import make_app
from hosl_cloud.storage.records import NewEvent
from hosl_cloud.storage.store import Store
from services import Service, serving
from statuspage.browsing import Watch, browser, devices, settings, sign_in, take_screenshots
from support import ROOT

OURS = [name for name in page_routes.FILES if name not in page_routes.VENDOR]


def build_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bundle(make_bundle: Callable[[str, int], Path]) -> Path:
    return make_bundle("lora", 2)


async def ask(app: Any, path: str) -> tuple[int, dict[str, str], bytes]:
    """What the service answers to GET, the path as it is."""
    sent: list[dict[str, Any]] = []
    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b"", "client": ("::1", 1)}

    async def receive() -> dict[str, Any]:
        never: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        return await never  # the client stays, and has no more to say

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


def test_the_page_and_its_files_are_served_to_everybody_with_strict_headers_and_nothing_else_is(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "hosl.sqlite")
    app = make_app(RunQueue(store, tmp_path, print), Authenticator(DeviceTokens(store), "join", "admin"), [])
    others = ["index.html", "uPlot-LICENSE", "../page_routes.py", "vendor", "vendor/", "", "vendor/../page.js"]
    paths = ["/", *(f"/page/{name}" for name in (*page_routes.FILES, *others))]

    async def main() -> list[tuple[int, dict[str, str], bytes]]:
        return [await ask(app, path) for path in paths]

    answers = dict(zip(paths, asyncio.run(main()), strict=True))
    store.close()
    for path, (status, headers, body) in answers.items():
        name = path.removeprefix("/page/") if path != "/" else page_routes.PAGE
        known = path == "/" or name in page_routes.FILES
        assert (status, bool(body)) == ((200, True) if known else (404, False)), path
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; ")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-cache"
        if known:
            assert body == (page_routes.FOLDER / name).read_bytes()
            assert headers["content-type"].split(";")[0] == page_routes.MEDIA_TYPES[Path(name).suffix]


def test_every_file_of_the_page_is_served() -> None:
    found = {str(path.relative_to(page_routes.FOLDER)) for path in page_routes.FOLDER.rglob("*") if path.is_file()}
    assert found == {*page_routes.FILES, page_routes.PAGE, "uPlot-LICENSE"}


class _Tags(HTMLParser):
    """The tags of a page with their attributes, and the text of its scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.code = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style"):
            self.code += data.strip()


def test_the_page_names_no_other_host_and_has_no_code_within_it() -> None:
    for name in (page_routes.PAGE, *OURS):
        text = (page_routes.FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"\w+://|[\"'(]//", text), name
    page = _Tags()
    page.feed((page_routes.FOLDER / page_routes.PAGE).read_text(encoding="utf-8"))
    assert page.code == ""
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value in (None, "/v1/ca.pem") or str(value).removeprefix("/page/") in page_routes.FILES


def test_every_part_of_the_page_has_a_name_of_its_own_and_scripts_ask_for_those_that_there_are() -> None:
    names = re.findall(r'\bid="([^"]+)"', (page_routes.FOLDER / page_routes.PAGE).read_text(encoding="utf-8"))
    assert len(names) == len(set(names)) > 80
    scripts = "".join((page_routes.FOLDER / name).read_text(encoding="utf-8") for name in OURS if name.endswith(".js"))
    asked = set(re.findall(r'\$\("([^"]+)"\)', scripts))
    assert len(asked) > 60
    assert asked <= set(names)


def test_the_page_parses_no_text_as_html() -> None:
    for name in OURS:
        text = (page_routes.FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), name


def test_the_build_brought_the_charts_of_their_own_release() -> None:
    charts = build_module("build_charts")
    assert charts.find_missing(ROOT / charts.VENDOR) == [], "pip install -e . brings them"
    assert {f"vendor/{name}" for name in charts.FILES} == set(page_routes.VENDOR)
    script = (page_routes.FOLDER / page_routes.VENDOR[0]).read_text(encoding="utf-8")
    assert len(re.findall(r"\w+://", script)) == 1, "its first line names where it comes from"


def test_a_carrier_that_fails_or_brings_something_else_leaves_no_charts(tmp_path: Path) -> None:
    charts = build_module("build_charts")
    (tmp_path / charts.VENDOR).parent.mkdir(parents=True)
    other = "import zipfile; zipfile.ZipFile('a.whl', 'w').writestr('uPlot.min.css', 'other')"
    charts.CARRIERS = {"pip": ["false"], "npm": [sys.executable, "-c", other], "none": ["no-such-command"]}
    problem = charts.fetch_charts(tmp_path)
    assert "pip: exit code 1" in problem
    assert "npm: uPlot.iife.min.js has another digest, or is missing" in problem
    assert "none: " in problem
    assert list((tmp_path / charts.VENDOR).iterdir()) == []


def test_a_wheel_of_the_source_archive_has_the_whole_page_without_a_registry(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-d", tmp_path / "dist", "-t"]
    subprocess.run([*build, "sdist"], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(path.parent for path in tmp_path.glob("*/pyproject.toml"))
    offline = {**os.environ, "PIP_NO_INDEX": "1", "npm_config_offline": "true"}
    subprocess.run([*build, "wheel"], cwd=source, check=True, capture_output=True, env=offline)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        for name in (page_routes.PAGE, *page_routes.FILES, "uPlot-LICENSE"):
            assert wheel.read(f"hosl_cloud/page/{name}") == (page_routes.FOLDER / name).read_bytes()


async def wait_for_round(page: Any, round_: int) -> None:
    is_there = "round => Number(document.querySelector('#f-round').textContent.replaceAll(',', '')) >= round"
    await page.wait_for_function(is_there, arg=round_)


def test_the_page_shows_a_run_and_its_devices_and_stops_it(bundle: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with browser() as context, serving(bundle, tmp_path / "cloud", settings(), stays=True) as service:
            page = await context.new_page()
            watch = Watch(page)
            with devices(service, "pi-1", "pi-2") as processes:
                await sign_in(page, service)
                await numbers_move(page)
                await page.locator("#checkpoints tr", has_text="· best").wait_for()
                keys = await page.locator(".chart .key").all_text_contents()
                assert "held-out data" in keys
                assert any(key.startswith("training") for key in keys)
                await an_unknown_run_is_named_and_no_other_shown(page)
                await the_log_begins_with_a_whole_line(page, service)
                await a_line_of_the_log_is_text(page, service)
                await nothing_is_wider_than_a_phone(page)
                await take_screenshots(page, "run")
                processes["pi-2"].kill()
                await page.get_by_text("Device pi-2 is away.").wait_for(state="attached")
                assert await badge_of(page, "pi-2") == "away"
                assert await badge_of(page, "pi-1") == "ready"
                await stop_and_resume(page, service)
            await sign_out(page)
            assert watch.problems == []
            here = service.address.replace("ws", "http", 1) + "/"
            assert [url for url in watch.requests if not url.startswith(here)] == []

    asyncio.run(main())


async def numbers_move(page: Any) -> None:
    await wait_for_round(page, 12)
    await page.locator("#f-accuracy", has_text="%").wait_for()
    first = int((await page.locator("#f-round").text_content()).replace(",", ""))
    await wait_for_round(page, first + 3)
    assert await page.locator("#charts canvas").count() == 4
    assert re.search(r"round \d+ · training \d\.\d+", await page.locator("#charts output").first.text_content())
    row = page.locator("#devices tr", has_text="pi-1")
    assert re.search(r"40 training, 10 held-out[\d.]+ MB", await row.text_content())
    assert "anchor" in await page.locator("#kinds").text_content()
    await page.locator("#checkpoints tbody tr").first.wait_for()


async def an_unknown_run_is_named_and_no_other_shown(page: Any) -> None:
    await page.evaluate("location.hash = 'nonesuch'")
    await page.get_by_text("There is no run nonesuch.").wait_for()
    assert await page.locator("#run").is_hidden()
    await page.evaluate("location.hash = ''")
    await page.get_by_role("heading", name="run-1").wait_for()


async def the_log_begins_with_a_whole_line(page: Any, service: Service) -> None:
    """Once it is longer than its box, and shows its end."""
    said = [NewEvent("run-1", time.time(), "info", f"sentence {number}") for number in range(40)]
    await asyncio.to_thread(service.coordinator.store.add_events, said)
    await page.wait_for_function("() => document.querySelector('#log').scrollTop > 0")
    cut = """[...document.querySelectorAll('#log li')].map((line) =>
        line.offsetTop - document.querySelector('#log').offsetTop - document.querySelector('#log').scrollTop)
        .filter((top) => top < -1 && top > -15).length"""
    assert await page.evaluate(cut) == 0


async def a_line_of_the_log_is_text(page: Any, service: Service) -> None:
    line = "<img src=x onerror=alert(1)> & <b>bold</b>"
    said = NewEvent("run-1", time.time(), "error", line)
    await asyncio.to_thread(service.coordinator.store.add_events, [said])
    await page.locator("#log li.error", has_text=line).wait_for()
    assert await page.locator("#log img, #log b").count() == 0


async def nothing_is_wider_than_a_phone(page: Any) -> None:
    await page.set_viewport_size({"width": 360, "height": 800})
    assert await page.evaluate("document.documentElement.scrollWidth") == 360


async def badge_of(page: Any, device: str) -> str:
    text: str = await page.locator("#devices tr", has_text=device).locator(".badge").text_content()
    return text


async def stop_and_resume(page: Any, service: Service) -> None:
    """By the keyboard alone."""
    await page.get_by_role("button", name="Stop…").focus()
    await page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Stop run run-1?")
    await dialog.wait_for()
    await take_screenshots(page, "confirm", whole=False)
    await page.keyboard.press("Escape")
    await dialog.wait_for(state="hidden")
    assert (await asyncio.to_thread(service.coordinator.store.run, "run-1")).state == "running"
    await page.keyboard.press("Enter")
    await dialog.get_by_role("button", name="Stop the run").press("Enter")
    await page.locator("#run-state", has_text="stopped").wait_for()
    assert (await asyncio.to_thread(service.coordinator.store.run, "run-1")).state == "stopped"
    await page.get_by_role("button", name="Resume…").click()
    await page.get_by_role("button", name="Resume the run").click()
    await page.locator("#run-state", has_text="running").wait_for()
    await page.get_by_text(re.compile("Waits for more devices")).wait_for()


async def sign_out(page: Any) -> None:
    await page.get_by_role("button", name="Sign out").click()
    await page.get_by_label("Admin token").wait_for()
    assert await page.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 0
    await take_screenshots(page, "sign-in", whole=False)


def test_the_page_says_what_is_wrong_and_works_without_charts(bundle: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with browser() as context, serving(bundle, tmp_path / "cloud", settings(), stays=True) as service:
            await context.route("**/page/vendor/*", lambda route: route.fulfill(status=404))
            page = await context.new_page()
            await page.goto(service.address.replace("ws", "http", 1) + "/")
            for token, problem in (("wrong", "does not know this token"), (service.token, "Use the admin token")):
                await page.get_by_label("Admin token").fill(token)
                await page.get_by_role("button", name="Sign in").click()
                await page.get_by_text(problem).wait_for()
                assert await page.evaluate("sessionStorage.length") == 0
            await sign_in(page, service)
            await page.get_by_text("Charts are missing").wait_for()
            assert await page.locator("#rounds").is_visible()
            await page.get_by_text("Waits for more devices (0 of 2 are there)").wait_for()
            await take_screenshots(page, "no-charts", whole=False)
            await context.set_offline(True)
            await page.get_by_text("The service does not answer. Trying again.").wait_for()
            await context.set_offline(False)
            await page.get_by_text("Connected", exact=True).wait_for()
            while not service.authenticator.limits.failures.take("127.0.0.1"):
                pass
            await page.get_by_role("button", name="Sign out").click()
            await page.get_by_label("Admin token").fill("wrong")
            await page.get_by_role("button", name="Sign in").click()
            await page.get_by_text("Too many requests from this address. Try again in").wait_for()

    asyncio.run(main())
