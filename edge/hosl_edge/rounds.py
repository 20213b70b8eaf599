"""The device's part of a round, as generators without I/O: they yield what to send and receive the replies.

HO-SFL (arXiv 2603.14773), HOSL (arXiv 2601.10940) and the frozen client, as the papers give them, and first-order
training; the cloud's part is in hosl_cloud/rounds/algorithms.py. StepDriver.drive in driver.py leads a generator, in a
simulation VirtualDevice in hosl_cloud/simulation/virtual_devices.py. A device only probes, or sends its gradient: the
estimate is the cloud's, and moves the weights when its Update comes (Session._update). Whatever ends a generator, the
weights stand at θ again.
Shapes: T tokens of the batch, D width of the cut layer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from hosl_edge.data.datasets import Batch, Dataset
from hosl_edge.model.shard import Shard
from hosl_protocol.arithmetic.rotation import Rotation, rotation_of
from hosl_protocol.exceptions import ProtocolError
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.updates import gradient_layout
from hosl_protocol.weights.client_weights import ClientWeights, ProbePoint
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import (
    MAX_PLACES,
    Anchor,
    CutGradient,
    EvalBatch,
    EvalResult,
    Gradient,
    Message,
    Places,
    Probe,
    ProbeLoss,
    Projections,
)

Activations: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Send:
    """Send this; go on at once. The tensors stay unchanged until the reply to it has come."""

    message: Message
    tensors: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Receive:
    """Wait for the reply to the message with this id, which should be of this kind."""

    kind: type
    id: int = 0


Step: TypeAlias = Generator["Send | Receive", "Frame | None", None]
"""The device's part of a round, or of an evaluation, as StepDriver leads it."""


@dataclass(frozen=True)
class DeviceRound:
    """What the device needs to know for its part of a round, or of an evaluation."""

    run: str
    device: str
    """Its name."""
    epoch: int
    round: int
    settings: RunSettings
    shard: Shard
    weights: ClientWeights
    held_sets: int
    """Activation sets that the memory budget lets a round hold besides those it must."""
    attempt: int = 0
    """Which start of the round this is."""

    def name(self, id_: int) -> dict[str, Any]:
        """The fields that name a message of this round."""
        return {"run": self.run, "epoch": self.epoch, "round": self.round, "attempt": self.attempt, "id": id_}

    @contextmanager
    def probing(self, batch: Batch) -> Iterator[None]:
        """Let weights leave θ for forwards of `batch`, within; they stand at θ again at the end, whatever ended it."""
        with self.shard.holding(batch):
            try:
                yield
            finally:
                self.weights.probe(None)

    def empty_set(self, batch: Batch) -> Activations:
        """Memory for one set of activations [T, D]."""
        return np.empty((batch.tokens, self.shard.manifest.width), np.float32)


def ho_sfl_part(context: DeviceRound, batch: Batch) -> Step:
    """HO-SFL: activations up, λ down, P projections v_p = ⟨λ, Δ_p⟩ up.

    Δ_p is f(θ + μu_p) − f(θ); with the midpoint anchor (f(θ + μu_p) − f(θ − μu_p)) / 2, and the activations that go up
    are the mean of the first pair.
    """
    is_midpoint = context.settings.anchor == "midpoint"
    directions = range(context.settings.directions)
    with context.probing(batch):
        differences: list[Activations] = []
        if is_midpoint:
            anchor_TD, first_TD = _probe_pair(context, batch, 0)
            differences.append(first_TD)
        else:
            anchor_TD = context.shard.activations(batch, context.empty_set(batch))
        # The cloud waits for the Anchor first, and works while the differences are computed.
        yield Send(Anchor(**context.name(0)), _upload(anchor_TD, batch))
        # These run while the cloud computes; what they hold is bounded by the memory budget.
        while len(differences) < min(context.held_sets + is_midpoint, len(directions)):
            differences.append(_difference(context, batch, len(differences), anchor_TD))
        if len(differences) == len(directions):
            context.weights.probe(None)

        lambda_TD, exponent = _read_lambda((yield Receive(CutGradient)), anchor_TD.shape)

        # Those that were held cost an inner product; the others are probed now, a micro-batch at a time.
        projections = [_inner(lambda_TD, difference_TD) for difference_TD in differences]
        early = len(differences)
        differences.clear()
        for p in directions[early:]:
            projections.append(_project(context, batch, p, anchor_TD, lambda_TD))

    # λ came divided by 2^exponent, which float16 needs; the projections are linear in it.
    scaled = np.ldexp(np.array(projections), exponent).astype(np.float32)
    yield Send(Projections(**context.name(1)), {"projections": scaled})


