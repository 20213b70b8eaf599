"""Recall, precision, F1 and the confusion matrix, against their definitions."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_cloud.storage.class_counts import MOST_CLASSES, MOST_IN_MATRIX, ClassCounts

NAN = float("nan")


def counts(pairs: list[tuple[int, int]], classes: int) -> ClassCounts:
    labels, predicted = np.array(pairs, np.int16).reshape(-1, 2).T
    return ClassCounts.count(labels, predicted, classes)


def test_the_figures_of_three_classes_are_those_computed_by_hand() -> None:
    found = counts([(0, 0), (0, 0), (0, 1), (1, 1), (1, 2), (2, 2)], 3)
    assert found.confusion_KK is not None
    assert found.confusion_KK.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert found.examples_K.tolist() == [3, 2, 1]
    assert found.predicted_K.tolist() == [2, 2, 2]
    assert found.recall_K.tolist() == pytest.approx([2 / 3, 1 / 2, 1])
    assert found.precision_K.tolist() == pytest.approx([1, 1 / 2, 1 / 2])
    assert found.f1_K.tolist() == pytest.approx([4 / 5, 1 / 2, 2 / 3])
    assert found.macro_f1 == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)


def test_a_class_without_examples_or_predictions_has_no_figures_and_counts_only_where_it_has_an_f1() -> None:
    found = counts([(0, 0), (0, 2), (1, 0)], 4)
    assert found.recall_K.tolist() == pytest.approx([1 / 2, 0, NAN, NAN], nan_ok=True)
    assert found.precision_K.tolist() == pytest.approx([1 / 2, NAN, 0, NAN], nan_ok=True)
    assert found.f1_K.tolist() == pytest.approx([1 / 2, 0, 0, NAN], nan_ok=True)
    assert found.macro_f1 == pytest.approx((1 / 2 + 0 + 0) / 3)


pairs_of = st.integers(2, MOST_IN_MATRIX + 40).flatmap(
    lambda classes: st.tuples(
        st.just(classes),
        st.lists(st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1, max_size=60),
    )
)


@given(pairs_of)
def test_the_figures_follow_their_definitions_with_and_without_a_matrix(drawn: Any) -> None:
    classes, pairs = drawn
    found = counts(pairs, classes)
    assert (found.confusion_KK is not None) == (classes <= MOST_IN_MATRIX)
    for k in {k for pair in pairs for k in pair}:
        true = [predicted for label, predicted in pairs if label == k]
        said = [label for label, predicted in pairs if predicted == k]
        recall = true.count(k) / len(true) if true else NAN
        precision = said.count(k) / len(said) if said else NAN
        assert found.recall_K[k] == pytest.approx(recall, nan_ok=True)
        assert found.precision_K[k] == pytest.approx(precision, nan_ok=True)
        f1 = 0.0 if not true.count(k) else 2 * recall * precision / (recall + precision)
        assert found.f1_K[k] == pytest.approx(f1)
    assert (int(found.examples_K.sum()), int(found.predicted_K.sum())) == (len(pairs), len(pairs))


@pytest.mark.parametrize("classes", [2, 3, MOST_IN_MATRIX, MOST_IN_MATRIX + 1, MOST_CLASSES])
def test_counts_are_small_when_stored_and_come_back_the_same(classes: int) -> None:
    draw = np.random.default_rng(classes)
    labels, predicted = draw.integers(0, classes, (2, 5000))
    found = ClassCounts.count(labels, predicted, classes)
    data = found.encode()
    assert len(data) < 8192
    again = ClassCounts.decode(data)
    for name in ("right_K", "predicted_K", "examples_K", "confusion_KK"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))


@pytest.mark.parametrize(
    "data", [b"", b"counts", zlib.compress(b"counts"), zlib.compress(b"\x93\x02\xc4\x00\xc4\x04abcd")]
)
def test_what_is_no_counts_is_not_read(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        ClassCounts.decode(data)
