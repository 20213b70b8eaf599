"""Evaluations as they are told of: from the counts to the figures that people and programs see."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hosl_cloud.commands.offline import DataFolder
from hosl_cloud.exceptions import RunNotFound
from hosl_cloud.sentences import evaluation_lines
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.class_counts import ClassCounts
from hosl_cloud.storage.evaluations import EvaluationFigures, list_evaluations, show_evaluation
from hosl_cloud.storage.records import Evaluation
from hosl_cloud.storage.store import Store
from hosl_protocol.run.tasks import Task

TEXT = Task(name="text", kind="lm", template="{text}")
NAMES = ("billing", "delivery", "returns", "spam")
TICKETS = Task(name="tickets", kind="sequence-classification", template="{text}", labels=NAMES)
PAIRS = ((0, 0), (0, 0), (0, 1), (1, 1), (1, 2), (2, 2))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "hosl.sqlite")
    for task in (TEXT, TICKETS):
        store.create_run(task.name, tmp_path, "5" * 64, RunConfig(name=task.name, rounds=9, max_length=8, task=task))
    yield store
    store.close()


def evaluation(round_: int, pairs: Sequence[tuple[int, int]], classes: int = len(NAMES)) -> Evaluation:
    labels, predicted = np.array(pairs).T
    by_class = ClassCounts.count(labels, predicted, classes)
    right = sum(label == said for label, said in pairs)
    return Evaluation(round_, 0.5, right, len(pairs), len(pairs), 8, "", by_class.macro_f1, by_class)


def test_an_evaluation_is_told_class_by_class_and_a_list_of_them_without(store: Store) -> None:
    store.add_evaluation("tickets", 0, evaluation(0, [(1, 0)]))
    store.add_evaluation("tickets", 0, evaluation(5, PAIRS))
    shown = show_evaluation(store, "tickets")
    assert shown is not None
    assert shown == show_evaluation(store, "tickets", 5)
    assert (shown.round, shown.right, shown.scored, shown.correct) == (5, 4, 6, 4)
    assert (shown.examples, shown.of_examples, shown.perplexity) == (6, 8, None)
    assert shown.accuracy == pytest.approx(2 / 3)
    assert shown.macro_f1 == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
    assert shown.confusion == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert [each.name for each in shown.classes] == list(NAMES)
    assert [(each.examples, each.predicted, each.right) for each in shown.classes] == [
        (3, 2, 2),
        (2, 2, 1),
        (1, 2, 1),
        (0, 0, 0),
    ]
    spam = shown.classes[-1]
    assert (spam.accuracy, spam.precision, spam.f1) == (None, None, None)
    first, last = list_evaluations(store, "tickets")
    assert (type(first), first.round, last.round) == (EvaluationFigures, 0, 5)
    assert last.macro_f1 == shown.macro_f1
    assert [each.round for each in list_evaluations(store, "tickets", after=5)] == [5]
    assert [each.round for each in list_evaluations(store, "tickets", newest=1)] == [5]


def test_the_data_folder_tells_the_same_where_no_service_runs(store: Store, tmp_path: Path) -> None:
    store.add_evaluation("tickets", 0, evaluation(5, PAIRS))
    with DataFolder(tmp_path) as folder:
        shown = folder.run("tickets")
    assert shown["evaluation"] == json.loads(msgspec.json.encode(show_evaluation(store, "tickets")))
    assert (shown["right"], shown["scored"], shown["macro_f1"]) == (4, 6, shown["evaluation"]["macro_f1"])


def test_text_has_a_perplexity_and_no_classes(store: Store) -> None:
    store.add_evaluation("text", 0, Evaluation(3, math.log(50), 226, 3696, 200, 200))
    shown = show_evaluation(store, "text")
    assert shown is not None
    assert shown.perplexity == pytest.approx(50)
    assert (shown.classes, shown.confusion, shown.macro_f1) == ([], None, None)
    store.add_evaluation("text", 0, Evaluation(4, 1e6, 0, 3696, 200, 200))
    assert json.loads(msgspec.json.encode(show_evaluation(store, "text")))["perplexity"] is None


def test_who_asks_for_what_is_not_there_hears_so(store: Store) -> None:
    assert show_evaluation(store, "text") is None
    assert show_evaluation(store, "text", 7) is None
    assert list_evaluations(store, "text") == []
    with pytest.raises(RunNotFound):
        show_evaluation(store, "tickets-2")


def lines(store: Store, run: str) -> list[str]:
    """As the commands say it, by way of the API's JSON."""
    return list(evaluation_lines(json.loads(msgspec.json.encode(show_evaluation(store, run)))))


def test_people_are_shown_a_table_of_the_classes(store: Store) -> None:
    store.add_evaluation("tickets", 0, evaluation(5, PAIRS))
    assert lines(store, "tickets") == [
        "evaluation at round 5: accuracy 66.7 % (4 of 6 right, only 6 of 8 examples scored), loss 0.5000, "
        "macro F1 0.656",
        "class     examples  accuracy  precision     F1  most often taken for",
        "billing          3    66.7 %    100.0 %  0.800  delivery (1)",
        "delivery         2    50.0 %     50.0 %  0.500  returns (1)",
        "returns          1   100.0 %     50.0 %  0.667",
        "spam             0         -          -      -",
    ]
    store.add_evaluation("text", 0, Evaluation(3, math.log(50), 226, 3696, 200, 200))
    assert lines(store, "text") == [
        "evaluation at round 3: accuracy 6.1 % (226 of 3696 right, 200 of 200 examples scored), loss 3.9120, "
        "perplexity 50"
    ]


def test_a_task_of_many_classes_has_their_figures_without_a_matrix(store: Store, tmp_path: Path) -> None:
    many = msgspec.structs.replace(TICKETS, name="many", labels=tuple(map(str, range(150))))
    store.create_run("many", tmp_path, "5" * 64, RunConfig(name="many", rounds=9, max_length=8, task=many))
    store.add_evaluation("many", 0, evaluation(1, [(k, k % 149) for k in range(150)], 150))
    shown = show_evaluation(store, "many")
    assert shown is not None
    assert shown.confusion is None
    assert [each.accuracy for each in shown.classes] == [1.0] * 149 + [0.0]
    assert shown.classes[0].precision == 0.5
    assert lines(store, "many")[-1] == "149           1     0.0 %          -  0.000"
