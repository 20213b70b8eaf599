"""An evaluation round: the tail scores the devices' held-out data."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from hosl_cloud.exceptions import BatchError, NotFiniteError
from hosl_cloud.rounds.exchange import (
    Action,
    Ask,
    Exchange,
    Fault,
    RoundContext,
    Tell,
    batch_of,
    blame,
    break_off,
    first_few,
    is_finite,
    leave_out,
    refuse,
)
from hosl_cloud.storage.records import Evaluation
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import EvalBatch, EvalResult, EvalStart

log = logging.getLogger(__name__)


@dataclass
class _Part:
    """What a device has sent of its held-out data, and what it scored."""

    promised: int
    """Examples, by its Ready: neither more nor fewer count."""
    sent: int = 0
    losses: list[float] = field(default_factory=list)
    """Sums over what was scored."""
    scores: list[tuple[int, int]] = field(default_factory=list)
    """Right, and out of how many."""
    is_complete: bool = False
    is_at_fault: bool = False
    """It did what no working device does; one that left, or is slow, did not."""


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation came to."""

    evaluation: Evaluation | None
    """None where nobody sent all of its own."""
    unfinished: frozenset[str]
    """Devices that did not send all they have."""


def evaluate(
    context: RoundContext, examples: Mapping[str, int], digests: Mapping[str, str] | None = None
) -> Exchange[Evaluated]:
    """Score the held-out data of `context.devices`, a batch of each in turn.

    `examples` is how many each device of the run has by its own word, those that are away too, and `digests` is of
    these. One that leaves half way counts for nothing: a part is no fair sample. One at fault is left out as if it were
    not there, so that its word weighs nothing.
    """
    for device in context.devices:
        yield Tell(device, EvalStart(**context.name(0)))
    parts = {device: _Part(examples[device]) for device in context.devices}
    asks = [Ask(device, EvalBatch, context.round) for device in context.devices]
    while asks:
        answers = yield from first_few(asks, context.trainer.at_once)
        fitting = yield from _count(answers, parts)
        scored = yield from evaluate_batches(context, fitting)
        for ask, _ in fitting:  # those that were refused do not come back
            parts[ask.device].is_at_fault = ask.device not in {each.device for each, _, _ in scored}
        for ask, frame, result in scored:
            if (yield from _note(context, ask, frame, result, parts[ask.device])):
                asks.append(ask)
    unfinished = frozenset(name for name, part in parts.items() if not part.is_complete)
    return Evaluated(_pooled(context, parts, examples, digests), unfinished)


def _count(
    answers: Sequence[tuple[Ask, Frame | None]], parts: Mapping[str, _Part]
) -> Generator[Action, None, list[tuple[Ask, Frame]]]:
    """The answers that came of devices that keep to what they promised; the others are refused."""
    fitting = []
    for ask, frame in answers:
        if frame is None:
            continue
        part = parts[ask.device]
        assert isinstance(frame.message, EvalBatch)
        part.sent += len(frame.tensors["lengths"])
        is_short = frame.message.last and part.sent < part.promised
        if not is_short and part.sent <= part.promised:
            fitting.append((ask, frame))
            continue
        part.is_at_fault = True
        problem = f"{'fewer' if is_short else 'more'} held-out examples than it said it has"
        yield Fault(ask.device, problem)
        got = f"{part.sent} with the last batch" if is_short else f"{part.sent} so far"
        yield Tell(ask.device, break_off(f"{problem}: ready with {part.promised}, got {got}"))
    return fitting


def _note(context: RoundContext, ask: Ask, frame: Frame, result: Any, part: _Part) -> Generator[Action, None, bool]:
    """Note a batch's score and tell it; True where the device is to send another."""
    assert isinstance(frame.message, EvalBatch)
    if not math.isfinite(result.loss):
        part.is_at_fault = not is_finite(batch_of(frame))
        yield leave_out(ask.device, frame.message, result.why)
        return False
    part.losses.append(result.loss * result.scored)
    part.scores.append((result.correct, result.scored))
    part.is_complete = frame.message.last
    reply = EvalResult(**context.name(frame.message.id), correct=result.correct, scored=result.scored)
    yield Tell(ask.device, reply, {"loss": np.float32(result.loss).reshape(())})
    return not part.is_complete


def _pooled(
    context: RoundContext, parts: Mapping[str, _Part], examples: Mapping[str, int], digests: Mapping[str, str] | None
) -> Evaluation | None:
    complete = {device: part for device, part in parts.items() if part.is_complete}
    scores = [score for part in complete.values() for score in part.scores]
    correct, scored = (sum(each) for each in zip(*scores, strict=True)) if scores else (0, 0)
    if not scored:
        return None
    return Evaluation(
        context.round,
        math.fsum(loss for part in complete.values() for loss in part.losses) / scored,
        correct,
        scored,
        examples=sum(part.promised for part in complete.values()),
        of_examples=sum(examples.values()) - sum(part.promised for part in parts.values() if part.is_at_fault),
        held_out="" if digests is None else _digest_of({device: digests[device] for device in complete}),
    )


def _digest_of(held_out: Mapping[str, str]) -> str:
    """One digest of several devices' held-out data."""
    return hashlib.sha256(msgspec.json.encode(sorted(held_out.items()))).hexdigest()


@dataclass(frozen=True)
class _NotFinite:
    """The score of a batch whose loss is no number."""

    why: str
    loss: float = math.nan
    correct: int = 0
    scored: int = 0


def evaluate_batches(
    context: RoundContext, answers: Sequence[tuple[Ask, Frame | None]]
) -> Generator[Action, None, list[tuple[Ask, Frame, Any]]]:
    """The answers that came, each with the tail's score; a device whose batch contradicts itself is refused."""
    came = [(ask, frame) for ask, frame in answers if frame is not None]
    scores = context.trainer.evaluate_many([batch_of(frame) for _, frame in came])
    scored: list[tuple[Ask, Frame, Any]] = []
    for (ask, frame), score in zip(came, scores, strict=True):
        if isinstance(score, BatchError):
            yield refuse(ask.device, score)
            continue
        if isinstance(score, NotFiniteError):
            extra = {"device": ask.device}
            log.warning("round %d: a batch of %s: %s", context.round, ask.device, score, extra=extra)
            score = _NotFinite((yield from blame(ask.device, batch_of(frame), score)))
        scored.append((ask, frame, score))
    return scored
