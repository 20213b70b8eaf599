"""A round as the cloud sees it, as generators without I/O: what to tell and ask devices, and what comes of it.

HO-SFL (arXiv 2603.14773), HOSL (arXiv 2601.10940) and the frozen client. Devices are dealt with in the order of
their names, so that gradients accumulate in the same order every time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hosl_cloud.exceptions import BatchError, NotFiniteError, RoundSpoiltError
from hosl_cloud.settings import RunConfig
from hosl_cloud.store import Evaluation
from hosl_protocol import (
    Anchor,
    CutGradient,
    EvalBatch,
    EvalResult,
    EvalStart,
    Frame,
    Message,
    Probe,
    ProbeLoss,
    Projections,
    Refusal,
    RoundStart,
    UpdateRecord,
    scheduled_rate,
)

log = logging.getLogger(__name__)

LARGEST_PROJECTION = 1e30
"""Magnitude from which a projection is taken for a fault of its device."""

Floats: TypeAlias = npt.NDArray[np.float32]
BatchArrays: TypeAlias = tuple[Floats, npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""Activations [T, D], lengths [B], labels [N]."""


@dataclass(frozen=True)
class Tell:
    """Send this to a device; go on at once."""

    device: str
    message: Message
    tensors: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ask:
    """Wait for a device's message of this kind; answered by None where it is late or gone."""

    device: str
    kind: type
    round: int
    direction: int | None = None
    sign: int | None = None

    @property
    def stage(self) -> object:
        """What shares one deadline: the same message of every device; each batch of an evaluation has its own."""
        return object() if self.kind is EvalBatch else (self.kind, self.direction, self.sign)


Exchange: TypeAlias = "Generator[Tell | Ask, Frame | None, Outcome | None]"


class Trainer(Protocol):
    """What a round needs of the tail; see hosl_cloud.trainer."""

    def forward_backward(
        self,
        activations: Floats,
        lengths: npt.NDArray[np.int32],
        labels: npt.NDArray[np.int32],
        weight: float = 1.0,
        *,
        wants_cut_gradient: bool = True,
    ) -> Any: ...

    def evaluate(self, activations: Floats, lengths: npt.NDArray[np.int32], labels: npt.NDArray[np.int32]) -> Any: ...

    def step(self, round_: int, total_weight: float) -> Any: ...

    def discard(self) -> None: ...


@dataclass(frozen=True)
class RoundContext:
    """What a round needs to know."""

    run: str
    epoch: int
    round: int
    config: RunConfig
    trainer: Trainer
    devices: Sequence[str]
    """Who is to take part, in order."""

    def name(self, id_: int) -> dict[str, Any]:
        """The fields that name a message of this round."""
        return {"run": self.run, "epoch": self.epoch, "round": self.round, "id": id_}

    def weight(self, batch: BatchArrays) -> float:
        """w_m before it is divided by the sum of all."""
        return float(batch[1].size) if self.config.devices.weighting == "examples" else 1.0

    def start(self) -> Generator[Tell, None, None]:
        """Open the round for every participant."""
        for device in self.devices:
            yield Tell(device, RoundStart(**self.name(0), deadline_s=self.config.devices.round_deadline_s))


@dataclass(frozen=True)
class Outcome:
    """What a round came to."""

    update: UpdateRecord
    loss: float
    """Weighted mean of the devices' losses at the clean weights, before the tail's step."""
    devices: tuple[str, ...]
    """Who took part in the tail's step."""


def ho_sfl_round(context: RoundContext) -> Exchange:
    """HO-SFL steps 1 to 4: train the tail on every Anchor, hand λ_m back, average the projections."""
    yield from context.start()
    part = yield from _train_on_anchors(context, wants_cut_gradient=True)
    if part is None:
        return None
    sums, total = np.zeros(context.config.directions), 0.0
    for device, weight in part.weights.items():
        frame = yield Ask(device, Projections, context.round)
        projections = np.full(1, np.nan) if frame is None else frame.tensors["projections"].astype(np.float64)
        if not np.abs(projections).max() < LARGEST_PROJECTION:
            reason = "no projections" if frame is None else "they are not finite, or absurd"
            log.warning("round %d: %s is left out of the average: %s", context.round, device, reason)
            continue
        sums += weight * projections
        total += weight
    estimates = sums / (total * context.config.directions * context.config.probe_step) if total else sums
    return part.outcome(context, estimates)


