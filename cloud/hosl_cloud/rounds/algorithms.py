"""A round as the cloud sees it, as generators without I/O: what to tell and ask devices, and what comes of it.

HO-SFL (arXiv 2603.14773), HOSL (arXiv 2601.10940) and the frozen client, in the table `ROUNDS`; their device's side is
in hosl_edge/rounds.py. Fleet.drive in runs/fleet.py leads a generator, on the compute thread, in a simulation too.
Devices are dealt with as they answer. In a strict run gradients accumulate in the order of `CloudRound.devices`.

A round is void, and its generator returns None, where

- fewer devices' batches than the quorum reached the tail (`_take_anchors`): they were late, left, or were refused;
- the gradient that they add up to is not finite (`_step`);
- in a strict run, where the quorum is all of them, one device lacks its projections (HO-SFL) or a probe (HOSL).

Then no weight has changed anywhere, and the Coordinator starts the round again as another attempt. A round of HO-SFL
that is not strict, and to which no device sends projections, is not void: the tail has made its step, and the update is
of zeros. An update that is not finite is sent as zeros, too (`Coordinator._bounded`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from hosl_cloud.exceptions import BatchError, NotFiniteError, RoundSpoiltError
from hosl_cloud.rounds.evaluation import evaluate_batches
from hosl_cloud.rounds.exchange import (
    Action,
    Ask,
    BatchArrays,
    CloudRound,
    Doubles,
    Exchange,
    Fault,
    Floats,
    Tell,
    batch_of,
    blame,
    first,
    first_few,
    leave_out,
    refuse,
)
from hosl_cloud.settings import RunConfig
from hosl_protocol.run.schedule import scheduled_rate
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import Anchor, CutGradient, Message, Probe, ProbeLoss, Projections

log = logging.getLogger(__name__)

LARGEST_PROJECTION = 1e30
"""Magnitude from which a projection is taken for a fault of its device."""

FLOAT16_EXPONENT = 15
"""λ goes to float16 with its largest magnitude from 2^14 up to 2^15, half of what the type holds."""


@dataclass(frozen=True)
class RoundResult:
    """A round that counts: what it does to the devices' weights, and its figures."""

    update: UpdateRecord
    loss: float
    """Weighted mean of the devices' losses at the clean weights, before the tail's step."""
    devices: tuple[str, ...]
    """Who took part in the tail's step."""


def ho_sfl_round(context: CloudRound) -> Exchange[RoundResult | None]:
    """HO-SFL: train the tail on every Anchor, hand λ_m back, average the projections."""
    yield from context.start()
    contributors = yield from _take_anchors(context, wants_cut_gradient=True)
    if contributors is None:
        return None

    # Devices probe while the tail makes its step; a strict round may still be void, and steps when it is whole.
    if not (context.config.strict or _step(context, contributors)):
        return None

    projections = yield from _take_projections(context, contributors)
    if context.config.strict and not (len(projections) == context.quorum and _step(context, contributors)):
        context.trainer.discard()
        return None

    averages = context.combine(projections, contributors.weights)
    return contributors.outcome(context, averages / (context.config.directions * context.config.probe_step))


def _take_projections(context: CloudRound, contributors: _Contributors) -> Exchange[dict[str, Doubles]]:
    """Take v_m [P] of each contributor; one that sends none, or numbers that cannot be, is left out of the average."""
    projections = {}
    asks = [Ask(device, Projections, context.round) for device in contributors.weights]
    while asks:
        ask, frame = yield from first(asks)
        if frame is None:
            log.warning(
                "round %d: %s is left out of the average: no projections",
                context.round,
                ask.device,
                extra={"device": ask.device},
            )
            continue

        # Written so that NaN fails it, too.
        values = frame.tensors["projections"].astype(np.float64)
        if not np.abs(values).max() < LARGEST_PROJECTION:
            yield Fault(ask.device, "projections that are not finite, or absurd")
            yield leave_out(ask.device, frame.message, "its projections are not finite, or absurd")
            continue
        projections[ask.device] = values
    return projections


