"""A round as the cloud sees it: who counts, with which weight, and what becomes of those who fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from hosl_cloud.exceptions import RoundSpoiltError
from hosl_cloud.rounds import algorithms as rounds
from hosl_cloud.rounds.anchors import RoundResult, make_update
from hosl_cloud.rounds.evaluation import evaluate
from hosl_cloud.rounds.exchange import Ask, Await, Fault, Tell
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.class_counts import ClassCounts
from hosl_cloud.storage.records import Evaluation
from hosl_protocol.run.settings import Algorithm, ClientOptimizer
from hosl_protocol.run.tasks import Task
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import (
    Anchor,
    CutGradient,
    EvalBatch,
    EvalResult,
    EvalStart,
    Late,
    Probe,
    ProbeLoss,
    Projections,
    Refusal,
    RoundStart,
)
from leading import LENGTHS, NAME, RATE, STEP, Answers, Cloud, drive, run


@pytest.fixture
def make_cloud(bundle: Any) -> Callable[..., Cloud]:
    return lambda *arguments, **more: Cloud(bundle, *arguments, **more)


def projections_of(values: dict[str, Sequence[float]]) -> dict[str, Frame]:
    return {
        device: Frame(Projections(**NAME, id=1), {"projections": np.array(row, np.float32)})
        for device, row in values.items()
    }


def ho_sfl(cloud: Cloud, values: dict[str, Sequence[float]], silent: str = "") -> tuple[RoundResult | None, list[Tell]]:
    """A round of HO-SFL in which `silent` devices send no Anchor, and only those in `values` send projections."""
    frames = projections_of(values)

    def answers(ask: Ask) -> Frame | None:
        if ask.kind is Anchor:
            return None if ask.device in silent else cloud.anchor(ask.device)
        assert ask.kind is Projections
        return frames.get(ask.device)

    return run(rounds.ho_sfl_round(cloud.context()), answers)


def expected(rows: Sequence[Sequence[float]], weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """-η v̄ / (P μ)."""
    return -RATE * np.average(np.array(rows), axis=0, weights=weights) / (2 * STEP)


def assert_tail_stepped_on(cloud: Cloud, plain: Cloud, devices: dict[str, float]) -> None:
    """The tail stands where plain steps on these devices' weighted gradients lead."""
    for device, weight in devices.items():
        plain.trainer.forward_backward(*plain.batches[device].sent, weight)
    plain.trainer.step(1, sum(devices.values()))
    for name, value in cloud.weights().items():
        assert torch.equal(value, plain.weights()[name]), name
    assert not cloud.has_gradient()


VALUES = {"a": [1.0, 2.0], "b": [3.0, -4.0], "c": [-5.0, 6.0]}


def test_estimates_are_averaged_over_all_devices(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("ho-sfl")
    outcome, told = ho_sfl(cloud, VALUES)
    assert outcome is not None
    assert outcome.update.coefficients == pytest.approx(expected(list(VALUES.values()), [1, 1, 1]))
    assert outcome.update.round == 1
    assert outcome.devices == ("a", "b", "c")
    assert [type(tell.message) for tell in told] == [RoundStart] * 3 + [CutGradient] * 3
    assert_tail_stepped_on(cloud, make_cloud("ho-sfl"), {"a": 1.0, "b": 1.0, "c": 1.0})


def test_every_device_gets_the_gradient_of_its_own_mean_loss(make_cloud: Callable[..., Cloud]) -> None:
    cloud, plain = make_cloud("ho-sfl", "examples"), make_cloud("ho-sfl")
    outcome, told = ho_sfl(cloud, VALUES)
    gradients = {tell.device: tell.tensors for tell in told if isinstance(tell.message, CutGradient)}
    losses = {}
    for device, tensors in gradients.items():
        own = plain.trainer.forward_backward(*plain.batches[device].sent)
        plain.trainer.discard()
        np.testing.assert_allclose(tensors["lambda"], own.cut_gradient_TD, rtol=1e-4, atol=1e-7)
        assert float(tensors["loss"]) == pytest.approx(own.loss)
        losses[device] = own.loss
    assert outcome is not None
    assert outcome.loss == pytest.approx(np.average([losses[d] for d in "abc"], weights=[2, 4, 3]))


def test_a_device_without_projections_is_left_out_of_the_average_but_not_of_the_tail(
    make_cloud: Callable[..., Cloud],
) -> None:
    cloud = make_cloud("ho-sfl")
    outcome, _ = ho_sfl(cloud, {"a": VALUES["a"], "c": VALUES["c"]})
    assert outcome is not None
    assert outcome.update.coefficients == pytest.approx(expected([VALUES["a"], VALUES["c"]], [1, 1]))
    assert outcome.devices == ("a", "b", "c")
    assert_tail_stepped_on(cloud, make_cloud("ho-sfl"), {"a": 1.0, "b": 1.0, "c": 1.0})


def test_a_device_without_an_anchor_takes_no_part_at_all(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("ho-sfl")
    outcome, told = ho_sfl(cloud, VALUES, silent="b")
    assert outcome is not None
    assert outcome.update.coefficients == pytest.approx(expected([VALUES["a"], VALUES["c"]], [1, 1]))
    assert outcome.devices == ("a", "c")
    assert not [tell for tell in told if tell.device == "b" and isinstance(tell.message, CutGradient)]
    assert_tail_stepped_on(cloud, make_cloud("ho-sfl"), {"a": 1.0, "c": 1.0})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -2e30])
