"""An evaluation round: the tail scores the devices' held-out data.

A generator like those of rounds/algorithms.py, driven the same way. It changes no weights, so it is never void: devices
that did not send all they promised are left out of the score.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from hosl_cloud.exceptions import BatchError, NotFiniteError
from hosl_cloud.rounds.exchange import (
    Action,
    Ask,
    BatchArrays,
    CloudRound,
    Exchange,
    Fault,
    Tell,
    batch_of,
    blame,
    break_off,
    first_few,
    is_finite,
    leave_out,
    refuse,
)
from hosl_cloud.storage.class_counts import MOST_CLASSES, ClassCounts
from hosl_cloud.storage.records import Evaluation
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import EvalBatch, EvalResult, EvalStart

log = logging.getLogger(__name__)


@dataclass
class _Progress:
    """How far a device has come with sending its held-out data, and what it scored."""

    promised: int
    """Examples, by its Ready: neither more nor fewer count."""
    sent: int = 0
    scored_examples: int = 0
    losses: list[float] = field(default_factory=list)
    """Sums over what was scored."""
    scores: list[tuple[int, int]] = field(default_factory=list)
    """Right, and out of how many."""
    classes: list[tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]]] = field(default_factory=list)
    """Of each batch the true classes and the predicted ones, where the task has classes that are counted."""
    is_complete: bool = False
    is_at_fault: bool = False
    """Whether it did what no working device does; one that left, or is slow, did not."""


@dataclass(frozen=True)
class EvaluationResult:
    """The score, and who was left out of it."""

    evaluation: Evaluation | None
    """None where nobody sent all of its own."""
    unfinished: frozenset[str]
    """Devices that did not send all they have."""


def evaluate(
    context: CloudRound, examples: Mapping[str, int], digests: Mapping[str, str] | None = None
) -> Exchange[EvaluationResult]:
    """Score the held-out data of `context.devices`, a batch of each in turn.

    `examples` is how many each device of the run has by its own word, those that are away too, and `digests` is of
    these. One that leaves half way counts for nothing: a part is no fair sample. One at fault is left out as if it were
    not there, so that its word weighs nothing.
    """
    progress_of = {device: _Progress(examples[device]) for device in context.devices}
    kept = set() if context.kept is None else context.kept.evaluation_names() & set(context.devices)
    for device in context.devices:
        if device in kept and _score_kept(context, device, progress_of[device]):
            continue
        kept.discard(device)
        progress_of[device] = _Progress(examples[device])
        yield Tell(device, EvalStart(**context.name(0)))
    # `asks` has one entry for each device that is still to send; a device is asked again once its batch is scored.
    asks = [Ask(device, EvalBatch, context.round) for device in context.devices if device not in kept]

    while asks:
        answers = yield from first_few(asks, context.trainer.at_once)
        fitting = yield from _count(answers, progress_of)
        scored = yield from evaluate_batches(context, fitting)

        for ask, _ in fitting:  # those that were refused do not come back
            progress_of[ask.device].is_at_fault = ask.device not in {each.device for each, _, _ in scored}
        for ask, frame, result in scored:
            if (yield from _note(context, ask, frame, result, progress_of[ask.device])):
                asks.append(ask)

    unfinished = frozenset(name for name, progress in progress_of.items() if not progress.is_complete)
    return EvaluationResult(_pool(context, progress_of, examples, digests), unfinished)


def _score_kept(context: CloudRound, device: str, progress: _Progress) -> bool:
    """Score a device's held-out data that is kept here; False where a part of it is damaged."""
    assert context.kept is not None
    for batch in context.kept.held_out(device):
        if batch is None:
            return False
        (result,) = context.trainer.evaluate_many([batch])
        if isinstance(result, (BatchError, NotFiniteError)) or not math.isfinite(result.loss):
            log.warning("round %d: a kept batch of %s: %s", context.round, device, result, extra={"device": device})
            return True  # the tail has diverged: the device counts for nothing, as if it had sent the batch
        _add(context, batch, result, progress)
    progress.is_complete = True
    return True


