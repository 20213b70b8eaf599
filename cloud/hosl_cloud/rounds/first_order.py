"""First-order training as the cloud sees it: the devices send their exact gradients, and the average goes back.

A gradient is in a few bits a number (hosl_protocol/arithmetic/rotation.py), and so is the average. No whole gradient of
many devices is ever in memory: `average_gradients` decodes a chunk of all of them at a time.

Shapes: K devices, N elements of a chunk, C bytes of codes, P scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hosl_cloud.rounds.aggregation import average_rows
from hosl_cloud.rounds.anchors import RoundResult, train_and_ask
from hosl_cloud.rounds.exchange import CloudRound, Doubles, Exchange, Floats
from hosl_cloud.settings import DeviceSettings
from hosl_protocol.arithmetic.directions import CHUNK
from hosl_protocol.arithmetic.rotation import Codes, GradientLayout, Rotation
from hosl_protocol.weights.estimates import UPDATE_ROTATION
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import Gradient

LARGEST_SCALE = 1e7
"""Magnitude from which a gradient's scale is taken for a fault of its device.

Of scales below it no average is larger than AdamW can square (adamw.LARGEST_ESTIMATE): the norm of a block is at most
4096 · 255 times its scale, and the average's own compression makes no entry larger than 64 times that.
"""


def first_order_round(context: CloudRound) -> Exchange[RoundResult | None]:
    """First-order: train the tail on every Anchor, hand λ_m back, average the gradients that devices make of it."""
    answered = yield from train_and_ask(context, Gradient, _read_gradient)
    if answered is None:
        return None

    contributors, gradients = answered
    assert context.layout is not None
    codes, scales = average_gradients(
        gradients, contributors.weights, context.config.devices, context.layout, context.config.seed, context.round
    )
    return contributors.outcome(context, scales, codes)


@dataclass(frozen=True)
class SentGradient:
    """A device's gradient as it came."""

    codes: Codes
    scales: Floats
    rotation: int


def _read_gradient(frame: Frame) -> SentGradient | None:
    """Take a gradient out of a device's answer; None where its scales cannot be."""
    assert isinstance(frame.message, Gradient)
    scales = frame.tensors["scales"]
    # Written so that NaN fails it, too.
    if not float(np.abs(scales).max(initial=0.0)) < LARGEST_SCALE:
        return None
    return SentGradient(frame.tensors.get("codes", np.empty(0, np.uint8)), scales, frame.message.rotation)


def average_gradients(
    gradients: Mapping[str, SentGradient],
    weights: Mapping[str, float],
    devices: DeviceSettings,
    layout: GradientLayout,
    seed: int,
    round_: int,
) -> tuple[Codes, Floats]:
    """Average the devices' gradients, entry by entry, and compress the average: its codes [C] and scales [P].

    Zeros where no device sent one. The order of `gradients` does not matter for the result's bits.
    """
    codes, scales = layout.empty()
    if not gradients:
        return codes, scales

    # By name: a sum of float64 rounds, always in the same order.
    senders = [
        _Sender(gradients[name], weights[name], Rotation(seed, round_, gradients[name].rotation))
        for name in sorted(gradients)
    ]
    factors = _clip_factors(senders, layout, devices.clip)

    for index, size in enumerate(layout.sizes):
        average = np.empty(size, np.float32)
        for start in range(0, size, CHUNK):
            out = average[start : start + CHUNK]
            out[:] = _average_chunk(senders, factors, devices, layout, index, start, out.size)
        layout.encode(average, index, Rotation(seed, round_, UPDATE_ROTATION), codes, scales)
    return codes, scales


@dataclass(frozen=True)
class _Sender:
    gradient: SentGradient
    weight: float
    rotation: Rotation

    def decode(self, layout: GradientLayout, index: int, start: int, out: Floats) -> None:
        layout.decode(self.gradient.codes, self.gradient.scales, index, self.rotation, start, out)


def _average_chunk(
    senders: Sequence[_Sender],
    factors: Sequence[float],
    devices: DeviceSettings,
    layout: GradientLayout,
    index: int,
    start: int,
    elements: int,
) -> Doubles:
    """Average `elements` entries of tensor `index`."""
    if devices.aggregation == "mean":
        # One device at a time: a mean needs no more.
        total, decoded = np.zeros(elements), np.empty(elements, np.float32)
        for sender, factor in zip(senders, factors, strict=True):
            sender.decode(layout, index, start, decoded)
            total += sender.weight * factor * decoded.astype(np.float64)
        return total / math.fsum(sender.weight for sender in senders)

    v_KN = np.empty((len(senders), elements), np.float32)
    for row, sender, factor in zip(v_KN, senders, factors, strict=True):
        sender.decode(layout, index, start, row)
        row *= np.float32(factor)
    return average_rows(v_KN, np.array([sender.weight for sender in senders]), devices.aggregation, devices.trim)


def _clip_factors(senders: Sequence[_Sender], layout: GradientLayout, clip: float) -> list[float]:
    """Find by how much each device's gradient is made shorter, where it is longer than `clip` times the median."""
    if clip == 0.0:
        return [1.0] * len(senders)
    norms = [_norm(sender, layout) for sender in senders]
    limit = clip * float(np.median(norms))
    return [limit / norm if norm > limit else 1.0 for norm in norms]


def _norm(sender: _Sender, layout: GradientLayout) -> float:
    """Compute a gradient's length, a chunk at a time."""
    squares = []
    for index, size in enumerate(layout.sizes):
        for start in range(0, size, CHUNK):
            out = np.empty(min(CHUNK, size - start), np.float32)
            sender.decode(layout, index, start, out)
            squares.append(float(np.square(out, dtype=np.float64).sum()))
    return math.sqrt(math.fsum(squares))
