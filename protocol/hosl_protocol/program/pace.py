"""How fast a run's rounds are, and so how long the rest of them will take."""

from __future__ import annotations

import time
from collections.abc import Callable

REMEMBERED = 50
"""Rounds that the pace is measured over."""
STALLED_ROUNDS, STALLED_S = 20, 30.0
"""What takes longer than so many rounds, and so many seconds, is a wait, and tells nothing of the rounds."""


class Pace:
    """The pace of the newest rounds, with what lies between them: evaluations and checkpoints, too, but no waits.

    One thread notes rounds; any may ask.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._ends: tuple[tuple[int, float], ...] = ()
        """Rounds, and when each was over; replaced as a whole, so that who asks sees one state of it."""

    def note(self, round_: int) -> None:
        """Note that a round is over."""
        if self._ends and round_ == self._ends[-1][0]:
            return
        was_taken_back = bool(self._ends) and round_ < self._ends[-1][0]
        kept = () if was_taken_back or _is_stalled(self._ends, self._now()) else self._ends[1 - REMEMBERED :]
        self._ends = (*kept, (round_, self._now()))

    def forget(self) -> None:
        """Begin anew: whoever calls it knows of a wait."""
        self._ends = ()

    @property
    def round_s(self) -> float | None:
        """Seconds from round to round; None before two of them are over."""
        return _round_s(self._ends)

    def left(self, rounds: int) -> str:
        """Say how long a run of so many rounds goes on; empty where that is not known, and where no round ends."""
        ends, now = self._ends, self._now()
        if (round_s := _round_s(ends)) is None or _is_stalled(ends, now):
            return ""
        round_, ended = ends[-1]
        return f"{duration(max((rounds - round_) * round_s - (now - ended), 0.0))} left"


def _round_s(ends: tuple[tuple[int, float], ...]) -> float | None:
    if len(ends) < 2:
        return None
    (first, began), (last, ended) = ends[0], ends[-1]
    return (ended - began) / (last - first)


def _is_stalled(ends: tuple[tuple[int, float], ...], now: float) -> bool:
    """Whether so much time has gone by since the last round that something else than rounds is under way."""
    round_s = _round_s(ends)
    return round_s is not None and now - ends[-1][1] > STALLED_ROUNDS * round_s + STALLED_S


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"