def _count(
    answers: Sequence[tuple[Ask, Frame | None]], progress_of: Mapping[str, _Progress]
) -> Generator[Action, None, list[tuple[Ask, Frame]]]:
    """Count what came, and keep the answers of devices that keep to what they promised; the others are refused."""
    fitting = []
    for ask, frame in answers:
        if frame is None:
            continue
        progress = progress_of[ask.device]
        assert isinstance(frame.message, EvalBatch)
        # Its own word from Ready binds it: with fewer or more examples its score would be of other data.
        progress.sent += len(frame.tensors["lengths"])
        is_short = frame.message.last and progress.sent < progress.promised
        if not is_short and progress.sent <= progress.promised:
            fitting.append((ask, frame))
            continue

        progress.is_at_fault = True
        problem = f"{'fewer' if is_short else 'more'} held-out examples than it said it has"
        yield Fault(ask.device, problem)
        got = f"{progress.sent} with the last batch" if is_short else f"{progress.sent} so far"
        yield Tell(ask.device, break_off(f"{problem}: ready with {progress.promised}, got {got}"))
    return fitting


def _note(
    context: CloudRound, ask: Ask, frame: Frame, result: Any, progress: _Progress
) -> Generator[Action, None, bool]:
    """Note a batch's score and tell it; True where the device is to send another."""
    assert isinstance(frame.message, EvalBatch)
    if not math.isfinite(result.loss):
        progress.is_at_fault = not is_finite(batch_of(frame))
        yield leave_out(ask.device, frame.message, result.why)
        return False

    batch = batch_of(frame)
    if context.kept is not None:
        context.kept.keep_held_out(ask.device, progress.scored_examples, batch)
    _add(context, batch, result, progress)
    progress.is_complete = frame.message.last
    reply = EvalResult(**context.name(frame.message.id), correct=result.correct, scored=result.scored)
    yield Tell(ask.device, reply, {"loss": np.float32(result.loss).reshape(())})
    return not progress.is_complete


def _add(context: CloudRound, batch: BatchArrays, result: Any, progress: _Progress) -> None:
    """Add a batch's score to its device's."""
    progress.scored_examples += len(batch[1])
    progress.losses.append(result.loss * result.scored)
    progress.scores.append((result.correct, result.scored))
    if result.predicted_B is not None and len(context.config.task.labels) <= MOST_CLASSES:
        # Small, for many devices may evaluate at once.
        progress.classes.append((batch[2].astype(np.int16), result.predicted_B.astype(np.int16)))


def _pool(
    context: CloudRound,
    progress_of: Mapping[str, _Progress],
    examples: Mapping[str, int],
    digests: Mapping[str, str] | None,
) -> Evaluation | None:
    """Pool the scores of the devices that sent all; None where nothing was scored."""
    # One mean over all predictions, whoever made them; fsum, for it does not depend on the devices' order.
    complete = {device: progress for device, progress in progress_of.items() if progress.is_complete}
    scores = [score for progress in complete.values() for score in progress.scores]
    correct, scored = (sum(each) for each in zip(*scores, strict=True)) if scores else (0, 0)
    if not scored:
        return None

    by_class = _count_classes(context, complete.values())
    return Evaluation(
        context.round,
        math.fsum(loss for progress in complete.values() for loss in progress.losses) / scored,
        correct,
        scored,
        examples=sum(progress.promised for progress in complete.values()),
        of_examples=sum(examples.values())
        - sum(progress.promised for progress in progress_of.values() if progress.is_at_fault),
        held_out="" if digests is None else _digest_of({device: digests[device] for device in complete}),
        macro_f1=None if by_class is None else by_class.macro_f1,
        by_class=by_class,
    )


def _count_classes(context: CloudRound, complete: Iterable[_Progress]) -> ClassCounts | None:
    """Count the predictions class by class; None where the task has no classes, or too many."""
    batches = [batch for progress in complete for batch in progress.classes]
    if not batches:
        return None
    labels, predicted = (np.concatenate(each) for each in zip(*batches, strict=True))
    return ClassCounts.count(labels, predicted, len(context.config.task.labels))


def _digest_of(held_out: Mapping[str, str]) -> str:
    """Make one digest of several devices' held-out data: scores of the same digest can be compared."""
    return hashlib.sha256(msgspec.json.encode(sorted(held_out.items()))).hexdigest()


@dataclass(frozen=True)
class _NotFinite:
    """The score of a batch whose loss is no number."""

    why: str
    loss: float = math.nan
    correct: int = 0
    scored: int = 0
    predicted_B: None = None


def evaluate_batches(
    context: CloudRound, answers: Sequence[tuple[Ask, Frame | None]]
) -> Generator[Action, None, list[tuple[Ask, Frame, Any]]]:
    """Score the answers that came, a batch [T, D] each; a device whose batch contradicts itself is refused."""
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
