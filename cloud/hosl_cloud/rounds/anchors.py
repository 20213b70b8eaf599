"""What rounds of every algorithm share: the devices' Anchors train the tail, λ goes back, and the update is made.

Shapes: T tokens of a batch without padding, D width of the cut layer, P coefficients of an update, C bytes of codes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from hosl_cloud.exceptions import BatchError, NotFiniteError, RoundSpoiltError
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
from hosl_protocol.run.schedule import scheduled_rate
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import Anchor, CutGradient, Gradient, Message, Projections, name_of

log = logging.getLogger(__name__)

FLOAT16_EXPONENT = 15
"""λ goes to float16 with its largest magnitude from 2^14 up to 2^15, half of what the type holds."""

T = TypeVar("T")


@dataclass(frozen=True)
class RoundResult:
    """A round that counts: what it does to the devices' weights, and its figures."""

    update: UpdateRecord
    loss: float
    """Weighted mean of the devices' losses at the clean weights, before the tail's step."""
    devices: tuple[str, ...]
    """Who took part in the tail's step."""


@dataclass(frozen=True)
class Contributors:
    """The devices whose gradients are in the tail's step, with their weights and losses."""

    weights: dict[str, float]
    losses: dict[str, float]

    @property
    def total(self) -> float:
        """Sum of the weights."""
        return math.fsum(self.weights.values())

    def outcome(
        self, context: CloudRound, estimates: npt.NDArray[Any], codes: npt.NDArray[np.uint8] | None = None
    ) -> RoundResult:
        """Make the round's result of `estimates` [P], the coefficients of the estimate, and `codes` [C]."""
        update = make_update(context, estimates, codes)
        loss = math.fsum(weight * self.losses[device] for device, weight in self.weights.items()) / self.total
        return RoundResult(update, loss, tuple(device for device in context.devices if device in self.weights))


def make_update(
    context: CloudRound, estimates: npt.NDArray[Any], codes: npt.NDArray[np.uint8] | None = None
) -> UpdateRecord:
    """Make the update of an estimate at the round's scheduled rate.

    `estimates` [P] are the coefficients of Σ_p estimate_p · z_p, or with `codes` [C] the scales of a gradient. With
    AdamW the devices apply the rate themselves. A number beyond float32 becomes infinite, and nobody is told it
    (Coordinator._bounded).
    """
    # SGD's step is in the coefficients; float32, for that is what is stored, sent and added by every device.
    optimizer = context.config.client
    rate = scheduled_rate(optimizer, context.round, context.config.rounds)
    scaled: Doubles = estimates.astype(np.float64)
    with np.errstate(over="ignore"):
        coefficients = (scaled if optimizer.optimizer == "adamw" else -rate * scaled).astype(np.float32)
    return UpdateRecord(context.round, coefficients, rate, np.empty(0, np.uint8) if codes is None else codes)


def step_tail(context: CloudRound, contributors: Contributors) -> bool:
    """Make one first-order step of the tail on Σ w_m grad_m; False, which voids the round, where that is not finite."""
    try:
        context.trainer.step(context.round, contributors.total)
    except RoundSpoiltError as error:
        log.warning("round %d: the tail makes no step: %s", context.round, error)
        return False
    return True


def train_and_ask(
    context: CloudRound, kind: type, read: Callable[[Frame], T | None]
) -> Exchange[tuple[Contributors, dict[str, T]] | None]:
    """Train the tail on every Anchor, hand λ_m back, and take what each device makes of it, an answer of this kind.

    `read` takes the numbers out of an answer, and is None for such as no working device sends. None where the round is
    void.
    """
    yield from context.start()
    contributors = yield from take_anchors(context, wants_cut_gradient=True)
    if contributors is None:
        return None

    # Devices compute while the tail makes its step; a strict round may still be void, and steps when it is whole.
    if not (context.config.strict or step_tail(context, contributors)):
        return None

    answers = yield from _take_answers(context, contributors, kind, read)
    if context.config.strict and not (len(answers) == context.quorum and step_tail(context, contributors)):
        context.trainer.discard()
        return None
    return contributors, answers


def _take_answers(
    context: CloudRound, contributors: Contributors, kind: type, read: Callable[[Frame], T | None]
) -> Exchange[dict[str, T]]:
    """Take each contributor's answer; one that sends none, or numbers that cannot be, is left out of the average."""
    answers: dict[str, T] = {}
    asks, numbers = [Ask(device, kind, context.round) for device in contributors.weights], _NUMBERS[kind]
    while asks:
        ask, frame = yield from first(asks)
        if frame is None:
            log.warning(
                "round %d: %s is left out of the average: no %s",
                context.round,
                ask.device,
                name_of(kind),
                extra={"device": ask.device},
            )
            continue

        values = read(frame)
        if values is None:
            yield Fault(ask.device, f"{numbers} that are not finite, or absurd")
            yield leave_out(ask.device, frame.message, f"its {numbers} are not finite, or absurd")
            continue
        answers[ask.device] = values
    return answers


