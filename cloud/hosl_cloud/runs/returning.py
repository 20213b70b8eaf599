"""Devices that ask for a run while there is none: how many they are, and when each should ask again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

SHORTEST_S, LONGEST_S = 15, 600
RATE = 50
"""Most devices that should return in a second."""
SPREAD = 1.25
"""A device adds up to a quarter to its pause, so that not all come at once."""


class Returning:
    """Used on the event loop."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._due: dict[str, float] = {}
        """When each device should be back, at the latest."""
        self._pruned_at = -math.inf

    def ask(self, device: str) -> int:
        """Note a device that found no run; the seconds after which it should ask again."""
        self._due[device] = math.inf
        pause_s = self._pause_s()
        self._due[device] = self._now() + SPREAD * pause_s + 1.0
        return pause_s

    def arrive(self, device: str) -> None:
        """It has found one."""
        self._due.pop(device, None)

    def count(self) -> int:
        """How many wait for a run."""
        if (now := self._now()) - self._pruned_at >= 1.0:
            self._due = {device: due for device, due in self._due.items() if due >= now}
            self._pruned_at = now
        return len(self._due)

    def within_s(self) -> int:
        """Seconds in which all of them will have asked again."""
        return math.ceil(SPREAD * self._pause_s())

    def _pause_s(self) -> int:
        return min(max(SHORTEST_S, math.ceil(self.count() / RATE)), LONGEST_S)
