"""A round as the cloud sees it, as generators without I/O: what to tell and ask devices, and what comes of it.

HO-SFL (arXiv 2603.14773), HOSL (arXiv 2601.10940), first-order training (first_order.py) and the frozen client, in the
table `ROUNDS`; their device's side is in hosl_edge/rounds.py. Fleet.drive in runs/fleet.py leads a generator, on the
compute thread, in a simulation too. Devices are dealt with as they answer. In a strict run gradients accumulate in the
order of `CloudRound.devices`.

A round is void, and its generator returns None, where

- fewer devices' batches than the quorum reached the tail (`take_anchors`): they were late, left, or were refused;
- the gradient that they add up to is not finite (`step_tail`);
- in a strict run, where the quorum is all of them, one device lacks its projections (HO-SFL), a probe (HOSL) or its
  gradient (first-order).

Then no weight has changed anywhere, and the Coordinator starts the round again as another attempt. A round of HO-SFL
that is not strict, and to which no device sends projections, is not void: the tail has made its step, and the update is
of zeros; so it is with gradients. An update that is not finite is sent as zeros, too (`Coordinator._bounded`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from hosl_cloud.exceptions import BatchError
from hosl_cloud.rounds.anchors import RoundResult, step_tail, take_anchors, train_and_ask
from hosl_cloud.rounds.evaluation import evaluate_batches
from hosl_cloud.rounds.exchange import (
    Action,
    Ask,
    BatchArrays,
    CloudRound,
    Doubles,
    Exchange,
    Tell,
    batch_of,
    first_few,
    refuse,
)
from hosl_cloud.rounds.first_order import first_order_round
from hosl_cloud.settings import RunConfig
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import Probe, ProbeLoss, Projections

LARGEST_PROJECTION = 1e30
"""Magnitude from which a projection is taken for a fault of its device."""


def ho_sfl_round(context: CloudRound) -> Exchange[RoundResult | None]:
    """HO-SFL: train the tail on every Anchor, hand λ_m back, average the projections."""
    answered = yield from train_and_ask(context, Projections, _read_projections)
    if answered is None:
        return None

    contributors, projections = answered
    averages = context.combine(projections, contributors.weights)
    return contributors.outcome(context, averages / (context.config.directions * context.config.probe_step))


def _read_projections(frame: Frame) -> Doubles | None:
    """Take v_m [P] out of a device's answer; None where they cannot be."""
    # Written so that NaN fails it, too.
    values = frame.tensors["projections"].astype(np.float64)
    return values if np.abs(values).max() < LARGEST_PROJECTION else None


def hosl_round(context: CloudRound) -> Exchange[RoundResult | None]:
    """HOSL: evaluate 2Q probes, then train the tail on the clean activations, or on the probes' mean."""
    yield from context.start()
    probed = yield from _take_probes(context)

    if context.config.strict and len(probed.present) < context.quorum:
        return None

    # Of all probes that came; the tail is trained with those that sent every one.
    estimates = _hosl_estimates(probed, context)
    contributors = yield from take_anchors(
        context, wants_cut_gradient=False, devices=probed.present, midpoints=probed.midpoints(context.config)
    )
    if contributors is None or not step_tail(context, contributors):
        return None
    return contributors.outcome(context, estimates)


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
    kept = {device for device in context.devices if context.kept and context.kept.has_batch(device, context.round)}
    yield from context.start([device for device in context.devices if device not in kept])
    contributors = yield from take_anchors(context, wants_cut_gradient=False, kept=kept)
    return (
        contributors.outcome(context, np.zeros(0))
        if contributors is not None and step_tail(context, contributors)
        else None
    )


RoundFunction: TypeAlias = Callable[[CloudRound], Exchange[RoundResult | None]]
"""None: the round is void."""

ROUNDS: dict[str, RoundFunction] = {
    "ho-sfl": ho_sfl_round,
    "hosl": hosl_round,
    "first-order": first_order_round,
    "frozen": frozen_round,
}
"""By `algorithm` in run.toml; `PARTS` in hosl_edge/rounds.py has the devices' part under the same names."""
