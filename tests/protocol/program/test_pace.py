"""How fast rounds are, and how long the rest takes."""

from __future__ import annotations

import pytest

from hosl_protocol.program.pace import REMEMBERED, STALLED_ROUNDS, STALLED_S, Pace, duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(pace: Pace, clock: Clock, rounds: range, seconds: float) -> None:
    for round_ in rounds:
        clock.now += seconds
        pace.note(round_)


def test_the_time_left_is_that_of_the_rounds_left() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert (pace.round_s, pace.left(100)) == (None, "")
    run(pace, clock, range(1, 2), 2.0)
    assert pace.left(100) == "", "one round tells nothing of the next"
    run(pace, clock, range(2, 11), 2.0)
    assert (pace.round_s, pace.left(100)) == (2.0, "3 min 0 s left")
    clock.now += 5.0
    assert pace.left(100) == "2 min 55 s left"
    pace.note(10)  # of an evaluation after it
    assert pace.left(100) == "2 min 55 s left"


def test_the_pace_is_that_of_the_newest_rounds() -> None:
    clock = Clock()
    pace = Pace(clock)
    run(pace, clock, range(1, 100), 9.0)
    run(pace, clock, range(100, 100 + REMEMBERED), 1.0)
    assert pace.round_s == 1.0


def test_where_no_round_ends_nothing_is_said_of_the_time_left_and_the_wait_does_not_count() -> None:
    clock = Clock()
    pace = Pace(clock)
    run(pace, clock, range(1, 11), 1.0)
    clock.now += STALLED_ROUNDS + STALLED_S + 1.0
    assert pace.left(100) == ""
    run(pace, clock, range(11, 13), 1.0)
    assert pace.round_s == 1.0


def test_rounds_that_are_taken_back_begin_a_new_pace() -> None:
    clock = Clock()
    pace = Pace(clock)
    run(pace, clock, range(1, 11), 1.0)
    run(pace, clock, range(5, 7), 3.0)
    assert pace.round_s == 3.0
    pace.forget()
    assert pace.round_s is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (270000, "3 d 3 h")],
)
def test_a_duration_has_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text
