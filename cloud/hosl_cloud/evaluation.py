"""An evaluation round: the tail scores the devices' held-out data."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from hosl_cloud.exceptions import BatchError, NotFiniteError
from hosl_cloud.exchange import Action, Ask, Exchange, RoundContext, Tell, batch_of, blame, first_few, refuse
from hosl_cloud.records import Evaluation
from hosl_protocol import EvalBatch, EvalResult, EvalStart, Frame

log = logging.getLogger(__name__)


def evaluate(context: RoundContext, examples: Mapping[str, int]) -> Exchange[Evaluation | None]:
    """Score the held-out data of `context.devices`, a batch of each in turn; None where nobody sent all of its own.

    `examples` is how many each device has. One that leaves half way counts for nothing: a part is no fair sample.
    """
    for device in context.devices:
        yield Tell(device, EvalStart(**context.name(0)))
    losses: dict[str, list[float]] = {device: [] for device in context.devices}
    scores = {device: np.zeros(2, np.int64) for device in context.devices}  # correct, scored
    complete: list[Ask] = []
    asks = [Ask(device, EvalBatch, context.round) for device in context.devices]
    while asks:
        answers = yield from first_few(asks, context.trainer.at_once)
        for ask, frame, result in (yield from evaluate_batches(context, answers)):
            assert isinstance(frame.message, EvalBatch)
            if not math.isfinite(result.loss):
                continue
            losses[ask.device].append(result.loss * result.scored)
            scores[ask.device] += result.correct, result.scored
            reply = EvalResult(**context.name(frame.message.id), correct=result.correct, scored=result.scored)
            yield Tell(ask.device, reply, {"loss": np.float32(result.loss).reshape(())})
            (complete if frame.message.last else asks).append(ask)
    devices = [ask.device for ask in complete]
    correct, scored = map(int, sum((scores[device] for device in devices), np.zeros(2, np.int64)))
    if not scored:
        return None
    return Evaluation(
        context.round,
        math.fsum(chain(*(losses[device] for device in devices))) / scored,
        correct,
        scored,
        examples=sum(examples[device] for device in devices),
        of_examples=sum(examples[device] for device in context.devices),
    )


@dataclass(frozen=True)
class _NotFinite:
    """The score of a batch whose loss is no number."""

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
            yield from blame(ask.device, batch_of(frame))
            score = _NotFinite()
        scored.append((ask, frame, score))
    return scored
