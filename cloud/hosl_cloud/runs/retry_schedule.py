"""When devices that found no run should ask again, so that a large fleet does not come back all at once.

Used on the event loop alone, by the devices' routes; the HTTP API shows the count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

SHORTEST_S, LONGEST_S = 15, 600
RATE = 50
"""Most devices that should return in a second."""
SPREAD = 1.25
"""A device adds up to a quarter to its pause, so that not all come at once."""


class RetrySchedule:
    """The devices that wait for a run, and when each should be back."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._due: dict[str, float] = {}
        """When each device should be back, at the latest."""
        self._pruned_at = -math.inf

    def add(self, device: str) -> int:
        """Note a device that found no run; the seconds after which it should ask again."""
        self._due[device] = math.inf  # it counts among those that its own pause is reckoned from
        pause_s = self._pause_s()
        self._due[device] = self._now() + SPREAD * pause_s + 1.0
        return pause_s

    def remove(self, device: str) -> None:
        """Forget a device that has found a run."""
        self._due.pop(device, None)

    def count(self) -> int:
        """Count those that wait for a run; one that did not come back in time has given up."""
        if (now := self._now()) - self._pruned_at >= 1.0:
            self._due = {device: due for device, due in self._due.items() if due >= now}
            self._pruned_at = now
        return len(self._due)

    def within_s(self) -> int:
        """Seconds in which all of them will have asked again."""
        return math.ceil(SPREAD * self._pause_s())

    def _pause_s(self) -> int:
        return min(max(SHORTEST_S, math.ceil(self.count() / RATE)), LONGEST_S)
