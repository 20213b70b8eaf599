"""A run's course for a chart, over HTTP: however many rounds there are, some hundred points.

A client keeps the points that it has, and asks for those after the last whole one. Where a run has grown so long that
its points are of more rounds, `width` of the answer tells so, and the answer has all of them.
"""

from __future__ import annotations

import asyncio
from itertools import cycle

import msgspec

from hosl_cloud.service.openapi import Call, Operation, Query
from hosl_cloud.storage.records import Evaluation
from hosl_cloud.storage.store import Store

MOST_POINTS = 800
"""As many as a wide screen can show apart."""
AFTER = Query("after", 0, 10**12, "Only points after this round, where they still have this width.")
WIDTH = Query("width", 0, 10**12, "How many rounds each point has that the client knows; 0: it knows none.")


class ScoredPoint(msgspec.Struct, frozen=True):
    """An evaluation, the last one within the rounds of a point."""

    round: int
    loss: float
    accuracy: float


class Curve(msgspec.Struct, frozen=True):
    """Columns of equal length, oldest first: one entry for each point."""

    width: int
    """Rounds of a point; the last one may have fewer."""
    round: list[int]
    """The last of the point."""
    loss: list[float]
    """Mean training loss of its rounds, and the lowest and the highest."""
    low: list[float]
    high: list[float]
    seconds: list[float]
    """Mean time of a round."""
    wire_bytes: list[float]
    """Mean bytes of a round, both ways."""
    evaluations: list[ScoredPoint]
    """Those after `after`, that round's own included."""


def curve_operations(store: Store) -> list[Operation]:
    """List the operation."""

    async def curve(call: Call) -> Curve:
        return await asyncio.to_thread(read_curve, store, call.path["run"], call.query["after"], call.query["width"])

    path = "/v1/runs/{run}/curve"
    return [Operation("GET", path, "A run's course, thinned for a chart.", curve, Curve, queries=(AFTER, WIDTH))]


def read_curve(store: Store, run: str, after: int = 0, width: int = 0) -> Curve:
    """Read a run's course. Slow, off the event loop. Raises RunNotFound."""
    now = points_width(store.run(run).round)
    if width != now:  # what the client has are points of another width
        after = 0

    points = store.curve(run, after, now)
    scored = [each for each in store.evaluations(run) if each.round >= after]
    return Curve(
        now,
        [point.round for point in points],
        [_short(point.loss) for point in points],
        [_short(point.low) for point in points],
        [_short(point.high) for point in points],
        [_short(point.seconds) for point in points],
        [_short(point.wire_bytes) for point in points],
        [ScoredPoint(each.round, _short(each.loss), _short(each.accuracy)) for each in _thin(scored, now)],
    )


def points_width(rounds: int) -> int:
    """Choose how many rounds a point has: 1, 2, 5, 10, 20 and so on."""
    width, steps = 1, cycle((2, 2.5, 2))  # 1, 2, 5, 10
    while rounds > width * MOST_POINTS:
        width = int(width * next(steps))
    return width


def _thin(evaluations: list[Evaluation], width: int) -> list[Evaluation]:
    """Keep the last evaluation within the rounds of each point."""
    return list({-(-each.round // width): each for each in evaluations}.values())


def _short(number: float) -> float:
    """Six digits: more than a screen can show, and a third of the bytes."""
    return float(f"{number:.6g}")
