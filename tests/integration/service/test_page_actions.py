"""What the status page does for who leads the service, in a browser: start a run, add a device, take the model."""

from __future__ import annotations

import asyncio
import re
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services import Service, serving
from statuspage.browsing import Watch, browser, settings, sign_in, take_screenshots
from statuspage.histories import write_checkpoints, write_rounds
from support import count_right, write_reviews

ROUNDS = 40


@pytest.fixture
def bundle(make_bundle: Callable[[str, int], Path]) -> Path:
    return make_bundle("lora", 2)


def write_past(service: Service) -> None:
    write_rounds(service.coordinator.store, "run-1", ROUNDS, ["garage"], 20, classes=2)
    write_checkpoints(service, "run-1", 20)


def test_the_page_starts_a_run_adds_a_device_and_takes_the_model(bundle: Path, tmp_path: Path) -> None:
    async def main() -> None:
        folder = tmp_path / "cloud"
        async with browser() as context, serving(bundle, folder, settings(), stays=True) as service:
            await asyncio.to_thread(write_past, service)
            page = await context.new_page()
            watch = Watch(page)
            await nothing_is_done_without_the_token(page, service)
            await sign_in(page, service)
            await a_run_is_started(page, bundle)
            await a_device_is_added(page, service)
            await a_token_is_revoked(page, service)
            await page.locator("#runs a", has_text="run-1").click()
            await the_model_is_taken(page, service, tmp_path)
            assert [problem for problem in watch.problems if "422" not in problem and "409" not in problem] == []
        assert not (folder / "merged-for-download").exists(), "it goes with the service"

    asyncio.run(main())


async def nothing_is_done_without_the_token(page: Any, service: Service) -> None:
    await page.goto(service.address.replace("ws", "http", 1) + "/")
    await page.get_by_text("Without it this page shows and changes nothing.").wait_for()
    for name in ("Start a run…", "Add a device…", "Tokens…", "Merge"):
        assert await page.get_by_role("button", name=name).count() == 0


async def a_run_is_started(page: Any, bundle: Path) -> None:
    """By the keyboard, and first with a setting that there is not."""
    await page.get_by_role("button", name="Start a run…").press("Enter")
    dialog = page.get_by_role("dialog", name="Start a run")
    await dialog.get_by_label("Bundle").select_option(bundle.name)
    await dialog.get_by_label("Task").select_option("reviews")
    await dialog.get_by_text("An example needs the fields text, label").wait_for()
    await dialog.get_by_label("Rounds").fill("7")
    await dialog.get_by_label("Name").fill("typed")
    more = dialog.get_by_label("More settings")
    await more.fill("learning_rate=3")
    await more.press("Tab")
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await dialog.get_by_text("did you mean client.learning_rate?").wait_for()
    await more.fill('max_length=16\ntask.verbalizers=["bad", "good"]\n\ntail.learning_rate=2e-3')
    await dialog.get_by_role("button", name="Start the run").click()
    await dialog.wait_for(state="hidden")
    await page.get_by_role("heading", name=re.compile("^typed-")).wait_for()
    assert "#typed-" in page.url
    await page.locator("#settings > summary").click()
    changed = page.locator("#changed tr", has_text="tail.learning_rate")
    await changed.wait_for()
    assert await changed.locator("td").first.text_content() == "0.002"
    assert await page.locator("#f-rounds").text_content() == "of 7"


async def a_device_is_added(page: Any, service: Service) -> None:
    await page.get_by_role("button", name="Add a device…").click()
    dialog = page.get_by_role("dialog", name="Add a device")
    await dialog.get_by_label("Name").fill("attic")
    await page.keyboard.press("Enter")
    lines = page.locator("#device-lines")
    await lines.get_by_text("attic~").wait_for()
    text = await lines.text_content()
    token = re.search(r"'(attic~[^']+)'", text).group(1)  # type: ignore[union-attr]
    assert f"hosl-edge --server {service.address} --token-file attic.token --data FILE" in text
    row = service.authenticator.access.authenticate(token)
    assert row is not None
    assert row.name == "attic"

    await page.keyboard.press("Escape")
    assert await lines.is_visible(), "a token is shown once, and does not go by accident"
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await page.get_by_role("button", name="Copy").click()
    await page.get_by_text("Copied.").wait_for()
    assert await page.evaluate("navigator.clipboard.readText()") == text
    await page.get_by_role("button", name="Close").click()
    assert token not in await page.content()

    await page.get_by_role("button", name="Add a device…").click()
    await dialog.get_by_label("Name").fill("attic")
    await page.keyboard.press("Enter")
    await dialog.get_by_text("device attic has a token").wait_for()
    await dialog.get_by_role("button", name="Cancel").click()


async def a_token_is_revoked(page: Any, service: Service) -> None:
    access = service.authenticator.access
    await asyncio.to_thread(access.add, "cellar", "smollm")
    await page.get_by_role("button", name="Tokens…", exact=True).click()
    dialog = page.get_by_role("dialog", name="Tokens of devices")
    attic, cellar = (dialog.get_by_role("row", name=name) for name in ("attic", "cellar"))
    await attic.get_by_text("all bundles").wait_for()
    await cellar.get_by_text("smollm").wait_for()
    await take_screenshots(page, "tokens", whole=False)

    revoke = attic.get_by_role("button", name="Revoke the token of attic…")
    await revoke.click()
    question = page.get_by_role("dialog", name="Revoke the token of attic?")
    await question.get_by_role("button", name="Cancel").click()
    assert [row.revoked_at for row in access.list()] == [None, None]
    await revoke.click()
    await question.get_by_role("button", name="Revoke the token").click()
    await attic.get_by_text(re.compile("^revoked ")).wait_for()
    assert await revoke.count() == 0
    assert [(row.name, row.revoked_at is None) for row in access.list()] == [("attic", False), ("cellar", True)]
    await dialog.get_by_role("button", name="Close").click()
    await dialog.wait_for(state="hidden")


async def the_model_is_taken(page: Any, service: Service, folder: Path) -> None:
    await page.get_by_role("button", name="Merge", exact=True).click()
    await page.get_by_text(re.compile("Merging the best checkpoint, since")).wait_for()
    await page.get_by_text(re.compile(r"Round \d+, best checkpoint: .*, a tar file\.")).wait_for(timeout=200_000)
    async with page.expect_download() as started:
        await page.get_by_role("button", name="Download").click()
    download = await started.value
    assert re.fullmatch(r"run-1-round-(20|40)\.tar", download.suggested_filename)
    await download.save_as(folder / "model.tar")

    with tarfile.open(folder / "model.tar") as archive:
        archive.extractall(folder, filter="data")
    assert {"model.safetensors", "README.md", "config.json"} <= {path.name for path in (folder / "run-1").iterdir()}
    right, all_ = count_right(folder / "run-1", [write_reviews(folder / "few.jsonl", 4)])
    assert 0 <= right <= all_ == 4
    await the_ticket_is_used_up(download.url)


async def the_ticket_is_used_up(url: str) -> None:
    def again() -> int:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    assert await asyncio.to_thread(again) == 404