_NUMBERS: dict[type, str] = {Projections: "projections", Gradient: "gradient's scales"}
"""What the numbers of an answer are called."""


def take_anchors(
    context: CloudRound,
    *,
    wants_cut_gradient: bool,
    devices: Sequence[str] | None = None,
    midpoints: Mapping[str, BatchArrays] | None = None,
    kept: set[str] | None = None,
) -> Exchange[Contributors | None]:
    """Add up Σ w_m grad_m over the devices' Anchors; None, and no gradient, where fewer came than the quorum.

    `midpoints` stand for the devices' Anchors where they send none. The batches of the devices in `kept` are here.
    """
    contributors = Contributors({}, {})
    asks = [Ask(device, Anchor, context.round) for device in (context.devices if devices is None else devices)]

    while asks:
        if midpoints is not None:
            uploads = [_Upload(ask.device, midpoints[ask.device]) for ask in asks[: context.trainer.at_once]]
            del asks[: context.trainer.at_once]
        else:
            uploads = yield from _next_uploads(context, asks, set() if kept is None else kept)
        yield from _backpropagate(context, uploads, contributors, wants_cut_gradient)

    if not contributors.weights or len(contributors.weights) < context.quorum:
        if contributors.weights:
            log.warning(
                "round %d: %d devices of a quorum of %d", context.round, len(contributors.weights), context.quorum
            )
        context.trainer.discard()
        return None
    return contributors


def _next_uploads(context: CloudRound, asks: list[Ask], kept: set[str]) -> Exchange[list[_Upload]]:
    """Take as many batches as the trainer takes at once; a strict run takes them in order, however they arrive."""
    uploads: list[_Upload | None] = []
    if context.config.strict:
        for ask in asks[: context.trainer.at_once]:
            upload = yield from _take_kept(context, ask.device, kept)
            uploads.append(upload or _received(context, *(yield from first([ask]))))
            asks.remove(ask)
        return [upload for upload in uploads if upload is not None]

    for ask in [ask for ask in asks if ask.device in kept][: context.trainer.at_once]:
        upload = yield from _take_kept(context, ask.device, kept)
        if upload is not None:
            asks.remove(ask)
            uploads.append(upload)
    if not uploads:
        answers = yield from first_few(asks, context.trainer.at_once)
        uploads += [_received(context, ask, frame) for ask, frame in answers]
    return [upload for upload in uploads if upload is not None]


def _take_kept(context: CloudRound, device: str, kept: set[str]) -> Exchange[_Upload | None]:
    """Read the batch of a device in `kept`; one that turns out to be damaged is asked for after all."""
    if context.kept is None or device not in kept:
        return None
    batch = context.kept.batch(device, context.round)
    if batch is None:
        kept.remove(device)
        yield from context.start([device])
        return None
    return _Upload(device, batch, is_kept=True)


def _received(context: CloudRound, ask: Ask, frame: Frame | None) -> _Upload | None:
    """Make an upload of what came; of an example that is kept the kept numbers count."""
    if frame is None:
        return None
    batch, message = batch_of(frame), frame.message
    assert isinstance(message, Anchor)
    places = None if message.places is msgspec.UNSET else message.places
    if context.kept is not None:
        batch = context.kept.settle(ask.device, context.round, batch, places)
    return _Upload(ask.device, batch, message, places)


@dataclass(frozen=True)
class _Upload:
    """A device's batch, and the Anchor that brought it; None where its probes' mean stands for one, or it is kept."""

    device: str
    batch: BatchArrays
    anchor: Message | None = None
    places: Sequence[int] | None = None
    """Where its examples stand in the device's data, where it says so."""
    is_kept: bool = False
    """Whether it was read from the cache."""

    def leave_out(self, reason: str) -> Generator[Action, None, None]:
        """Tell the device that no λ will come."""
        if self.anchor is not None:
            yield leave_out(self.device, self.anchor, reason)


def _backpropagate(
    context: CloudRound, uploads: Sequence[_Upload], contributors: Contributors, wants_cut_gradient: bool
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
            if not upload.is_kept:
                yield refuse(device, result)
        elif spoilt:
            yield from upload.leave_out("the gradients that it was added to are not finite")
        else:
            contributors.weights[device], contributors.losses[device] = weight, result.loss
            if context.kept is not None and not upload.is_kept:
                context.kept.keep(device, context.round, upload.batch, upload.places)
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
