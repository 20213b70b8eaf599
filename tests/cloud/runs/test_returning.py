"""Devices that wait for a run: how soon each should ask again."""

from __future__ import annotations

from hosl_cloud.runs.returning import Returning


def test_the_pause_grows_so_that_fifty_devices_return_in_a_second() -> None:
    returning = Returning(lambda: 0.0)
    pauses = [returning.ask(f"pi-{n}") for n in range(40_000)]
    assert (pauses[0], pauses[749], pauses[1999], pauses[-1]) == (15, 15, 40, 600)
    assert returning.count() == 40_000


def test_one_that_found_a_run_or_stayed_away_is_not_counted() -> None:
    now = 0.0
    returning = Returning(lambda: now)
    for name in ("a", "b", "a", "c"):
        returning.ask(name)
    assert (returning.count(), returning.within_s()) == (3, 19)
    returning.arrive("b")
    now = 10.0
    returning.ask("c")
    now = 25.0
    assert returning.count() == 1, "a is not back"