def test_projections_that_are_not_finite_or_absurd_are_left_out(make_cloud: Callable[..., Cloud], bad: float) -> None:
    outcome, _ = ho_sfl(make_cloud("ho-sfl"), VALUES | {"a": [1.0, bad]})
    assert outcome is not None
    assert outcome.update.coefficients == pytest.approx(expected([VALUES["b"], VALUES["c"]], [1, 1]))


def test_without_any_projections_the_client_stands_still(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("ho-sfl")
    outcome, _ = ho_sfl(cloud, {})
    assert outcome is not None
    assert outcome.update.coefficients.tolist() == [0.0, 0.0]
    assert_tail_stepped_on(cloud, make_cloud("ho-sfl"), {"a": 1.0, "b": 1.0, "c": 1.0})


def test_devices_may_weigh_as_much_as_their_examples(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("ho-sfl", "examples")
    outcome, _ = ho_sfl(cloud, VALUES)
    assert outcome is not None
    assert outcome.update.coefficients == pytest.approx(expected(list(VALUES.values()), [2, 4, 3]))
    assert_tail_stepped_on(cloud, make_cloud("ho-sfl"), {"a": 2.0, "b": 4.0, "c": 3.0})


@pytest.mark.parametrize("algorithm", ["ho-sfl", "hosl", "frozen"])
def test_a_round_that_nobody_answers_changes_nothing(make_cloud: Callable[..., Cloud], algorithm: str) -> None:
    cloud = make_cloud(algorithm)
    before = cloud.weights()
    outcome, told = run(rounds.ROUNDS[algorithm](cloud.context()), lambda ask: None)
    assert outcome is None
    assert [type(tell.message) for tell in told] == [RoundStart] * 3
    assert not cloud.has_gradient()
    assert all(torch.equal(value, before[name]) for name, value in cloud.weights().items())


def test_frozen_steps_the_tail_and_has_no_coefficients(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("frozen")
    outcome, told = run(rounds.frozen_round(cloud.context()), lambda ask: cloud.anchor(ask.device))
    assert outcome.update.coefficients.shape == (0,)
    assert {type(tell.message) for tell in told} == {RoundStart}
    assert_tail_stepped_on(cloud, make_cloud("frozen"), {"a": 1.0, "b": 1.0, "c": 1.0})


def test_adamw_on_the_client_gets_the_estimate_and_the_rate(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("ho-sfl")
    client = ClientOptimizer(optimizer="adamw", learning_rate=RATE, schedule="linear", warmup_rounds=2)
    cloud.config = msgspec.structs.replace(cloud.config, client=client)
    outcome, _ = ho_sfl(cloud, VALUES)
    assert outcome is not None
    assert outcome.update.coefficients == pytest.approx(expected(list(VALUES.values()), [1, 1, 1]) / -RATE)
    assert outcome.update.learning_rate == RATE / 2


class Prober:
    """Devices of a HOSL round: each probe scales the clean activations by a factor of its own."""

    def __init__(self, cloud: Cloud, lacks: Sequence[tuple[str, int, int]] = (), spoilt: str = "") -> None:
        self.cloud, self.lacks, self.spoilt = cloud, lacks, spoilt
        self.asked: list[Ask] = []

    @staticmethod
    def factor(direction: int, sign: int) -> float:
        return 1.0 + sign * (0.2 + 0.3 * direction)

    def __call__(self, ask: Ask) -> Frame | None:
        self.asked.append(ask)
        if ask.kind is Anchor:
            return self.cloud.anchor(ask.device)
        assert ask.direction is not None
        assert ask.sign is not None
        if (ask.device, ask.direction, ask.sign) in self.lacks:
            return None
        scale = np.nan if ask.device in self.spoilt else self.factor(ask.direction, ask.sign)
        return Frame(Probe(**NAME, direction=ask.direction, sign=ask.sign), self.cloud.tensors(ask.device, scale))  # type: ignore[arg-type]

    def difference(self, device: str, direction: int) -> float:
        """loss⁺ − loss⁻ of a device, at the tail's first weights."""
        plus, minus = (
            self.cloud.trainer.evaluate(*self.cloud.tensors(device, self.factor(direction, sign)).values()).loss
            for sign in (+1, -1)
        )
        return plus - minus


def test_hosl_averages_differences_of_losses(make_cloud: Callable[..., Cloud]) -> None:
    cloud, plain = make_cloud("hosl", "examples"), Prober(make_cloud("hosl"))
    outcome, told = run(rounds.hosl_round(cloud.context()), Prober(cloud))
    means = [np.average([plain.difference(d, q) for d in "abc"], weights=[2, 4, 3]) for q in (0, 1)]
    assert outcome.update.coefficients == pytest.approx([-RATE * mean / (2 * STEP * 2) for mean in means], rel=1e-4)
    assert len([tell for tell in told if isinstance(tell.message, ProbeLoss)]) == 3 * 2 * 2
    assert_tail_stepped_on(cloud, make_cloud("hosl"), {"a": 2.0, "b": 4.0, "c": 3.0})


def test_a_direction_of_hosl_uses_only_devices_that_sent_both_signs(make_cloud: Callable[..., Cloud]) -> None:
    cloud, plain = make_cloud("hosl"), Prober(make_cloud("hosl"))
    prober = Prober(cloud, lacks=[("b", 1, -1)])
    outcome, _ = run(rounds.hosl_round(cloud.context()), prober)
    means = [np.mean([plain.difference(d, 0) for d in "abc"]), np.mean([plain.difference(d, 1) for d in "ac"])]
    assert outcome.update.coefficients == pytest.approx([-RATE * mean / (2 * STEP * 2) for mean in means], rel=1e-4)
    assert outcome.devices == ("a", "c")
    assert_tail_stepped_on(cloud, make_cloud("hosl"), {"a": 1.0, "c": 1.0})


def test_a_device_that_fell_silent_is_not_asked_again(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("hosl")
    prober = Prober(cloud, lacks=[("b", 0, +1)])
    run(rounds.hosl_round(cloud.context()), prober)
    assert len([ask for ask in prober.asked if ask.device == "b"]) == 1


def test_a_probe_whose_loss_is_not_finite_is_left_out_and_the_device_is_told(
    make_cloud: Callable[..., Cloud],
) -> None:
    cloud, plain = make_cloud("hosl"), Prober(make_cloud("hosl"))
    outcome, told = run(rounds.hosl_round(cloud.context()), Prober(cloud, spoilt="b"))
    means = [np.mean([plain.difference(d, q) for d in "ac"]) for q in (0, 1)]
    assert outcome.update.coefficients == pytest.approx([-RATE * mean / (2 * STEP * 2) for mean in means], rel=1e-4)
    losses = [tell.tensors["loss"] for tell in told if tell.device == "b" and isinstance(tell.message, ProbeLoss)]
    assert len(losses) == 4
    assert not np.isfinite(losses).any()


@pytest.fixture
def midpoint_cloud(make_cloud: Callable[..., Cloud]) -> Cloud:
    cloud = make_cloud("hosl")
    cloud.config = msgspec.structs.replace(cloud.config, anchor="midpoint")
    return cloud


def test_the_midpoint_of_hosl_needs_no_anchor_and_every_probe(midpoint_cloud: Cloud) -> None:
    prober = Prober(midpoint_cloud, lacks=[("b", 1, -1)], spoilt="c")
    outcome, _ = run(rounds.hosl_round(midpoint_cloud.context()), prober)
    assert {ask.kind for ask in prober.asked} == {Probe}
    assert outcome.devices == ("a",), "b lacks a probe, the mean of c is not finite"
    # Each pair's factors have the mean 1: the tail stepped on the clean activations of a.
    clean = midpoint_cloud.trainer.evaluate(*midpoint_cloud.tensors("a").values()).loss
    assert clean < outcome.loss, "the step went down the gradient"


def test_a_device_that_changes_its_batch_between_probes_is_refused(midpoint_cloud: Cloud) -> None:
    prober = Prober(midpoint_cloud)

    def answers(ask: Ask) -> Frame | None:
        frame = prober(ask)
        if frame is not None and (ask.device, ask.sign) == ("b", -1):
            labels = frame.tensors["labels"]
            return Frame(frame.message, {**frame.tensors, "labels": 1 - labels})
        return frame

    plain = [[prober.difference(device, q) for device in "ac"] for q in (0, 1)]
    outcome, told = run(rounds.hosl_round(midpoint_cloud.context()), answers)
    expected = [-RATE * np.mean(differences) / (2 * STEP * 2) for differences in plain]
    assert outcome.update.coefficients == pytest.approx(expected, rel=1e-4), "b's losses must not count"
    assert outcome.devices == ("a", "c")
    assert [tell.device for tell in told if isinstance(tell.message, Refusal)] == ["b"]


def broken(cloud: Cloud, device: str, how: str) -> dict[str, npt.NDArray[Any]]:
    """A batch that the codec lets pass and the tail cannot use."""
    tensors = cloud.tensors(device)
    if how == "not finite":
        tensors["activations"] = np.full_like(tensors["activations"], np.nan)
    elif how == "lengths":
        tensors["lengths"] = tensors["lengths"] + np.int32(1)
    else:
        tensors["labels"] = np.full_like(tensors["labels"], 2)
    return tensors


BROKEN = ["not finite", "lengths", "labels"]


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("algorithm", ["ho-sfl", "hosl", "frozen"])
def test_a_batch_that_cannot_be_used_is_left_out_of_the_round(
    make_cloud: Callable[..., Cloud], algorithm: str, how: str
) -> None:
    cloud = make_cloud(algorithm)
    frames = projections_of(VALUES)

    def answers(ask: Ask) -> Frame | None:
        if ask.kind is Projections:
            return frames[ask.device]
        tensors = broken(cloud, "b", how) if ask.device == "b" else cloud.tensors(ask.device)
        if ask.kind is Anchor:
            return Frame(Anchor(**NAME), tensors)
        return Frame(Probe(**NAME, direction=ask.direction or 0, sign=ask.sign or 1), tensors)  # type: ignore[arg-type]

    outcome, _ = run(rounds.ROUNDS[algorithm](cloud.context()), answers)
    assert outcome.devices == ("a", "c")
    assert np.isfinite(outcome.update.coefficients).all()
    assert_tail_stepped_on(cloud, make_cloud(algorithm), {"a": 1.0, "c": 1.0})


@pytest.mark.parametrize("how", ["lengths", "labels"])
@pytest.mark.parametrize("algorithm", ["ho-sfl", "hosl"])
def test_a_device_whose_batch_contradicts_itself_is_refused(
    make_cloud: Callable[..., Cloud], algorithm: str, how: str
) -> None:
    cloud = make_cloud(algorithm)
    message = Anchor(**NAME) if algorithm == "ho-sfl" else Probe(**NAME, direction=0, sign=1)
    outcome, told = run(
        rounds.ROUNDS[algorithm](cloud.context("b")), lambda ask: Frame(message, broken(cloud, "b", how))
    )
    assert outcome is None
    assert not cloud.has_gradient()
    assert [type(tell.message) for tell in told] == [RoundStart, Refusal]
    assert told[-1].message.code == "message"  # type: ignore[union-attr]


def test_a_tail_that_no_batch_gets_through_makes_no_step(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("ho-sfl")
    next(iter(cloud.trainer.parameters.values())).data.fill_(np.nan)
    outcome, _ = run(rounds.ho_sfl_round(cloud.context()), lambda ask: cloud.anchor(ask.device))
    assert outcome is None
    assert not cloud.has_gradient()


@pytest.mark.parametrize("spoilt", ["b", "c"])
def test_gradients_that_a_device_spoilt_take_only_those_before_it_along(
    make_cloud: Callable[..., Cloud], monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    cloud = make_cloud("ho-sfl")
    frames = projections_of(VALUES)
    compute = cloud.trainer.forward_backward

    def overflow(activations: npt.NDArray[np.float32], *rest: Any, **more: Any) -> Any:
        """No activations at hand have a finite loss and no finite gradient, so the trainer is made to say so."""
        result = compute(activations, *rest, **more)
        if len(activations) == sum(LENGTHS[spoilt]):
            cloud.trainer.discard()
            raise RoundSpoiltError("the gradient at the cut layer", np.nan)
        return result

    monkeypatch.setattr(cloud.trainer, "forward_backward", overflow)

    def answers(ask: Ask) -> Frame | None:
        if ask.kind is Projections:
            return frames[ask.device]
        return cloud.anchor(ask.device)

    outcome, told = run(rounds.ho_sfl_round(cloud.context()), answers)
    assert not [tell for tell in told if tell.device == spoilt and isinstance(tell.message, CutGradient)]
    if spoilt == "c":
        assert outcome is None
        assert not cloud.has_gradient()
    else:
        assert outcome.devices == ("c",)
        assert outcome.update.coefficients == pytest.approx(expected([VALUES["c"]], [1]))
        assert_tail_stepped_on(cloud, make_cloud("ho-sfl"), {"c": 1.0})


def test_what_is_computed_together_with_a_spoilt_gradient_leaves_none_behind(
    make_cloud: Callable[..., Cloud], monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = make_cloud("ho-sfl")
    compute = cloud.trainer.forward_backward

    def overflow(activations: npt.NDArray[np.float32], *rest: Any, **more: Any) -> Any:
        """The first device's gradient is spoilt; that of the second, in the same call, is added after it."""
        result = compute(activations, *rest, **more)
        if len(activations) == sum(LENGTHS["a"]):
            cloud.trainer.discard()
            raise RoundSpoiltError("the gradient at the cut layer", np.nan)
        return result

    monkeypatch.setattr(cloud.trainer, "forward_backward", overflow)
    monkeypatch.setattr(type(cloud.trainer), "at_once", 2)
    frames = projections_of(VALUES)

    def answers(ask: Ask) -> Frame | None:
        return frames[ask.device] if ask.kind is Projections else cloud.anchor(ask.device)

    outcome, _ = run(rounds.ho_sfl_round(cloud.context()), answers)
    assert outcome.devices == ("c",)
    assert_tail_stepped_on(cloud, make_cloud("ho-sfl"), {"c": 1.0})


EXAMPLES = {"a": 2, "b": 4, "c": 3}


class Evaluator:
    """Devices that send their held-out examples one by one."""

    def __init__(self, cloud: Cloud, silent_after: dict[str, int] | None = None, bad: str = "") -> None:
        self.cloud, self.silent_after, self.bad = cloud, silent_after or {}, bad
        self.sent = dict.fromkeys("abc", 0)

    def __call__(self, ask: Ask) -> Frame | None:
        number = self.sent[ask.device]
        if number >= self.silent_after.get(ask.device, 99):
            return None
        self.sent[ask.device] += 1
        examples = self.cloud.batches[ask.device].examples
        activations, lengths, labels = examples[number]
        if ask.device in self.bad:
            lengths = lengths + np.int32(1)
        message = EvalBatch(**NAME, id=number, last=number == len(examples) - 1)
        return Frame(message, {"activations": activations, "lengths": lengths, "labels": labels})


def score(cloud: Cloud, answers: Answers) -> tuple[tuple[Any, frozenset[str]], list[Tell]]:
    """What an evaluation comes to and who did not finish it; and what devices were told."""
    result, told = run(evaluate(cloud.context(), EXAMPLES), answers)
    return (result.evaluation, result.unfinished), told


def pooled(cloud: Cloud, devices: Sequence[str], of: Sequence[str] = "abc") -> Evaluation:
    scores = [cloud.trainer.evaluate(*cloud.batches[device].sent) for device in devices]
    scored = sum(score.scored for score in scores)
    loss = sum(score.loss * score.scored for score in scores) / scored
    correct, examples = sum(score.correct for score in scores), sum(EXAMPLES[device] for device in devices)
    of_examples = sum(EXAMPLES[device] for device in of)
    macro_f1 = counted(cloud, devices).macro_f1
    loss = pytest.approx(loss, rel=1e-4)  # type: ignore[assignment]
    return Evaluation(1, loss, correct, scored, examples, of_examples, macro_f1=macro_f1)


def counted(cloud: Cloud, devices: Sequence[str]) -> ClassCounts:
    """What these devices' examples come to class by class."""
    predicted = [cloud.trainer.evaluate(*cloud.batches[device].sent).predicted_B for device in devices]
    labels = [cloud.batches[device].sent[2] for device in devices]
    classes = len(cloud.trainer.config.task.labels)
    return ClassCounts.count(np.concatenate(labels), np.concatenate(predicted), classes)  # type: ignore[arg-type]


def test_an_evaluation_pools_examples_over_devices(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("ho-sfl")
    before = cloud.weights()
    (evaluation, unfinished), told = score(cloud, Evaluator(cloud))
    assert evaluation == pooled(cloud, "abc")
    assert not unfinished
    assert evaluation.is_complete
    assert evaluation.scored == 9
    assert evaluation.by_class.confusion_KK.tolist() == counted(cloud, "abc").confusion_KK.tolist()  # type: ignore[union-attr]
    assert evaluation.by_class.right_K.sum() == evaluation.correct  # type: ignore[union-attr]
    results = [tell for tell in told if isinstance(tell.message, EvalResult)]
    assert [type(tell.message) for tell in told[:3]] == [EvalStart] * 3
    assert sum(tell.message.correct for tell in results) == evaluation.correct  # type: ignore[union-attr]
    assert [tell.message.id for tell in results if tell.device == "b"] == [0, 1, 2, 3]  # type: ignore[union-attr]
    assert all(torch.equal(value, before[name]) for name, value in cloud.weights().items())


def test_a_device_that_leaves_an_evaluation_half_way_counts_for_nothing_in_it(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("ho-sfl")
    (evaluation, unfinished), _ = score(cloud, Evaluator(cloud, {"a": 0, "b": 3}))
    assert evaluation == pooled(cloud, "c")
    assert evaluation.by_class.confusion_KK.tolist() == counted(cloud, "c").confusion_KK.tolist()  # type: ignore[union-attr]
    assert not evaluation.is_complete
    assert unfinished == {"a", "b"}
    assert score(cloud, Evaluator(cloud, {"a": 1, "b": 3, "c": 2}))[0][0] is None


def test_a_device_that_is_away_counts_among_the_examples_and_whose_data_was_scored_is_noted(
    make_cloud: Callable[..., Cloud],
) -> None:
    cloud = make_cloud("ho-sfl")
    known = {**EXAMPLES, "away": 60}
    digests = {device: f"digest of {device}" for device in EXAMPLES}

    def evaluated(digests: Mapping[str, str], answers: Answers) -> Evaluation:
        evaluation = run(evaluate(cloud.context(), known, digests), answers)[0].evaluation
        assert evaluation is not None
        return evaluation

    whole = evaluated(digests, Evaluator(cloud))
    assert (whole.examples, whole.of_examples) == (sum(EXAMPLES.values()), sum(EXAMPLES.values()) + 60)
    assert not whole.is_complete
    part = evaluated(digests, Evaluator(cloud, {"a": 0}))
    other = evaluated({**digests, "b": "digest of other data"}, Evaluator(cloud))
    assert whole.held_out == evaluated(digests, Evaluator(cloud)).held_out
    assert len({whole.held_out, part.held_out, other.held_out, ""}) == 4


def test_an_evaluation_without_answers_is_none(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("ho-sfl")
    assert score(cloud, lambda ask: None)[0] == (None, {"a", "b", "c"})
    assert run(evaluate(cloud.context([]), EXAMPLES), lambda ask: None)[0].evaluation is None


def test_a_batch_that_cannot_be_evaluated_ends_that_devices_part(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("ho-sfl")
    (evaluation, unfinished), told = score(cloud, Evaluator(cloud, bad="b"))
    assert evaluation == pooled(cloud, "ac", "ac")
    assert unfinished == {"b"}
    assert not [tell for tell in told if tell.device == "b" and isinstance(tell.message, EvalResult)]


LIES = {
    "more": ({"b": 3}, "more held-out examples than it said it has: ready with 3, got 4 so far"),
    "fewer": ({"b": 99}, "fewer held-out examples than it said it has: ready with 99, got 4 with the last batch"),
}


@pytest.mark.parametrize("how", LIES)
def test_a_device_that_sends_more_or_fewer_held_out_examples_than_it_said_has_no_say_and_is_named(
    make_cloud: Callable[..., Cloud], how: str
) -> None:
    cloud = make_cloud("ho-sfl")
    said, sentence = LIES[how]
    result, seen = drive(evaluate(cloud.context(), EXAMPLES | said), Evaluator(cloud))
    assert result.evaluation == pooled(cloud, "ac", "ac"), "it can neither weigh more nor spoil the others' evaluation"
    assert result.evaluation.is_complete
    assert result.unfinished == {"b"}
    assert [action.reason for action in seen if isinstance(action, Fault)] == [sentence.partition(":")[0]]
    (refusal,) = (each.message for each in seen if isinstance(each, Tell) and isinstance(each.message, Refusal))
    assert refusal == Refusal(code="message", reason=sentence, retry=False)


def test_an_evaluation_of_a_device_that_never_says_last_ends(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("ho-sfl")
    examples = cloud.batches["a"].examples
    asked = list[Ask]()

    def endless(ask: Ask) -> Frame:
        asked.append(ask)
        assert len(asked) < 100
        activations, lengths, labels = examples[0]
        tensors = {"activations": activations, "lengths": lengths, "labels": labels}
        return Frame(EvalBatch(**NAME, id=len(asked), last=False), tensors)

    result, _ = run(evaluate(cloud.context("a"), {"a": 2}), endless)
    assert result.evaluation is None
    assert len(asked) == 3


@pytest.mark.parametrize("is_its_fault", [True, False])
def test_held_out_activations_that_are_not_finite_are_refused_by_name(
    make_cloud: Callable[..., Cloud], is_its_fault: bool
) -> None:
    cloud = make_cloud("ho-sfl")
    evaluator = Evaluator(cloud)
    if not is_its_fault:
        for parameter in cloud.trainer.parameters.values():
            parameter.data.fill_(np.nan)

    def answers(ask: Ask) -> Frame | None:
        frame = evaluator(ask)
        assert frame is not None
        scale = np.float32(np.nan if is_its_fault and ask.device == "b" else 1.0)
        return Frame(frame.message, {**frame.tensors, "activations": frame.tensors["activations"] * scale})

    (evaluation, unfinished), told = score(cloud, answers)
    late = {tell.device: tell.message for tell in told if isinstance(tell.message, Late)}
    if is_its_fault:
        assert late == {"b": Late(**NAME, answer="eval-batch", code="numbers", reason="its activations are not finite")}
        assert evaluation == pooled(cloud, "ac", "ac")
    else:
        assert late.keys() == unfinished == set("abc")
        assert "the cloud's tail has diverged" in late["b"].reason


def test_devices_are_dealt_with_in_the_order_that_was_given(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("hosl")
    prober = Prober(cloud)
    run(rounds.hosl_round(cloud.context("ca")), prober)
    assert [ask.device for ask in prober.asked] == ["c", "a"] * 5


def replace_devices(cloud: Cloud, **settings: Any) -> None:
    devices = msgspec.structs.replace(cloud.config.devices, **settings)
    cloud.config = msgspec.structs.replace(cloud.config, devices=devices)


@pytest.mark.parametrize("algorithm", ["ho-sfl", "frozen"])
def test_the_tail_starts_on_the_first_batch_that_arrives(make_cloud: Callable[..., Cloud], algorithm: str) -> None:
    cloud, trained = make_cloud(algorithm), list[int]()
    compute = cloud.trainer.forward_backward

    def note(activations: npt.NDArray[np.float32], *rest: Any, **more: Any) -> Any:
        trained.append(len(activations))
        return compute(activations, *rest, **more)

    cloud.trainer.forward_backward = note  # type: ignore[method-assign]
    frames = projections_of(VALUES)
    drive(
        rounds.ROUNDS[algorithm](cloud.context()),
        lambda ask: frames[ask.device] if ask.kind is Projections else cloud.anchor(ask.device),
        lambda asks: asks[-1],
    )
    assert trained == [sum(LENGTHS[name]) for name in "cba"]


def test_the_order_of_projections_and_probes_does_not_matter_to_a_bit(make_cloud: Callable[..., Cloud]) -> None:
    for algorithm in ("ho-sfl", "hosl"):
        outcomes = []
        for reverse in (False, True):
            cloud = make_cloud(algorithm, "examples")
            cloud.config = msgspec.structs.replace(cloud.config, strict=True)
            frames, prober = projections_of(VALUES), Prober(cloud)

            def answers(ask: Ask, frames: Any = frames, prober: Any = prober) -> Frame | None:
                return frames[ask.device] if ask.kind is Projections else prober(ask)

            exchange = rounds.ROUNDS[algorithm](cloud.context())
            outcomes.append(drive(exchange, answers, lambda asks, end=-reverse: asks[end])[0])  # type: ignore[misc]
        first, second = outcomes
        assert first.update.coefficients.tobytes() == second.update.coefficients.tobytes()
        assert (first.loss, first.devices) == (second.loss, second.devices)


def test_a_strict_round_takes_anchors_in_order(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud("frozen")
    cloud.config = msgspec.structs.replace(cloud.config, strict=True)
    _, asked = drive(rounds.frozen_round(cloud.context()), lambda ask: cloud.anchor(ask.device), lambda asks: asks[0])
    assert [[ask.device for ask in action.asks] for action in asked if isinstance(action, Await)] == [
        ["a"],
        ["b"],
        ["c"],
    ]


@pytest.mark.parametrize("lost", [Anchor, Probe, Projections])
@pytest.mark.parametrize("algorithm", ["ho-sfl", "hosl"])
def test_a_strict_round_that_loses_a_device_leaves_everything_as_it_was(
    make_cloud: Callable[..., Cloud], algorithm: str, lost: type
) -> None:
    cloud = make_cloud(algorithm)
    cloud.config = msgspec.structs.replace(cloud.config, strict=True)
    before, frames, prober = cloud.weights(), projections_of(VALUES), Prober(cloud)

    def answers(ask: Ask) -> Frame | None:
        if ask.device == "b" and ask.kind is lost:
            return None
        return frames[ask.device] if ask.kind is Projections else prober(ask)

    outcome, _ = run(rounds.ROUNDS[algorithm](cloud.context()), answers)
    is_asked_for = lost is not (Probe if algorithm == "ho-sfl" else Projections)
    assert (outcome is None) == is_asked_for
    assert not cloud.has_gradient()
    changed = [name for name, value in cloud.weights().items() if not torch.equal(value, before[name])]
    assert bool(changed) != is_asked_for


@pytest.mark.parametrize("algorithm", ["ho-sfl", "hosl", "frozen"])
def test_a_round_below_the_quorum_changes_nothing(make_cloud: Callable[..., Cloud], algorithm: str) -> None:
    cloud = make_cloud(algorithm)
    replace_devices(cloud, quorum=3)
    before, frames, prober = cloud.weights(), projections_of(VALUES), Prober(cloud)

    def answers(ask: Ask) -> Frame | None:
        if ask.device == "b" and ask.kind is Anchor:
            return None
        return frames[ask.device] if ask.kind is Projections else prober(ask)

    outcome, _ = run(rounds.ROUNDS[algorithm](cloud.context()), answers)
    assert outcome is None
    assert not cloud.has_gradient()
    assert all(torch.equal(value, before[name]) for name, value in cloud.weights().items())


@pytest.mark.parametrize("aggregation", ["trimmed-mean", "median"])
def test_a_device_that_lies_does_not_move_a_robust_average(make_cloud: Callable[..., Cloud], aggregation: str) -> None:
    cloud = make_cloud("ho-sfl")
    replace_devices(cloud, aggregation=aggregation, trim=0.34)
    outcome, _ = ho_sfl(cloud, {"a": [1.0, -2.0], "b": [1e20, 1e20], "c": [0.5, 3.0]})
    assert outcome is not None
    assert outcome.update.coefficients == pytest.approx(expected([[1.0, 3.0]], [1]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -2e30])
def test_absurd_projections_count_against_their_device(make_cloud: Callable[..., Cloud], bad: float) -> None:
    cloud = make_cloud("ho-sfl")
    frames = projections_of(VALUES | {"a": [1.0, bad]})
    _, seen = drive(
        rounds.ho_sfl_round(cloud.context()),
        lambda ask: frames[ask.device] if ask.kind is Projections else cloud.anchor(ask.device),
        lambda asks: asks[0],
    )
    assert [action.device for action in seen if isinstance(action, Fault)] == ["a"]
    (late,) = (each for each in seen if isinstance(each, Tell) and isinstance(each.message, Late))
    reason = "its projections are not finite, or absurd"
    assert late == Tell("a", Late(**NAME, id=1, answer="projections", code="numbers", reason=reason))


@pytest.mark.parametrize("algorithm", ["ho-sfl", "hosl", "frozen"])
def test_a_device_hears_that_its_anchor_is_not_finite(make_cloud: Callable[..., Cloud], algorithm: str) -> None:
    cloud = make_cloud(algorithm)
    prober = Prober(cloud)

    def answers(ask: Ask) -> Frame | None:
        is_spoilt = ask.kind is Anchor and ask.device == "b"
        return Frame(Anchor(**NAME, id=4), cloud.tensors("b", np.nan)) if is_spoilt else prober(ask)

    _, told = run(
        rounds.ROUNDS[algorithm](cloud.context()), lambda ask: None if ask.kind is Projections else answers(ask)
    )
    (late,) = (tell for tell in told if isinstance(tell.message, Late))
    reason = "its activations are not finite"
    assert late == Tell("b", Late(**NAME, id=4, answer="anchor", code="numbers", reason=reason))


@pytest.mark.parametrize("algorithm", ["ho-sfl", "hosl"])
def test_infinite_activations_count_against_their_device_and_a_tail_that_diverged_does_not(
    make_cloud: Callable[..., Cloud], algorithm: str
) -> None:
    cloud = make_cloud(algorithm)
    frames, prober = projections_of(VALUES), Prober(cloud, spoilt="b")

    def answers(ask: Ask) -> Frame | None:
        if ask.kind is Anchor and ask.device == "b":
            return Frame(Anchor(**NAME), cloud.tensors("b", np.nan))
        return frames[ask.device] if ask.kind is Projections else prober(ask)

    _, seen = drive(rounds.ROUNDS[algorithm](cloud.context()), answers, lambda asks: asks[0])
    assert {action.device for action in seen if isinstance(action, Fault)} == {"b"}
    next(iter(cloud.trainer.parameters.values())).data.fill_(np.nan)
    prober.spoilt = ""
    _, seen = drive(rounds.ROUNDS[algorithm](cloud.context("ac")), lambda ask: prober(ask), lambda asks: asks[0])
    assert not [action for action in seen if isinstance(action, Fault)]


@pytest.mark.parametrize(("kind", "expected"), [("sgd", -math.inf), ("adamw", 1e30)])
def test_an_estimate_that_leaves_float32_is_infinite_without_a_word(kind: str, expected: float) -> None:
    client = ClientOptimizer(optimizer=kind, learning_rate=1e9)  # type: ignore[arg-type]
    config = RunConfig(task=Task(name="t", kind="lm", template="{text}"), client=client)
    context: Any = SimpleNamespace(config=config, round=1)
    (coefficient,) = make_update(context, np.array([1e30])).coefficients.tolist()
    assert coefficient == pytest.approx(expected)


def test_every_algorithm_has_its_round() -> None:
    assert set(rounds.ROUNDS) == set(get_args(Algorithm))
