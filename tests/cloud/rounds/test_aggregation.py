"""Averages over devices: what they come to, and what a device that lies can do to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_cloud.rounds.aggregation import aggregate, average_rows
from hosl_cloud.settings import Aggregation

KINDS: list[Aggregation] = ["mean", "trimmed-mean", "median"]
numbers = st.floats(-1e6, 1e6)


def combine(
    values: dict[str, list[float]], kind: Aggregation, weights: dict[str, float] | None = None, **more: float
) -> list[float]:
    weights = weights or dict.fromkeys(values, 1.0)
    return aggregate({name: np.array(row) for name, row in values.items()}, weights, kind, **more).tolist()


def test_the_mean_is_weighted() -> None:
    assert combine({"a": [1.0, 0.0], "b": [4.0, 8.0]}, "mean", {"a": 1.0, "b": 3.0}) == [3.25, 6.0]


def test_a_trimmed_mean_drops_a_share_at_either_end() -> None:
    values = {name: [value] for name, value in zip("abcde", (-100.0, 1.0, 2.0, 6.0, 1e9), strict=True)}
    assert combine(values, "trimmed-mean", trim=0.2) == [3.0]
    assert combine(values, "trimmed-mean", trim=0.1) == combine(values, "mean"), "a tenth of five is no device"


def test_the_median_is_where_half_of_the_weight_is_reached() -> None:
    values = {"a": [1.0], "b": [2.0], "c": [10.0]}
    assert combine(values, "median") == [2.0]
    assert combine(values, "median", {"a": 1.0, "b": 1.0, "c": 5.0}) == [10.0]
    assert combine({"a": [1.0], "b": [4.0]}, "median") == [2.5]


def test_clipping_limits_a_number_to_so_many_medians() -> None:
    values = {"a": [1.0], "b": [-2.0], "c": [500.0]}
    assert combine(values, "mean", clip=3.0) == [pytest.approx((1.0 - 2.0 + 6.0) / 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_is_not_there_does_not_count(kind: Aggregation) -> None:
    values = {"a": [1.0, math.nan], "b": [3.0, math.nan], "c": [math.nan, math.nan]}
    assert combine(values, kind) == [2.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
@given(st.dictionaries(st.text("abcdef", min_size=1), st.tuples(numbers, numbers), min_size=1, max_size=9))
def test_the_order_of_devices_does_not_matter_to_a_bit(
    kind: Aggregation, values: dict[str, tuple[float, float]]
) -> None:
    rows = {name: list(row) for name, row in values.items()}
    weights = {name: 1.0 + len(name) for name in rows}
    backwards = dict(reversed(rows.items()))
    assert combine(rows, kind, weights, trim=0.2, clip=2.0) == combine(backwards, kind, weights, trim=0.2, clip=2.0)


@given(st.lists(numbers, min_size=3, max_size=20), st.floats(allow_nan=False, allow_infinity=False))
def test_one_liar_cannot_leave_the_range_of_the_others(honest: list[float], lie: float) -> None:
    values = {f"d{place}": [value] for place, value in enumerate(honest)} | {"liar": [lie]}
    for kind in ("trimmed-mean", "median"):
        assert min(honest) <= combine(values, kind, trim=0.26)[0] <= max(honest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_equal", [True, False])
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=9))
def test_rows_are_averaged_as_single_numbers_are(kind: Aggregation, is_equal: bool, rows: list[list[float]]) -> None:
    names = [f"d{place}" for place in range(len(rows))]
    weights = {name: 1.0 if is_equal else 1.0 + place % 3 for place, name in enumerate(names)}
    alone = combine(dict(zip(names, rows, strict=True)), kind, weights, trim=0.2)
    together = average_rows(np.array(rows, np.float32), np.array(list(weights.values())), kind, 0.2)
    assert together.tolist() == pytest.approx(alone, rel=1e-12, abs=1e-9)
