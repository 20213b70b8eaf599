"""Take the documentation's pictures of the status page: three devices, six runs, 15,000 rounds in one of them.

    python tests/benchmarks/cloud/status_page.py

The service, the devices and the page are real, of a tiny model; the past is made up and written into the store. Needs
playwright, and Chromium. Writes docs/status-page-light.png and docs/status-page-dark.png.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from hosl_cloud.runs.fleet import Waiting  # noqa: E402
from hosl_export.__main__ import main as export  # noqa: E402
from saved_models import save_tiny_llama  # noqa: E402
from services import serving  # noqa: E402
from statuspage.browsing import browser, devices, sign_in  # noqa: E402
from statuspage.histories import RUN, SETTINGS, write_past, write_reports  # noqa: E402

WIDTH = 1200
COLORS = 128
"""As many as leave each picture smaller than 150 kB."""


async def take(folder: Path) -> None:
    """Serve, let three devices come, and take both pictures."""
    bundle = folder / "bundles" / "messages"
    save_tiny_llama(folder / "model")
    options = ["--model", folder / "model", "--split", 2, "--train", "lora", "--max-length", 32, "--out", bundle]
    if code := export([str(option) for option in options]):
        raise SystemExit(code)

    async with browser() as context, serving(bundle, folder / "data", SETTINGS, run_id=RUN, stays=True) as service:
        await asyncio.to_thread(write_past, service)
        with devices(service, "garage", "kitchen", "workshop"):
            page = await context.new_page()
            await sign_in(page, service, RUN)
            await page.locator("#f-devices", has_text="3 of 3").wait_for(timeout=120_000)
            await asyncio.to_thread(write_reports, service)
            service.coordinator.fleet.waiting = Waiting("anchor", ("workshop",), time.time())
            await page.locator("#f-left", has_text="min").wait_for()
            await page.locator("#devices tr", has_text="58 °C").wait_for()
            for scheme in ("light", "dark"):
                await picture(page, scheme)


async def picture(page: Any, scheme: str) -> None:
    """From the top of the page to the end of its charts and classes."""
    await page.emulate_media(color_scheme=scheme)
    await page.set_viewport_size({"width": WIDTH, "height": 900})
    await page.wait_for_timeout(500)  # charts fit themselves
    end = await page.locator("#devices").evaluate("(node) => node.closest('section').getBoundingClientRect().bottom")
    path = ROOT / "docs" / f"status-page-{scheme}.png"
    await page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": end + 12})
    Image.open(path).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    (ROOT / "docs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        asyncio.run(take(Path(work)))
