"""Drives a step: its generator computes in a worker thread, what it yields is sent, and replies are fed back to it.

A step is the device's part of a round or of an evaluation (rounds.py), and knows neither sockets nor threads. Its
session awaits `StepDriver.drive` on the event loop. At most one thread is inside the generator at a time, and it is
closed before `drive` comes back, whatever ended it: closing takes the weights back to θ, and until then nothing else
may touch them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from hosl_edge.rounds import Receive, Send, Step
from hosl_protocol.program.waiting import within
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import (
    CutGradient,
    EvalResult,
    EvalStart,
    Late,
    Message,
    ProbeLoss,
    RoundStart,
    name_of,
)

log = logging.getLogger(__name__)

_REPLIES = (CutGradient, ProbeLoss, EvalResult, Late)

T = TypeVar("T")


class _Superseded(Exception):
    """The cloud has moved on while a step waited; carries what came instead."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame


@dataclass(frozen=True)
class StepDriver:
    """Drives the steps of one connection, one after the other."""

    send: Callable[[Message, Mapping[str, Any]], None]
    receive: Callable[[], Awaitable[Frame]]
    """Waits for the next frame; raises what ends the connection."""
    say: Callable[[str], None]
    """Shows a sentence to the person at the device."""

    async def drive(self, steps: Step, start: RoundStart | EvalStart, patience_s: float | None = None) -> Frame | None:
        """Run the step that `start` began to its end. Returns what the cloud sent instead of a reply, if it did.

        A reply that does not come within `patience_s` seconds ends the device's part; None waits for ever.
        """
        reply: Frame | None = None

        def advance() -> Send | Receive | None:
            """Compute up to the next action; None at the end, for StopIteration does not pass through a future."""
            try:
                return steps.send(reply)
            except StopIteration:
                return None

        try:
            while (action := await in_thread(advance)) is not None:
                reply = None
                if isinstance(action, Send):
                    self.send(action.message, action.tensors)
                else:
                    reply = await within(patience_s, self._reply_to(action, start))
        except asyncio.TimeoutError:
            self.say(f"no answer in round {start.round} for {patience_s:.0f} s; it goes on without this device")
        except _Superseded as superseded:
            log.info("the cloud sent %s during a step", name_of(superseded.frame.message))
            return superseded.frame
        finally:
            # In a thread, as all that the generator does: on the way out it runs a pass over the weights.
            await in_thread(steps.close)
        return None

    async def _reply_to(self, expected: Receive, start: RoundStart | EvalStart) -> Frame:
        """Wait for the reply that a step waits for; repeats and what is of another attempt are dropped on the way."""
        while True:
            frame = await self.receive()
            message = frame.message
            if not isinstance(message, _REPLIES):
                if message == start:  # the cloud repeats what it has no sign of
                    log.info("a repeated %s is dropped", name_of(message))
                    continue
                raise _Superseded(frame)

            named = (message.run, message.epoch, message.round, message.attempt)
            if named != (start.run, start.epoch, start.round, start.attempt):
                log.info("%s of another attempt is dropped", name_of(message))
                if isinstance(message, Late):
                    self.say(late_sentence(message))
            elif isinstance(message, Late):
                raise _Superseded(frame)
            elif (type(message), message.id) == (expected.kind, expected.id):
                return frame
            else:
                log.info("a repeated %s is dropped", name_of(message))


def late_sentence(message: Late) -> str:
    """Say for people which answer the cloud did not take, and why."""
    why = f"not taken: {message.reason}" if message.reason else "left out"
    return f"its {message.answer} of round {message.round} was {why}"


async def in_thread(work: Callable[[], T], on_cancel: Callable[[], None] = lambda: None) -> T:
    """Do `work` in a worker thread; who is cancelled meanwhile still waits for its end, and calls `on_cancel` before.

    A thread cannot be interrupted, and must not go on behind our back with weights and files that others then use.
    """
    future = asyncio.get_running_loop().run_in_executor(None, work)

    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        on_cancel()
        # However often we are told to stop: each time cancels only this wait.
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future})
        raise
