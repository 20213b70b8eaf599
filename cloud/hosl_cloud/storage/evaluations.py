"""Evaluations as people and programs are told of them: over HTTP, by the commands, and in a simulation's summary.

The structs are the HTTP API's answers, so their field names stay. The functions ask the store, off the event loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from hosl_cloud.storage.class_counts import ClassCounts
from hosl_cloud.storage.records import Evaluation, RunRow, perplexity
from hosl_cloud.storage.store import Store


class ClassFigures(msgspec.Struct, frozen=True, kw_only=True):
    """How the examples of one class fared in an evaluation."""

    name: str
    """As the task's `labels` have it."""
    examples: int
    """Of the class, among those that were scored."""
    predicted: int
    """Examples that were given the class, rightly or not."""
    right: int
    """Examples of the class that were given it."""
    accuracy: float | None
    """right / examples, which is the recall; null without examples."""
    precision: float | None
    """right / predicted; null where the class was never predicted."""
    f1: float | None
    """2 right / (examples + predicted); null without either."""


class EvaluationFigures(msgspec.Struct, frozen=True, kw_only=True):
    """An evaluation after a round."""

    round: int
    loss: float
    accuracy: float
    """right / scored."""
    right: int
    """Right predictions."""
    scored: int
    """All predictions: one for each example, or for each token of `lm` but a text's first."""
    correct: int
    """The same as `right`, by its former name."""
    examples: int
    """Scored held-out examples: of devices that sent all they have."""
    of_examples: int
    """Held-out examples of all devices of the run, those that are away too."""
    perplexity: float | None
    """Of a language model: e to the mean loss of a token."""
    macro_f1: float | None
    """Of a task with classes: the mean of the classes' F1, without those that have none."""


class EvaluationDetail(EvaluationFigures, frozen=True, kw_only=True):
    """An evaluation after a round, class by class."""

    classes: list[ClassFigures]
    """In the order of the task's labels; empty where the task has none or more than 1,000, and of an older version."""
    confusion: list[list[int]] | None
    """Examples by true class (row) and predicted class (column); null without `classes`, and with more than 100."""


def _task_of(row: RunRow) -> dict[str, Any]:
    """The run's task, as stored: of settings that another version wrote nothing is sure but that they are a table."""
    task = row.settings.data.get("task")
    return task if isinstance(task, dict) else {}


def list_evaluations(store: Store, run: str, after: int = 0, newest: int = -1) -> list[EvaluationFigures]:
    """Read the evaluations in force of round `after` and later ones, in order; of the `newest`, below zero of all.

    Raises RunNotFound.
    """
    kind = _task_of(store.run(run)).get("kind", "")
    found = store.evaluations(run, newest)
    return [EvaluationFigures(**_figures(each, kind)) for each in found if each.round >= after]


def show_evaluation(store: Store, run: str, round_: int | None = None) -> EvaluationDetail | None:
    """Read the evaluation in force of a round, or the last, class by class; None where there is none.

    Raises RunNotFound.
    """
    task = _task_of(store.run(run))
    if round_ is None:
        round_ = next((each.round for each in store.evaluations(run, 1)), -1)
    found = store.evaluation(run, round_)
    return None if found is None else describe_evaluation(found, task.get("kind", ""), task.get("labels", ()))


def describe_evaluation(evaluation: Evaluation, kind: str, labels: Sequence[str]) -> EvaluationDetail:
    """Work out the figures of an evaluation, class by class, of a task of that kind and with these labels."""
    counts, matrix = evaluation.by_class, None if evaluation.by_class is None else evaluation.by_class.confusion_KK
    return EvaluationDetail(
        **_figures(evaluation, kind),
        classes=[] if counts is None else _describe_classes(counts, labels),
        confusion=None if matrix is None else matrix.tolist(),
    )


def _describe_classes(counts: ClassCounts, labels: Sequence[str]) -> list[ClassFigures]:
    recall_K, precision_K, f1_K = counts.recall_K, counts.precision_K, counts.f1_K
    return [
        ClassFigures(
            name=name,
            examples=int(counts.examples_K[k]),
            predicted=int(counts.predicted_K[k]),
            right=int(counts.right_K[k]),
            accuracy=_known(recall_K[k]),
            precision=_known(precision_K[k]),
            f1=_known(f1_K[k]),
        )
        for k, name in enumerate(labels)
    ]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _figures(evaluation: Evaluation, kind: str) -> dict[str, Any]:
    return {
        "round": evaluation.round,
        "loss": evaluation.loss,
        "accuracy": evaluation.accuracy,
        "right": evaluation.correct,
        "scored": evaluation.scored,
        "correct": evaluation.correct,
        "examples": evaluation.examples,
        "of_examples": evaluation.of_examples,
        "perplexity": perplexity(evaluation.loss, kind),
        "macro_f1": evaluation.macro_f1,
    }
