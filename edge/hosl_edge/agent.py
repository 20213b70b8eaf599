"""The agent: fetch the shard, connect, take part in the run, and connect again; with `stay` in run after run.

Everything here runs on the event loop but the work of `_open_device`, which has a thread. `Agent` holds what outlives
connections and runs. At most one Device is open: it holds the lock on the state folder, so that it is closed before
the next is made, and no session uses it any more by then.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hosl_edge.connection.fetch import fetch_bundle
from hosl_edge.connection.goodbye import decline
from hosl_edge.connection.network import NetworkWatch
from hosl_edge.connection.offer import check_fit, fetch_offer
from hosl_edge.connection.token import Token, device_name, read_token
from hosl_edge.connection.trust import Cloud, connect_securely
from hosl_edge.data.records import check_readable
from hosl_edge.device import Device
from hosl_edge.driver import in_thread
from hosl_edge.exceptions import ConnectionLost, ConsentError, DataError, NoRun, RefusedError, WrongDigestError
from hosl_edge.host.display import Display, Progress
from hosl_edge.host.health import HealthMonitor, read_available, read_health
from hosl_edge.host.notify import WatchedPool, notified
from hosl_edge.host.status import Document, serve_status, status_folder
from hosl_edge.model.memory import keep_heap_small, read_memory
from hosl_edge.model.prefix_cache import FILE as CACHE_FILE
from hosl_edge.session import Session
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import HoslError, ProtocolError
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.wire.messages import Complete, Hello

log = logging.getLogger(__name__)

CONNECTING, WAITING = "connecting", "waiting to connect"
"""States of an agent that has no connection."""
NO_DIGEST = "0" * 64
"""Stands for the data of a device that declines."""
GOOD_CONNECTION_BYTES = 65536
"""A connection that sent more has carried something, and was a good one."""
LONGEST_PAUSE_S = 20.0
TELL_AGAIN_S = 60.0
"""Between words about tries that fail alike."""
LONGEST_RETRY_AFTER_S = 600.0
"""Most of what a cloud without a run may ask for."""


@dataclass(frozen=True)
class Summary:
    """What an agent came to, for `--json`."""

    device: str
    run: str
    outcome: str
    rounds: int
    accuracy: float | None
    """right / scored; null without held-out data."""
    right: int | None
    scored: int | None
    """Right predictions of the device's own held-out data, and all of them, in its last evaluation."""
    weights_digest: str
    peak_rss_bytes: int
    anonymous_bytes: int
    step_seconds: float
    """Duration of the last round's work on this device, waiting for the cloud included."""
    cpu_seconds: float
    """Processor time of this process since its start, all threads together."""
    sent_bytes: int
    received_bytes: int
    cache_written_bytes: int
    """Written to the disk for what frozen blocks compute (`cache_budget`)."""


async def run_agent(settings: EdgeSettings, pool: WatchedPool | None = None) -> Summary:
    """Take part in the cloud's run until it ends, with `stay` in every run; reconnects for ever.

    Work is done in the threads of `pool`, which systemd's watchdog hears of; None takes the event loop's own, and tells
    nobody. Raises LowMemoryError, and every HoslError that another try would not mend.
    """
    async with notified(pool, settings.stall_timeout_s):
        keep_heap_small()
        token = read_token(Path(settings.token_file))
        check_readable(Path(settings.data), Path(settings.eval) if settings.eval else None)
        settings = msgspec.structs.replace(settings, name=device_name(settings, token))
        display = Display(settings.name) if pool is None else Display(settings.name, pool.tick)
        agent = Agent(settings, token, display)

        status = serve_status(status_folder(lambda: settings.state_dir), settings.name, agent.status)
        async with status, agent.health.stopping_at_low_memory():
            try:
                with display.drawn(lambda: agent.progress):
                    return await _take_part(agent)
            finally:
                agent.close()


async def _take_part(agent: Agent) -> Summary:
    """Try until the run, or with `stay` for ever."""
    while True:
        sent_bytes = agent.progress.sent_bytes
        # What no other try would mend is none of these, and ends the agent.
        try:
            session = await agent.open_session()
            return await agent.conclude(await session.take_part())
        except (ConnectionLost, ProtocolError, RefusedError, WrongDigestError) as error:
            await agent.pause_after(error, sent_bytes)


def backoff_s(attempt: int) -> float:
    """Jittered pause before try `attempt` (from 1): doubles from half a second up to 20 s."""
    # Jittered, so that a fleet whose cloud was away does not come back all at once.
    longest = min(LONGEST_PAUSE_S, 0.5 * 2.0 ** min(attempt - 1, 10))
    return longest * random.uniform(0.5, 1.0)