def hosl_round(context: CloudRound) -> Exchange[RoundResult | None]:
    """HOSL: evaluate 2Q probes, then train the tail on the clean activations, or on the probes' mean."""
    yield from context.start()
    probed = yield from _take_probes(context)

    if context.config.strict and len(probed.present) < context.quorum:
        return None

    # Of all probes that came; the tail is trained with those that sent every one.
    estimates = _hosl_estimates(probed, context)
    contributors = yield from _take_anchors(
        context, wants_cut_gradient=False, devices=probed.present, midpoints=probed.midpoints(context.config)
    )
    return (
        contributors.outcome(context, estimates) if contributors is not None and _step(context, contributors) else None
    )


@dataclass
class _Probed:
    """The losses of a HOSL round's probes."""

    losses: dict[tuple[str, int, int], float] = field(default_factory=dict)
    """By device, direction and sign; NaN where the tail's loss is no number."""
    weights: dict[str, float] = field(default_factory=dict)
    means: dict[str, _MeanBatch] = field(default_factory=dict)
    present: list[str] = field(default_factory=list)
    """Who sent every probe, in the order of the round's devices."""

    def midpoints(self, config: RunConfig) -> dict[str, BatchArrays] | None:
        """Average each device's probes, which stand for its Anchor in a run with the midpoint anchor; else None."""
        return {device: self.means[device].take() for device in self.present} if config.anchor == "midpoint" else None


def _take_probes(context: CloudRound) -> Exchange[_Probed]:
    """Evaluate every device's probes as they come; each device goes on at its own pace."""
    # A device sends its points in this order, and is asked for the next as soon as it was told a loss.
    points = [(direction, sign) for direction in range(context.config.directions) for sign in (+1, -1)]
    probed = _Probed()
    done = dict.fromkeys(context.devices, 0)
    asks = [Ask(device, Probe, context.round, *points[0]) for device in context.devices]

    while asks:
        answers = yield from first_few(asks, context.trainer.at_once)
        for ask, frame, score in (yield from evaluate_batches(context, answers)):
            if not (yield from _note_probe(context, ask, frame, score.loss, probed)):
                continue
            done[ask.device] += 1
            if done[ask.device] < len(points):
                asks.append(Ask(ask.device, Probe, context.round, *points[done[ask.device]]))

    probed.present = [device for device in context.devices if done[device] == len(points)]
    return probed


def _note_probe(
    context: CloudRound, ask: Ask, frame: Frame, loss: float, probed: _Probed
) -> Generator[Action, None, bool]:
    """Note a probe's loss and tell it; False where the device is out of the round."""
    assert ask.direction is not None
    assert ask.sign is not None
    batch = batch_of(frame)
    probed.weights[ask.device] = context.weight(batch)
    if context.config.anchor == "midpoint":
        try:
            probed.means.setdefault(ask.device, _MeanBatch()).add(batch)
        except BatchError as error:
            yield refuse(ask.device, error)
            return False

    # A loss that is no number is told like any other: the device goes on, and the estimate leaves it out.
    probed.losses[ask.device, ask.direction, ask.sign] = loss
    assert isinstance(frame.message, Probe)
    reply = ProbeLoss(**context.name(frame.message.id), direction=ask.direction, sign=+1 if ask.sign > 0 else -1)
    yield Tell(ask.device, reply, {"loss": np.float32(loss).reshape(())})
    return True


class _MeanBatch:
    """The mean of a device's probes: the same batch each time, at weights around θ."""

    def __init__(self) -> None:
        self._sum: BatchArrays | None = None
        self._count = 0

    def add(self, batch: BatchArrays) -> None:
        """Add a probe's batch. Raises BatchError where it is not that of the first probe."""
        self._count += 1
        if self._sum is None:
            self._sum = batch[0].copy(), batch[1], batch[2]
            return
        activations, lengths, labels = self._sum
        if not (np.array_equal(lengths, batch[1]) and np.array_equal(labels, batch[2])):
            raise BatchError("examples of a probe", "those of the round's first", "others")
        activations += batch[0]

    def take(self) -> BatchArrays:
        """Divide by the count, and give the mean away: it is asked for once."""
        assert self._sum is not None
        activations, lengths, labels = self._sum
        activations /= np.float32(self._count)
        return activations, lengths, labels


