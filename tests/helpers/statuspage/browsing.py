"""The status page in a browser, and devices as processes."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from services import Service
from support import ROOT, TASK, write_reviews

SCREENSHOTS = ROOT / ".cache" / "page"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"phone": (390, 844), "tablet": (820, 1180), "desktop": (1280, 900)}
DEADLINE_MS = 30_000


def settings(**more: Any) -> dict[str, Any]:
    run = {"batch_size": 4, "max_length": 16, "rounds": 100_000, "report_every": 2, "directions": 1}
    parts = {
        "client": {"learning_rate": 0.01},
        "tail": {"learning_rate": 3e-3},
        "evaluation": {"every": 10},
        "devices": {"start_with": 2},
    }
    return {**msgspec.toml.decode(TASK), **run, **parts, **more}


class Watch:
    """What a page asks for, and what its console says."""

    def __init__(self, page: Any) -> None:
        self.requests: set[str] = set()
        self.problems: list[str] = []
        page.on("request", lambda request: self.requests.add(request.url))
        page.on("console", lambda line: self.problems.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Any]:
    """A new browser's context; skips where there is none."""
    playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    async with playwright.async_playwright() as driver:
        started = await driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        context = await started.new_context(reduced_motion="reduce")
        context.set_default_timeout(DEADLINE_MS)
        yield context
        await started.close()


@contextlib.contextmanager
def devices(service: Service, *names: str) -> Any:
    """Agents as processes, by name."""
    processes = {}
    for place, name in enumerate(names):
        folder = service.folder.parent
        arguments = {
            "--server": service.address,
            "--token-file": service.token_file,
            "--data": write_reviews(folder / f"{name}.jsonl", 40, 40 * place),
            "--eval": write_reviews(folder / f"{name}-eval.jsonl", 10, 400 + 10 * place),
            "--state-dir": folder / "state",
            "--cache-dir": folder / "cache",
            "--name": name,
            "--threads": 1,
        }
        command = [sys.executable, "-m", "hosl_edge", *(str(word) for pair in arguments.items() for word in pair)]
        processes[name] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


async def sign_in(page: Any, service: Service, run: str = "run-1") -> None:
    await page.goto(service.address.replace("ws", "http", 1) + "/")
    await page.get_by_label("Admin token").fill(service.admin_token)
    await page.keyboard.press("Enter")
    await page.get_by_role("heading", name=run).wait_for()


async def take_screenshots(page: Any, name: str, *, whole: bool = True) -> None:
    """Of the whole page, or of what a screen shows."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        for size, (width, height) in SIZES.items():
            await page.set_viewport_size({"width": width, "height": height})
            await page.wait_for_timeout(50)  # charts fit themselves
            await page.screenshot(path=SCREENSHOTS / f"{name}-{size}-{scheme}.png", full_page=whole)
