"""The agent: fetch the shard, then connect, and connect again, until the run has ended."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from hosl_edge.device import Device
from hosl_edge.display import Display, Progress
from hosl_edge.exceptions import ConnectionLost, RefusedError
from hosl_edge.fetch import fetch_bundle
from hosl_edge.memory import keep_heap_small, read_memory
from hosl_edge.network import NetworkWatch
from hosl_edge.session import Session
from hosl_edge.settings import EdgeSettings, device_name, read_token
from hosl_edge.trust import Cloud, connect_securely
from hosl_protocol import Complete, ProtocolError

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 20.0


@dataclass(frozen=True)
class Summary:
    """How it went, for `--json`."""

    device: str
    run: str
    outcome: str
    rounds: int
    accuracy: float | None
    weights_digest: str
    peak_rss_bytes: int
    anonymous_bytes: int
    step_seconds: float
    """Duration of the last round's work on this device, waiting for the cloud included."""
    sent_bytes: int
    received_bytes: int


async def run_agent(settings: EdgeSettings) -> Summary:
    """Take part in the cloud's run until it ends; reconnects for ever."""
    keep_heap_small()
    token = read_token(Path(settings.token_file))
    settings = msgspec.structs.replace(settings, name=device_name(settings, token))
    display, progress = Display(settings.name), Progress()
    software = f"hosl-edge {importlib.metadata.version('hosl')}"
    device: Device | None = None
    cloud: Cloud | None = None
    network = NetworkWatch()
    attempt = 0
    try:
        while True:
            try:
                if cloud is None:
                    cloud = await asyncio.to_thread(connect_securely, settings.server, token, Path(settings.cache_dir))
                if device is None:
                    device = await _prepare(settings, cloud, display)
                sent = progress.sent_bytes
                complete = await Session(device, display, progress, software, cloud).run()
                return _summarize(device, complete, progress, display)
            except (ConnectionLost, ProtocolError, RefusedError) as error:
                if isinstance(error, RefusedError) and not error.retry:
                    raise
                # A connection that carried something was a good one: start counting anew.
                attempt = 1 if device is not None and progress.sent_bytes > sent + 65536 else attempt + 1
                pause = backoff_s(attempt)
                display.say(f"{error}; next try in {pause:.1f} s")
                if await network.pause(pause):
                    display.say("the network has changed; trying at once")
    finally:
        network.close()
        if device is not None:
            device.close()


def backoff_s(attempt: int) -> float:
    """Jittered pause before try `attempt` (from 1): doubles from half a second up to 20 s."""
    longest = min(LONGEST_PAUSE_S, 0.5 * 2.0 ** min(attempt - 1, 10))
    return longest * random.uniform(0.5, 1.0)


async def _prepare(settings: EdgeSettings, cloud: Cloud, display: Display) -> Device:
    on_progress = partial(display.show_download, "shard")

    def work() -> Device:
        rates: list[float] = []
        folder, manifest = fetch_bundle(cloud, Path(settings.cache_dir), on_progress, rates.append)
        device = Device(settings, folder, manifest)
        for rate in rates[-1:]:
            device.note_link(rate)
        return device

    return await asyncio.get_running_loop().run_in_executor(None, work)


def _summarize(device: Device, complete: Complete, progress: Progress, display: Display) -> Summary:
    memory = read_memory()
    display.say(
        f"run {complete.run} {complete.reason} at round {complete.round}; peak memory {memory.peak / 1e6:.0f} MB, "
        f"sent {progress.sent_bytes / 1e6:.1f} MB, received {progress.received_bytes / 1e6:.1f} MB"
    )
    return Summary(
        device=device.settings.name,
        run=complete.run,
        outcome=complete.reason,
        rounds=complete.round,
        accuracy=progress.accuracy,
        weights_digest=device.digest(),
        peak_rss_bytes=memory.peak,
        anonymous_bytes=memory.anonymous,
        step_seconds=progress.step_seconds,
        sent_bytes=progress.sent_bytes,
        received_bytes=progress.received_bytes,
    )