def _read_lambda(reply: Frame | None, shape: tuple[int, ...]) -> tuple[Activations, int]:
    """Take λ [T, D] out of a CutGradient, and the exponent of the power of two that it was divided by."""
    assert reply is not None
    assert isinstance(reply.message, CutGradient)
    lambda_TD = reply.tensors["lambda"]
    if lambda_TD.shape != shape:
        raise ProtocolError(f"λ has shape {list(lambda_TD.shape)}, expected that of the Anchor, {list(shape)}")
    return lambda_TD, reply.message.exponent


def _probe_pair(context: DeviceRound, batch: Batch, direction: int) -> tuple[Activations, Activations]:
    """(f(θ + μu) + f(θ − μu)) / 2 and (f(θ + μu) − f(θ − μu)) / 2 [T, D]; two sets, and no third on the way."""
    context.weights.probe(ProbePoint(context.round, direction, +1))
    plus_TD = context.shard.activations(batch, context.empty_set(batch))
    context.weights.probe(ProbePoint(context.round, direction, -1))
    minus_TD = context.shard.activations(batch, context.empty_set(batch))
    plus_TD -= minus_TD
    plus_TD *= np.float32(0.5)
    minus_TD += plus_TD
    return minus_TD, plus_TD


def _difference(context: DeviceRound, batch: Batch, direction: int, clean_TD: Activations) -> Activations:
    """Compute Δ_p [T, D] of one direction, from f(θ) [T, D] or by a central difference."""
    if context.settings.anchor == "midpoint":
        return _probe_pair(context, batch, direction)[1]
    context.weights.probe(ProbePoint(context.round, direction, +1))
    difference_TD = context.shard.activations(batch, context.empty_set(batch))
    difference_TD -= clean_TD
    return difference_TD


def _project(
    context: DeviceRound, batch: Batch, direction: int, scratch_TD: Activations, lambda_TD: Activations
) -> float:
    """Compute v_p micro-batch by micro-batch: no further set of activations is held.

    `scratch_TD` holds f(θ), or with the midpoint anchor nothing that is needed: it takes f(θ − μu_p).
    """
    is_midpoint = context.settings.anchor == "midpoint"
    if is_midpoint:
        context.weights.probe(ProbePoint(context.round, direction, -1))
        context.shard.activations(batch, scratch_TD)

    context.weights.probe(ProbePoint(context.round, direction, +1))
    parts = context.shard.forward(batch)
    total = sum(_inner(lambda_TD[place], probed_TD - scratch_TD[place]) for place, probed_TD in parts)
    return 0.5 * total if is_midpoint else total


def _inner(a: Activations, b: Activations) -> float:
    return float(np.vdot(a, b))


def hosl_part(context: DeviceRound, batch: Batch) -> Step:
    """HOSL: activations of θ ± εz_q up, 2Q of them, then the clean ones.

    With the midpoint anchor nothing follows the probes: the cloud takes their mean for the clean activations.
    """
    # +1 and -1 of a direction follow each other: from one to the other is a single step of -2ε.
    points: list[ProbePoint | None] = []
    for q in range(context.settings.directions):
        points += [ProbePoint(context.round, q, +1), ProbePoint(context.round, q, -1)]
    if context.settings.anchor == "clean":
        points.append(None)

    may_overlap = context.held_sets > 0
    with context.probing(batch):
        for id_, point in enumerate(points):
            if id_ and not may_overlap:
                yield Receive(ProbeLoss, id_ - 1)
            context.weights.probe(point)
            set_TD = context.shard.activations(batch, context.empty_set(batch))
            if id_ and may_overlap:  # the cloud evaluated the last probe while this one was computed
                yield Receive(ProbeLoss, id_ - 1)
            yield Send(_hosl_message(context, id_, point), _upload(set_TD, batch))
            del set_TD  # it is the link's now; the next one needs the memory

    # The weights stand at θ again: the last answer may come late.
    if points[-1] is not None:
        yield Receive(ProbeLoss, len(points) - 1)


