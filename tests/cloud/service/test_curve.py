"""A run's course, thinned: what a chart is given of however many rounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hosl_cloud.service.curve_api import MOST_POINTS, points_width, read_curve
from hosl_cloud.settings import convert_config
from hosl_cloud.storage.records import Evaluation
from hosl_cloud.storage.store import Store
from hosl_protocol.weights.estimates import UpdateRecord

TASK = {"name": "text", "kind": "lm", "template": "{text}"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "hosl.sqlite")
    store._database.execute("PRAGMA synchronous = OFF")
    store.create_run("run", tmp_path, "0" * 64, convert_config({"task": TASK}, "run.toml"))
    return store


def add_rounds(store: Store, first: int, last: int) -> None:
    for round_ in range(first, last + 1):
        update = UpdateRecord(round_, np.zeros(1, np.float32), 0.0)
        store.add_round("run", 0, update, seconds=2.0, loss=float(round_), devices=["a"], wire_bytes=10)


def test_a_point_has_round_figures_of_rounds_and_few_enough_points_are_left() -> None:
    assert [points_width(rounds) for rounds in (0, 1, 800, 801, 1601, 4001, 8001, 15_000, 10**6)] == [
        *(1, 1, 1, 2, 5, 10, 20, 20, 2000),
    ]
    for rounds in range(1, 40_000, 37):
        assert rounds / points_width(rounds) <= MOST_POINTS


def test_points_tell_mean_lowest_and_highest_of_their_rounds(store: Store) -> None:
    add_rounds(store, 1, 1001)
    curve = read_curve(store, "run")
    assert (curve.width, len(curve.round)) == (2, 501)
    assert curve.round[:2] + curve.round[-2:] == [2, 4, 1000, 1001]
    assert (curve.loss[0], curve.low[0], curve.high[0]) == (1.5, 1.0, 2.0)
    assert (curve.loss[-1], curve.seconds[-1], curve.wire_bytes[-1]) == (1001.0, 2.0, 10.0)
    store.close()


def test_what_comes_after_the_last_whole_point_makes_the_same_course(store: Store) -> None:
    add_rounds(store, 1, 1001)
    before = read_curve(store, "run")
    add_rounds(store, 1002, 1005)
    more = read_curve(store, "run", after=1000, width=2)
    assert more.round == [1002, 1004, 1005]
    assert before.round[:500] + more.round == read_curve(store, "run").round
    store.close()


def test_points_that_have_grown_come_all_again(store: Store) -> None:
    add_rounds(store, 1, 801)
    assert read_curve(store, "run", after=800, width=1).round[0] == 2
    store.close()


def test_evaluations_of_one_point_are_thinned_to_the_last_and_that_of_the_round_asked_for_comes(store: Store) -> None:
    add_rounds(store, 1, 1000)
    for round_ in (0, 1, 2, 500, 999, 1000):
        store.add_evaluation("run", 0, Evaluation(round_, 1.0, round_, 1000))
    curve = read_curve(store, "run")
    assert [(each.round, each.accuracy) for each in curve.evaluations] == [
        (0, 0.0),
        (2, 0.002),
        (500, 0.5),
        (1000, 1.0),
    ]
    assert [each.round for each in read_curve(store, "run", after=1000, width=2).evaluations] == [1000]
    store.close()


def test_rounds_that_were_dropped_are_in_no_point(store: Store) -> None:
    add_rounds(store, 1, 10)
    store.rewind_run("run", 6)
    assert read_curve(store, "run").round == [1, 2, 3, 4, 5, 6]
    store.close()