def hosl_round(context: RoundContext) -> Exchange:
    """HOSL steps 1 and 2: evaluate 2Q probes, then train the tail on the clean activations, or on the probes' mean."""
    yield from context.start()
    config = context.config
    present = list(context.devices)
    weights: dict[str, float] = {}
    means: dict[str, _MeanBatch] = {}
    estimates = np.zeros(config.directions)
    for direction in range(config.directions):
        losses: dict[tuple[str, int], float] = {}
        for sign in (+1, -1):
            for device in list(present):
                frame = yield Ask(device, Probe, context.round, direction, sign)
                if frame is None:
                    present.remove(device)
                    continue
                weights[device] = context.weight(_batch(frame))
                score = yield from _evaluate_batch(context, device, frame)
                if score is None:
                    present.remove(device)
                    continue
                if config.anchor == "midpoint":
                    try:
                        means.setdefault(device, _MeanBatch()).add(_batch(frame))
                    except BatchError as error:
                        present.remove(device)
                        yield _refuse(device, error)
                        continue
                losses[device, sign] = score.loss
                reply = ProbeLoss(**context.name(0), direction=direction, sign=+1 if sign > 0 else -1)
                yield Tell(device, reply, {"loss": np.float32(score.loss).reshape(())})
        estimates[direction] = _hosl_estimate(losses, weights, config)
    midpoints = {device: means[device].take() for device in present} if config.anchor == "midpoint" else None
    part = yield from _train_on_anchors(context, wants_cut_gradient=False, devices=present, midpoints=midpoints)
    return None if part is None else part.outcome(context, estimates)


class _MeanBatch:
    """Mean of a device's probes: the same batch each time, at weights around θ."""

    def __init__(self) -> None:
        self._sum: BatchArrays | None = None
        self._count = 0

    def add(self, batch: BatchArrays) -> None:
        """Raises BatchError where the batch is not that of the first probe."""
        self._count += 1
        if self._sum is None:
            self._sum = batch[0].copy(), batch[1], batch[2]
            return
        activations, lengths, labels = self._sum
        if not (np.array_equal(lengths, batch[1]) and np.array_equal(labels, batch[2])):
            raise BatchError("examples of a probe", "those of the round's first", "others")
        activations += batch[0]

    def take(self) -> BatchArrays:
        """The mean."""
        assert self._sum is not None
        activations, lengths, labels = self._sum
        activations /= np.float32(self._count)
        return activations, lengths, labels


def _hosl_estimate(losses: Mapping[tuple[str, int], float], weights: Mapping[str, float], config: RunConfig) -> float:
    """g_q = (loss⁺ − loss⁻) / (2εQ), over the devices that sent both signs and whose losses are finite."""
    both = [
        (weights[device], plus - losses[device, -1])
        for (device, sign), plus in losses.items()
        if sign == +1 and (device, -1) in losses and math.isfinite(plus - losses[device, -1])
    ]
    total = sum(weight for weight, _ in both)
    mean = sum(weight * difference for weight, difference in both) / total if total else 0.0
    return mean / (2.0 * config.probe_step * config.directions)


def frozen_round(context: RoundContext) -> Exchange:
    """The control: only the tail trains; nothing but the round's end goes back."""
    yield from context.start()
    part = yield from _train_on_anchors(context, wants_cut_gradient=False)
    return None if part is None else part.outcome(context, np.zeros(0))


ROUNDS: dict[str, Callable[[RoundContext], Exchange]] = {
    "ho-sfl": ho_sfl_round,
    "hosl": hosl_round,
    "frozen": frozen_round,
}


@dataclass(frozen=True)
class _Part:
    """Who took part in the tail's step, with which weights, and the mean loss."""

    weights: dict[str, float]
    loss: float

    def outcome(self, context: RoundContext, estimates: npt.NDArray[np.float64]) -> Outcome:
        """`estimates` [P] are the coefficients of the client's gradient estimate Σ_p estimate_p · z_p."""
        optimizer = context.config.client
        rate = scheduled_rate(optimizer, context.round, context.config.rounds)
        coefficients = estimates if optimizer.optimizer == "adamw" else -rate * estimates
        update = UpdateRecord(context.round, coefficients.astype(np.float32), rate)
        return Outcome(update, self.loss, tuple(self.weights))


