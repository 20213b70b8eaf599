"""How the device feels: its temperature, whether it is throttled, how much memory is left; and what follows from it.

`HealthMonitor` lives on the event loop: one task watches the memory, and a session asks it to pause before each round.
psutil says how much memory the machine has left. The rest is read from /proc and sysfs by hand, since psutil knows
neither control groups' limits nor throttling, and counts disks and radios among the temperatures.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from hosl_edge.exceptions import LowMemoryError
from hosl_edge.host.display import Display, Progress
from hosl_edge.model.memory import release_unused
from hosl_edge.settings import EdgeSettings

WATCH_INTERVAL_S = 2.0
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0

ROOT = Path("/")
THROTTLES = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
"""Bits 0 to 3 of the Raspberry Pi's get_throttled: what holds now."""
_FIRMWARE = "sys/devices/platform/soc*/soc*:firmware/get_throttled"
_FIXED_ZONES = ("PMIC-Die",)
"""A Jetson's zone that reads 100 °C below 120: https://forums.developer.nvidia.com/t/121300/8"""


@dataclass(frozen=True)
class Health:
    """One reading of the hardware."""

    temperature_c: float | None
    """Degrees Celsius of the hottest zone; None where there is no sensor."""
    throttled: tuple[str, ...]
    """What the hardware says that it suffers from, of THROTTLES."""


def read_health(root: Path = ROOT) -> Health:
    """Read temperatures and throttling from sysfs below `root`."""
    return Health(max(_temperatures(root), default=None), tuple(dict.fromkeys(_throttles(root))))


def read_available(root: Path = ROOT) -> int:
    """Count the bytes that can be taken without swapping, within the control groups around this process."""
    return min([int(psutil.virtual_memory().available), *_control_groups(root)])


def _temperatures(root: Path) -> Iterator[float]:
    for zone in root.glob("sys/class/thermal/thermal_zone*"):
        text = _read(zone / "temp")
        if text.lstrip("-").isdigit() and _read(zone / "type") not in _FIXED_ZONES:
            yield int(text) / 1000.0


def _throttles(root: Path) -> Iterator[str]:
    for path in root.glob(_FIRMWARE):
        bits = int(_read(path) or "0", 16)
        yield from (name for bit, name in enumerate(THROTTLES) if bits >> bit & 1)
    for monitor in root.glob("sys/class/hwmon/hwmon*"):
        if _read(monitor / "name") == "rpi_volt" and _read(monitor / "in0_lcrit_alarm") == "1":
            yield THROTTLES[0]


def _control_groups(root: Path) -> Iterator[int]:
    """What each limited group (version 2) around this process has left; its cached files can be dropped."""
    # A limit counts everything below it, so that those above the process's own group count, too.
    top = root / "sys/fs/cgroup"
    own = _read(root / "proc/self/cgroup").rpartition("0::/")[2]
    for group in (top / own, *(top / own).parents):
        limit = _read(group / "memory.max")
        if limit.isdigit():
            figures = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            cached = int(figures.get("inactive_file", 0)) + int(figures.get("active_file", 0))
            yield int(limit) - int(_read(group / "memory.current") or 0) + cached
        if group == top:
            return


def _read(path: Path) -> str:
    """A small file's text; empty where it cannot be read, as some sensors at times."""
    try:
        return path.read_text(encoding="ascii").strip("\n\0 ")
    except (OSError, UnicodeDecodeError):
        return ""


@dataclass
class HealthMonitor:
    """Slows the agent down where the device is hot or throttled, and stops it where memory runs out."""

    settings: EdgeSettings
    display: Display
    read_health: Callable[[], Health] = read_health
    read_available: Callable[[], int] = read_available
    _complaint: str = ""

    async def cool_down(self, progress: Progress, deadline_s: float) -> None:
        """Pause a hot device before a round: about as long as the last took, a quarter of the deadline at most."""
        complaint = self._complaint_of(self.read_health())

        # Said once, not before each of some hundred rounds.
        if complaint and not self._complaint:
            self.display.say(f"{complaint}: pauses before each round until that has passed", matters=True)
        self._complaint = complaint

        if complaint:
            progress.state = f"paused: {complaint}"
            pause_s = min(max(progress.step_seconds, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)
            await asyncio.sleep(min(pause_s, deadline_s / 4) if deadline_s else pause_s)
            progress.state = "training"

    def _complaint_of(self, health: Health) -> str:
        highest = self.settings.max_temperature_c
        if highest is not None and health.temperature_c is not None and health.temperature_c > highest:
            return f"{health.temperature_c:.0f} °C, above max_temperature_c = {highest:g}"
        return ", ".join(health.throttled)

    @contextlib.asynccontextmanager
    async def stopping_at_low_memory(self) -> AsyncIterator[None]:
        """Watch the memory while a task is within; where it runs out, cancel the task. Raises LowMemoryError then."""
        watched = asyncio.current_task()
        assert watched is not None
        # Its end, but for a cancellation of ours, ends what is within: there is an await everywhere, and it tidies up.
        watching = asyncio.create_task(self.watch_memory())
        watching.add_done_callback(lambda task: None if task.cancelled() else watched.cancel())

        try:
            yield
        except asyncio.CancelledError:
            if watching.done():
                watching.result()  # raises what ended it; else somebody else has cancelled the task
            raise
        finally:
            watching.cancel()

    async def watch_memory(self) -> None:
        """Look at the memory every WATCH_INTERVAL_S, for ever. Raises LowMemoryError."""
        lowest = self.settings.min_available_bytes
        while True:
            if self.read_available() < lowest:
                release_unused()
                if (available := self.read_available()) < lowest:
                    raise LowMemoryError(available, lowest)
            await asyncio.sleep(WATCH_INTERVAL_S)
