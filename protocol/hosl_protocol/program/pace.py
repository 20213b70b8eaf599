"""How fast a run's rounds are, and so how long the rest of them will take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

REMEMBERED = 50
"""Rounds that the pace is measured over."""


class Pace:
    """The pace of the newest rounds, with what lies between them: evaluations and checkpoints, too, but no waits."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._ends: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)
        """Rounds, and when each was over."""

    def note(self, round_: int) -> None:
        """Note that a round is over."""
        if self._ends and round_ <= self._ends[-1][0]:
            self._ends.clear()  # rounds were taken back
        self._ends.append((round_, self._now()))

    def forget(self) -> None:
        """Begin anew after a wait, which tells nothing of the rounds."""
        self._ends.clear()

    @property
    def round_s(self) -> float | None:
        """Seconds from round to round; None before two of them are over."""
        if len(self._ends) < 2:
            return None
        (first, began), (last, ended) = self._ends[0], self._ends[-1]
        return (ended - began) / (last - first)

    def left(self, rounds: int) -> str:
        """Say how long a run of so many rounds goes on; empty where that is not known."""
        if self.round_s is None:
            return ""
        round_, ended = self._ends[-1]
        return f"{duration(max((rounds - round_) * self.round_s - (self._now() - ended), 0.0))} left"


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"