def _hosl_estimates(probed: _Probed, context: CloudRound) -> Doubles:
    """g_q = (loss⁺ − loss⁻) / (2εQ) [Q], each over the devices that sent both signs and whose losses are finite."""
    config = context.config
    # NaN where a sign is missing; the average leaves it out.
    differences = {
        device: np.array(
            [
                probed.losses.get((device, q, +1), math.nan) - probed.losses.get((device, q, -1), math.nan)
                for q in range(config.directions)
            ]
        )
        for device in probed.weights
    }

    return context.combine(differences, probed.weights) / (2.0 * config.probe_step * config.directions)


def frozen_round(context: CloudRound) -> Exchange[RoundResult | None]:
    """The control: only the tail trains; nothing but the round's end goes back."""
    yield from context.start()
    contributors = yield from _take_anchors(context, wants_cut_gradient=False)
    return (
        contributors.outcome(context, np.zeros(0))
        if contributors is not None and _step(context, contributors)
        else None
    )


RoundFunction: TypeAlias = Callable[[CloudRound], Exchange[RoundResult | None]]
"""None: the round is void."""

ROUNDS: dict[str, RoundFunction] = {
    "ho-sfl": ho_sfl_round,
    "hosl": hosl_round,
    "frozen": frozen_round,
}
"""By `algorithm` in run.toml; `PARTS` in hosl_edge/rounds.py has the devices' part under the same names."""


@dataclass(frozen=True)
class _Contributors:
    """The devices whose gradients are in the tail's step, with their weights and losses."""

    weights: dict[str, float]
    losses: dict[str, float]

    @property
    def total(self) -> float:
        """Sum of the weights."""
        return math.fsum(self.weights.values())

    def outcome(self, context: CloudRound, estimates: Doubles) -> RoundResult:
        """Make the round's result of `estimates` [P], the coefficients of the estimate Σ_p estimate_p · z_p."""
        update = make_update(context, estimates)
        loss = math.fsum(weight * self.losses[device] for device, weight in self.weights.items()) / self.total
        return RoundResult(update, loss, tuple(device for device in context.devices if device in self.weights))


def make_update(context: CloudRound, estimates: Doubles) -> UpdateRecord:
    """Make the update of the estimate Σ_p estimate_p · z_p, of `estimates` [P], at the round's scheduled rate.

    With AdamW the devices apply the rate themselves. A number beyond float32 becomes infinite, and nobody is told it
    (Coordinator._bounded).
    """
    # SGD's step is in the coefficients; float32, for that is what is stored, sent and added by every device.
    optimizer = context.config.client
    rate = scheduled_rate(optimizer, context.round, context.config.rounds)
    with np.errstate(over="ignore"):
        coefficients = (estimates if optimizer.optimizer == "adamw" else -rate * estimates).astype(np.float32)
    return UpdateRecord(context.round, coefficients, rate)


def _step(context: CloudRound, contributors: _Contributors) -> bool:
    """Make one first-order step of the tail on Σ w_m grad_m; False, which voids the round, where that is not finite."""
    try:
        context.trainer.step(context.round, contributors.total)
    except RoundSpoiltError as error:
        log.warning("round %d: the tail makes no step: %s", context.round, error)
        return False
    return True


def _take_anchors(
    context: CloudRound,
    *,
    wants_cut_gradient: bool,
    devices: Sequence[str] | None = None,
    midpoints: Mapping[str, BatchArrays] | None = None,
) -> Exchange[_Contributors | None]:
    """Add up Σ w_m grad_m over the devices' Anchors; None, and no gradient, where fewer came than the quorum.

    `midpoints` stand for the devices' Anchors where they send none.
    """
    contributors = _Contributors({}, {})
    asks = [Ask(device, Anchor, context.round) for device in (context.devices if devices is None else devices)]

    while asks:
        if midpoints is not None:
            uploads = [_Upload(ask.device, midpoints[ask.device]) for ask in asks[: context.trainer.at_once]]
            del asks[: context.trainer.at_once]
        else:
            answers = yield from _next_answers(context, asks)
            uploads = [
                _Upload(ask.device, batch_of(frame), frame.message) for ask, frame in answers if frame is not None
            ]
        yield from _backpropagate(context, uploads, contributors, wants_cut_gradient)

    if not contributors.weights or len(contributors.weights) < context.quorum:
        if contributors.weights:
            log.warning(
                "round %d: %d devices of a quorum of %d", context.round, len(contributors.weights), context.quorum
            )
        context.trainer.discard()
        return None
    return contributors