class Agent:
    """What outlives connections and runs."""

    def __init__(self, settings: EdgeSettings, token: Token, display: Display) -> None:
        self.settings, self.token, self.display = settings, token, display
        self.software = f"hosl-edge {importlib.metadata.version('hosl')}"
        self.progress = Progress()
        self.health = HealthMonitor(settings, display)

        self._cloud: Cloud | None = None
        self._device: Device | None = None
        self._network = NetworkWatch()
        self._attempt = 0
        """Tries since the last that carried something; the pauses grow with it."""
        self._last_error: str | None = None
        self._told_at = 0.0
        """When an error was said last, in monotonic time."""
        self._next_try_at: float | None = None
        self._waits_for_run = False
        """Whether it has been said that there is no run."""

        self._ended_run: str | None = None
        """The last run whose end the cloud told."""
        self._refused_shard: str | None = None
        """Digest of the shard that the cloud refused last."""
        self._wrong_file: str | None = None
        """Digest that the last file should have had which had another."""

    async def open_session(self) -> Session:
        """Make a session of the next connection, with a device that is fetched and opened where there is none."""
        self.progress.state, self._next_try_at = CONNECTING, None
        if self._cloud is None:
            cache = Path(self.settings.cache_dir)
            self._cloud = await asyncio.to_thread(connect_securely, self.settings.server, self.token, cache)
            if self._cloud.proxy is not None:
                self.display.say(f"goes through {self._cloud.proxy}")
        if self._device is None:
            self._device = await self._open_device(self._cloud)
        self._waits_for_run = False
        return Session(self._device, self.display, self.progress, self.software, self._cloud, self.health.cool_down)

    async def _open_device(self, cloud: Cloud) -> Device:
        """Fetch the shard and open it; a run that this device cannot be in is told why."""
        settings, display = self.settings, self.display
        manifests: list[Manifest] = []
        files: list[str] = []
        rates: list[float] = []

        def on_progress(done: int, size: int) -> None:
            display.show_download(files[-1], done, size)

        def on_manifest(manifest: Manifest) -> None:
            manifests.append(manifest)
            # Before the shard is downloaded, which may take an hour: what the run wants and this device has not.
            offer = fetch_offer(cloud, settings.name)
            if offer is not None and offer.task is not None:
                check_fit(settings, offer.task, manifest)

        def work() -> Device:
            folder, manifest = fetch_bundle(
                cloud,
                Path(settings.cache_dir),
                on_progress,
                rates.append,
                on_manifest=on_manifest,
                on_file=files.append,
                waits=self._ended_run is not None,
            )
            device = Device(settings, folder, manifest)
            # The last download tells most of how the link is now; where all was cached there is none.
            for rate in rates[-1:]:
                device.note_link(rate)
            return device

        try:
            return await asyncio.get_running_loop().run_in_executor(None, work)
        # The cloud's people wait for this device, and see no log of it.
        except (ConsentError, DataError) as error:
            for manifest in manifests:
                shard = manifest.shard_digest
                hello = Hello(software=self.software, device=settings.name, shard_digest=shard, data_digest=NO_DIGEST)
                await decline(cloud, hello, error)
            raise

    async def conclude(self, complete: Complete) -> Summary:
        """Sum up a run that has ended with this device in it.

        With `stay` it raises NoRun instead, to wait for the next one. Raises RefusedError where the run has ended
        without this device, which does not stay.
        """
        header = self._device.header if self._device is not None else None
        if complete.run in (self.progress.run, header.run if header is not None else None):
            summary = await self._summarize(complete)
            if not self.settings.stay:
                return summary
        else:
            sentence = f"run {complete.run} has ended ({complete.reason} at round {complete.round}) without this device"
            if not self.settings.stay:
                raise RefusedError(sentence, retry=False)
            if complete.run != self._ended_run:
                self.display.say(sentence, matters=True)

        # The pauses grow where a cloud says the same end again and again.
        if complete.run != self._ended_run:
            self._ended_run, self._attempt = complete.run, 0
        self.progress = self._without_run()
        raise NoRun(None)

    async def pause_after(self, error: HoslError, sent_bytes: int) -> None:
        """Wait before the next try; raises `error` where another try would not mend it.

        `sent_bytes` is what had been sent before the try that failed.
        """
        if isinstance(error, WrongDigestError):
            # The run may have changed while its shard was fetched: with the manifest of now all is well.
            if error.expected == self._wrong_file:
                raise error
            self._wrong_file = error.expected
        else:
            if isinstance(error, RefusedError) and not error.retry:
                error = self._fetch_anew(error)
            # A connection that carried something was a good one: start counting anew.
            if self._device is not None and self.progress.sent_bytes > sent_bytes + GOOD_CONNECTION_BYTES:
                self._attempt = 0

        self._attempt += 1
        pause_s = backoff_s(self._attempt)
        if isinstance(error, NoRun):
            pause_s = self._await_run(error, pause_s)
        else:
            # One after the other the tries fail alike; in between it is said that they still do.
            is_news = self._attempt == 1 or self._waits_for_run or str(error) != self._last_error
            self._last_error, self._waits_for_run = str(error), False
            self.progress.state = WAITING
            if is_news or time.monotonic() - self._told_at > TELL_AGAIN_S:
                self._told_at = time.monotonic()
                self.display.say(f"{error}; next try in {pause_s:.1f} s", matters=True)
        self._next_try_at = time.time() + pause_s
        # A laptop that wakes up, or a cable that is plugged in, need not wait for the end of the pause.
        if await self._network.pause(pause_s) and not self._waits_for_run:
            self.display.say("the network has changed; trying at once")

    def _fetch_anew(self, error: RefusedError) -> ConnectionLost:
        """Let go of a shard that the cloud has no run for any more; raises `error` where that changes nothing.

        An agent that has joined a run, and does not stay, has no part in another; and one that got the same shard
        again, and is refused again, would get it for ever.
        """
        if error.code != "shard" or not (self.settings.stay or self.progress.run is None):
            raise error

        assert self._device is not None
        refused = self._device.manifest.shard_digest
        if self.progress.run is None and refused == self._refused_shard:
            raise error
        self._refused_shard = refused
        self._close_device()
        self.progress = self._without_run()
        return ConnectionLost("the cloud's run has another shard, which is fetched now")

    def _await_run(self, error: NoRun, pause_s: float) -> float:
        """Let go of the last run, for the next one may have another shard; returns how long to wait, in seconds."""
        self._close_device()
        self.progress.state = "waiting for a run"
        if error.retry_after_s is None:
            return pause_s
        # Never sooner than the cloud asks for, and not all at once.
        pause_s = min(error.retry_after_s, LONGEST_RETRY_AFTER_S) * random.uniform(1.0, 1.25)
        if not self._waits_for_run:
            self.display.say(f"{error}; asks again in {pause_s:.0f} s, and so on until there is one")
        self._waits_for_run, self._attempt = True, 0
        return pause_s

    def _without_run(self) -> Progress:
        """Figures of an agent without a run: what it has sent and received goes on counting."""
        return Progress(sent_bytes=self.progress.sent_bytes, received_bytes=self.progress.received_bytes)

    def close(self) -> None:
        """Leave everything durable, and let go of it."""
        self._network.close()
        self._close_device()

    def _close_device(self) -> None:
        if self._device is not None:
            self._device.close()
        self._device = None

    def status(self) -> Document:
        """What `hosl-edge status` shows; null is what is not known."""
        memory, health, progress = read_memory(), read_health(), self.progress
        return {
            "software": self.software,
            "name": self.settings.name,
            "server": self.settings.server,
            "state": progress.state,
            "run": progress.run,
            "round": progress.round,
            "rounds": progress.rounds,
            "loss": progress.loss,
            "accuracy": progress.accuracy,
            "right": progress.right,
            "scored": progress.scored,
            "step_seconds": progress.step_seconds,
            "memory_bytes": memory.resident,
            "peak_memory_bytes": memory.peak,
            "anonymous_memory_bytes": memory.anonymous,
            "available_memory_bytes": read_available(),
            "temperature_c": health.temperature_c,
            "throttled": list(health.throttled),
            "sent_bytes": progress.sent_bytes,
            "received_bytes": progress.received_bytes,
            "cache_written_bytes": self._device.cache_written_bytes if self._device is not None else 0,
            "last_error": self._last_error if progress.state in (CONNECTING, WAITING) else None,
            "next_try_s": None if self._next_try_at is None else max(0.0, self._next_try_at - time.time()),
        }

    async def _summarize(self, complete: Complete) -> Summary:
        assert self._device is not None
        memory, progress = read_memory(), self.progress
        written = self._device.cache_written_bytes
        self.display.say(
            f"run {complete.run} {complete.reason} at round {complete.round}; "
            f"{f'{progress.score()}; ' if progress.score() else ''}peak memory {memory.peak / 1e6:.0f} MB, "
            f"sent {progress.sent_bytes / 1e6:.1f} MB, received {progress.received_bytes / 1e6:.1f} MB"
            f"{f', wrote {written / 1e6:.1f} MB to {CACHE_FILE}' if written else ''}",
            matters=True,
        )
        return Summary(
            device=self.settings.name,
            run=complete.run,
            outcome=complete.reason,
            rounds=complete.round,
            accuracy=progress.accuracy,
            right=progress.right,
            scored=progress.scored,
            weights_digest=await in_thread(self._device.digest),
            peak_rss_bytes=memory.peak,
            anonymous_bytes=memory.anonymous,
            step_seconds=progress.step_seconds,
            cpu_seconds=time.process_time(),
            sent_bytes=progress.sent_bytes,
            received_bytes=progress.received_bytes,
            cache_written_bytes=written,
        )
