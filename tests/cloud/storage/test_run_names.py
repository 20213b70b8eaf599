"""A run is found by its id, by a beginning that it alone has, and as the latest; never by one that two have."""

from __future__ import annotations

import pytest

from hosl_cloud.exceptions import AmbiguousRun, RunNotFound
from hosl_cloud.storage.run_names import find_run_id, short_name

IDS = ["tickets-20261130-081500", "tickets-20261130-084018", "run-20261130-090000", "run-20261130-090000-2"]


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("tickets-20261130-081500", IDS[0]),
        ("tickets-20261130-0840", IDS[1]),
        ("run-20261130-090000", IDS[2]),
        ("run-20261130-090000-", IDS[3]),
        ("latest", IDS[3]),
    ],
)
def test_a_name_that_means_one_run_finds_it(name: str, run: str) -> None:
    assert find_run_id(name, IDS) == run


def test_a_beginning_of_two_runs_names_both() -> None:
    with pytest.raises(AmbiguousRun, match=f"'tickets' is the beginning of 2 runs: {IDS[0]}, {IDS[1]}; give more"):
        find_run_id("tickets", IDS)


@pytest.mark.parametrize(("name", "ids"), [("other", IDS), ("", IDS), ("latest", [])])
def test_a_name_of_no_run_is_refused(name: str, ids: list[str]) -> None:
    with pytest.raises(RunNotFound):
        find_run_id(name, ids)


def test_the_id_of_a_deleted_run_is_not_the_beginning_of_another() -> None:
    with pytest.raises(RunNotFound):
        find_run_id("run-20261130-090000", ["run-20261130-090000-2"])


def test_every_short_name_finds_its_run() -> None:
    assert [short_name(run, IDS) for run in IDS] == IDS
    assert short_name(IDS[0], IDS[:1]) == "tickets"
    assert short_name(IDS[1], [*IDS[1:], "tickets-20261129-230000"]) == "tickets-20261130"
    assert short_name("latest-20261130-1", ["latest-20261130-1"]) == "latest-20261130", "latest means another run"
