"""Devices that wait for a run: how soon each should ask again."""

from __future__ import annotations

from hosl_cloud.runs.retry_schedule import RetrySchedule


def test_the_pause_grows_so_that_fifty_devices_return_in_a_second() -> None:
    schedule = RetrySchedule(lambda: 0.0)
    pauses = [schedule.add(f"pi-{n}") for n in range(40_000)]
    assert (pauses[0], pauses[749], pauses[1999], pauses[-1]) == (15, 15, 40, 600)
    assert schedule.count() == 40_000


def test_one_that_found_a_run_or_stayed_away_is_not_counted() -> None:
    now = 0.0
    schedule = RetrySchedule(lambda: now)
    for name in ("a", "b", "a", "c"):
        schedule.add(name)
    assert (schedule.count(), schedule.within_s()) == (3, 19)
    schedule.remove("b")
    now = 10.0
    schedule.add("c")
    now = 25.0
    assert schedule.count() == 1, "a is not back"