def _next_answers(context: CloudRound, asks: list[Ask]) -> Exchange[list[tuple[Ask, Frame | None]]]:
    """Take as many answers as the trainer takes at once; a strict run takes them in order, however they arrive."""
    if not context.config.strict:
        return (yield from first_few(asks, context.trainer.at_once))
    answers = []
    for ask in asks[: context.trainer.at_once]:
        answers.append((yield from first([ask])))
        asks.remove(ask)
    return answers


@dataclass(frozen=True)
class _Upload:
    """A device's batch, and the Anchor that brought it; None where its probes' mean stands for one."""

    device: str
    batch: BatchArrays
    anchor: Message | None = None

    def leave_out(self, reason: str) -> Generator[Action, None, None]:
        """Tell the device that no λ will come."""
        if self.anchor is not None:
            yield leave_out(self.device, self.anchor, reason)


def _backpropagate(
    context: CloudRound, uploads: Sequence[_Upload], contributors: _Contributors, wants_cut_gradient: bool
) -> Generator[Action, None, None]:
    """Add devices' gradients to the round's, and send each its λ."""
    weights = [context.weight(upload.batch) for upload in uploads]
    batches = [upload.batch for upload in uploads]
    results = context.trainer.forward_backward_many(batches, weights, wants_cut_gradient=wants_cut_gradient)

    # Whatever happens to a batch its device is told, for it waits for λ.
    spoilt = [result for result in results if isinstance(result, RoundSpoiltError)]
    for upload, weight, result in zip(uploads, weights, results, strict=True):
        device, extra = upload.device, {"device": upload.device}
        if isinstance(result, RoundSpoiltError):
            log.warning("round %d: %s spoilt the gradients so far: %s", context.round, device, result, extra=extra)
            yield from upload.leave_out(f"{result.what} is not finite")
        elif isinstance(result, NotFiniteError):
            log.warning("round %d: %s is left out: %s", context.round, device, result, extra=extra)
            yield from upload.leave_out((yield from blame(device, upload.batch, result)))
        elif isinstance(result, BatchError):
            yield refuse(device, result)
        elif spoilt:
            yield from upload.leave_out("the gradients that it was added to are not finite")
        else:
            contributors.weights[device], contributors.losses[device] = weight, result.loss
            # λ goes at once, before the next batch is computed: the device probes meanwhile.
            if wants_cut_gradient:
                yield _tell_cut_gradient(context, device, result)

    if spoilt:
        # What the devices before, and with, this one added goes too; those after it can still make the step.
        context.trainer.discard()
        contributors.weights.clear()
        contributors.losses.clear()


def _tell_cut_gradient(context: CloudRound, device: str, result: Any) -> Tell:
    """Put λ [T, D] and the loss of a device's batch on their way back to it."""
    lambda_TD, exponent = _scale_for_wire(result.cut_gradient_TD, context.config.wire_dtype)
    tensors = {"lambda": lambda_TD, "loss": np.float32(result.loss).reshape(())}
    return Tell(device, CutGradient(**context.name(0), exponent=exponent), tensors)


def _scale_for_wire(lambda_TD: Floats, wire_dtype: str) -> tuple[Floats, int]:
    """Scale λ to λ / 2^e, with e: in float16 a mean loss's gradient would underflow, so its largest goes to the top."""
    if wire_dtype != "float16":
        return lambda_TD, 0
    largest = float(np.abs(lambda_TD).max())
    if largest == 0.0:
        return lambda_TD, 0
    exponent = math.frexp(largest)[1] - FLOAT16_EXPONENT
    return np.ldexp(lambda_TD, -exponent), exponent