def _train_on_anchors(
    context: RoundContext,
    *,
    wants_cut_gradient: bool,
    devices: Sequence[str] | None = None,
    midpoints: Mapping[str, BatchArrays] | None = None,
) -> Generator[Tell | Ask, Frame | None, _Part | None]:
    """One first-order step of the tail on Σ w_m grad_m; None where nobody sent an Anchor.

    `midpoints` stand for the devices' Anchors where they send none.
    """
    weights: dict[str, float] = {}
    losses: dict[str, float] = {}
    for device in context.devices if devices is None else devices:
        if midpoints is None:
            frame = yield Ask(device, Anchor, context.round)
            if frame is None:
                continue
            batch = _batch(frame)
        else:
            batch = midpoints[device]
        weight = context.weight(batch)
        try:
            result = context.trainer.forward_backward(*batch, weight, wants_cut_gradient=wants_cut_gradient)
        except RoundSpoiltError as error:
            # What the devices before this one added is gone too; those after it can still make the step.
            log.warning("round %d: %s spoilt the gradients so far: %s", context.round, device, error)
            weights.clear()
            losses.clear()
            continue
        except NotFiniteError as error:
            log.warning("round %d: %s is left out: %s", context.round, device, error)
            continue
        except BatchError as error:
            yield _refuse(device, error)
            continue
        weights[device], losses[device] = weight, result.loss
        if wants_cut_gradient:
            tensors = {"lambda": result.cut_gradient_TD, "loss": np.float32(result.loss).reshape(())}
            yield Tell(device, CutGradient(**context.name(0)), tensors)
    if not weights:
        context.trainer.discard()
        return None
    total = sum(weights.values())
    try:
        context.trainer.step(context.round, total)
    except RoundSpoiltError as error:
        log.warning("round %d: the tail makes no step: %s", context.round, error)
        return None
    return _Part(weights, sum(weights[device] * loss for device, loss in losses.items()) / total)


def evaluate(context: RoundContext) -> Generator[Tell | Ask, Frame | None, Evaluation | None]:
    """Score the held-out data of `context.devices`, a batch of each in turn; None where there is none."""
    present = list(context.devices)
    for device in present:
        yield Tell(device, EvalStart(**context.name(0)))
    loss_sum, correct, scored = 0.0, 0, 0
    while present:
        for device in list(present):
            frame = yield Ask(device, EvalBatch, context.round)
            if frame is None:
                present.remove(device)
                continue
            assert isinstance(frame.message, EvalBatch)
            result = yield from _evaluate_batch(context, device, frame)
            if result is None or not math.isfinite(result.loss):
                present.remove(device)
                continue
            loss_sum += result.loss * result.scored
            correct, scored = correct + result.correct, scored + result.scored
            reply = EvalResult(**context.name(frame.message.id), correct=result.correct, scored=result.scored)
            yield Tell(device, reply, {"loss": np.float32(result.loss).reshape(())})
            if frame.message.last:
                present.remove(device)
    return Evaluation(context.round, loss_sum / scored, correct, scored) if scored else None


@dataclass(frozen=True)
class _NotFinite:
    """The score of a batch whose loss is no number."""

    loss: float = math.nan
    correct: int = 0
    scored: int = 0


def _evaluate_batch(context: RoundContext, device: str, frame: Frame) -> Generator[Tell, None, Any]:
    """The tail's score of a batch; None where the batch contradicts itself, and its device is refused."""
    try:
        return context.trainer.evaluate(*_batch(frame))
    except NotFiniteError as error:
        log.warning("round %d: a batch of %s: %s", context.round, device, error)
        return _NotFinite()
    except BatchError as error:
        yield _refuse(device, error)
        return None


def _refuse(device: str, error: BatchError) -> Tell:
    log.warning("device %s is refused: %s", device, error)
    return Tell(device, Refusal(code="message", reason=str(error)[:500], retry=True))


def _batch(frame: Frame) -> BatchArrays:
    return frame.tensors["activations"], frame.tensors["lengths"], frame.tensors["labels"]