def _hosl_message(context: DeviceRound, id_: int, point: ProbePoint | None) -> Probe | Anchor:
    if point is None:
        return Anchor(**context.name(id_))
    return Probe(**context.name(id_), direction=point.direction, sign=+1 if point.sign > 0 else -1)


def first_order_part(context: DeviceRound, batch: Batch) -> Step:
    """First-order: activations up, λ down, the gradient g = ∇_θ ⟨λ, f(θ)⟩ up, compressed.

    g = Σ_t J_t^T λ_t over the batch's tokens t, with J_t the Jacobian of f_t(θ): what backpropagation of the tail's
    loss through the whole model would give.
    """
    settings, shard = context.settings, context.shard
    with shard.holding(batch):
        kept = shard.last_inputs(1 + context.held_sets)
        anchor_TD = shard.activations(batch, context.empty_set(batch), kept)
        yield Send(Anchor(**context.name(0)), _upload(anchor_TD, batch))
        shape = anchor_TD.shape
        del anchor_TD  # it is the link's now; what is kept needs the memory

        lambda_TD, exponent = _read_lambda((yield Receive(CutGradient)), shape)
        layout = gradient_layout(settings, shard.manifest)
        rotation = Rotation(settings.seed, context.round, rotation_of(context.device))
        indices = {entry.name: index for index, entry in enumerate(shard.manifest.trainable)}
        codes, scales = layout.empty()
        for name, gradient in shard.gradients(batch, lambda_TD, kept):
            # λ came divided by 2^exponent, which float16 needs; the gradient is linear in it.
            np.ldexp(gradient, exponent, out=gradient)
            layout.encode(gradient.reshape(-1), indices[name], rotation, codes, scales)

    message = Gradient(**context.name(1), rotation=rotation.number)
    yield Send(message, {"scales": scales, "codes": codes})


def frozen_part(context: DeviceRound, batch: Batch) -> Step:
    """The control that both papers lack: only the tail trains, one upload a round."""
    clean_TD = context.shard.activations(batch, context.empty_set(batch))
    yield Send(Anchor(**context.name(0), places=_places(context, batch)), _upload(clean_TD, batch))


def _places(context: DeviceRound, batch: Batch) -> Places | msgspec.UnsetType:
    """Where the examples stand, for the cloud may keep what is the same in each pass; unset where images vary."""
    count = len(batch.indices_B)
    if context.settings.augmentation.is_on or not 0 < count <= MAX_PLACES:
        return msgspec.UNSET
    return tuple(batch.indices_B.tolist())


PARTS: dict[str, Callable[[DeviceRound, Batch], Step]] = {
    "ho-sfl": ho_sfl_part,
    "hosl": hosl_part,
    "first-order": first_order_part,
    "frozen": frozen_part,
}


def evaluate(context: DeviceRound, dataset: Dataset, on_result: Callable[[float, int, int], None]) -> Step:
    """Send the held-out data batch by batch; `on_result(mean loss, correct, scored)` hears of each."""
    size = context.settings.batch_size
    starts = range(0, len(dataset), size)
    order = dataset.evaluation_order()
    for id_, start in enumerate(starts):
        batch = dataset.batch(order[start : start + size])
        clean_TD = context.shard.activations(batch, context.empty_set(batch))
        message = EvalBatch(**context.name(id_), last=id_ == len(starts) - 1)
        yield Send(message, _upload(clean_TD, batch))

        reply = yield Receive(EvalResult, id_)
        assert reply is not None
        result = reply.message
        assert isinstance(result, EvalResult)
        on_result(float(reply.tensors["loss"]), result.correct, result.scored)


def _upload(activations_TD: Activations, batch: Batch) -> dict[str, npt.NDArray[Any]]:
    return {"activations": activations_TD, "lengths": batch.lengths_B, "labels": batch.labels_N}
