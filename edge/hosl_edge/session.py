"""One connection to the cloud, from Hello to its end: what each message asks of the device."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from hosl_edge import step
from hosl_edge.connection.farewell import farewell
from hosl_edge.connection.fetch import fetch_snapshot
from hosl_edge.connection.link import Link
from hosl_edge.connection.trust import Cloud
from hosl_edge.device import Device
from hosl_edge.exceptions import ConnectionLost, DataError, HistoryError, RefusedError, SnapshotError
from hosl_edge.host.display import Display, Progress
from hosl_edge.host.health import read_health
from hosl_edge.model.memory import read_memory
from hosl_protocol.exceptions import HoslError, ProtocolError
from hosl_protocol.program.waiting import within
from hosl_protocol.run.ordering import batch_indices
from hosl_protocol.weights.client_weights import UpdateRecord
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import (
    CatchUp,
    Complete,
    CutGradient,
    EvalResult,
    EvalStart,
    Hello,
    Late,
    Message,
    ProbeLoss,
    Ready,
    Refusal,
    Report,
    RoundStart,
    Snapshot,
    Update,
    Welcome,
    name_of,
)

log = logging.getLogger(__name__)

PATIENCE = 3
"""Deadlines of a stage for which a device waits for a reply of a cloud that still answers pings."""

_REPLIES = (CutGradient, ProbeLoss, EvalResult, Late)

STATES = {Welcome: "joining", CatchUp: "catching up", RoundStart: "training", EvalStart: "evaluating"}
"""What the device is doing while it deals with a message, in the words of its status."""

T = TypeVar("T")


async def _at_once(progress: Progress, deadline_s: float) -> None:
    """No pause."""


class _Superseded(Exception):
    """The cloud has moved on while a step waited; carries what came instead."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame


@dataclass
class Session:
    """A connection in progress."""

    device: Device
    display: Display
    progress: Progress
    software: str
    cloud: Cloud
    pace: Callable[[Progress, float], Awaitable[None]] = _at_once
    """Awaited before each round's work, with its deadline: a hot device pauses."""
    _welcome: Welcome | None = None
    _started: RoundStart | EvalStart | None = None
    """The last round or evaluation that began."""
    _has_warned: bool = False

    def __post_init__(self) -> None:
        self.link = Link(self.progress)

    async def run(self) -> Complete:
        """Take part until the run ends. Raises ConnectionLost, RefusedError, or what the device's data deserves."""
        async with self.link.open(self.cloud):
            try:
                await self._say_hello()
                return await self._talk()
            except (ConnectionLost, RefusedError):
                raise
            except HoslError as error:
                await self.link.leave(farewell(error))
                raise
            except OSError as error:  # a full disk may have room again
                await self.link.leave("its disk cannot be used, see its log")
                raise ConnectionLost(f"this device's disk: {error}") from error

    async def _talk(self) -> Complete:
        interruption: Frame | None = None
        while True:
            frame = interruption or await self._next()
            if isinstance(frame.message, Complete):
                return frame.message
            self.progress.state = STATES.get(type(frame.message), self.progress.state)
            interruption = await self._handle(frame)
            self.progress.state = "waiting"

    async def _next(self) -> Frame:
        """The next frame; raises what a Refusal says."""
        frame = await self.link.receive()
        if isinstance(frame.message, Refusal):
            if frame.message.code in ("data", "eval-data"):
                settings = self.device.settings
                path = settings.data if frame.message.code == "data" else settings.eval or "--eval"
                raise DataError(Path(path), None, frame.message.reason)
            raise RefusedError(frame.message.reason, retry=frame.message.retry, code=frame.message.code)
        return frame

    async def _say_hello(self) -> None:
        device, header = self.device, self.device.header
        pace = await _in_thread(device.pace)
        self.link.send(
            Hello(
                software=self.software,
                device=device.settings.name,
                shard_digest=device.manifest.shard_digest,
                data_digest=device.data_digest,
                eval_digest=device.eval_digest,
                run=header.run if header else None,
                epoch=header.epoch if header else 0,
                applied_round=device.applied_round,
                weights_digest=await _in_thread(device.digest),
                replay_s=pace.replay_s,
                link_bytes_per_s=pace.link_bytes_per_s,
                base_round=header.base_round if header else 0,
            )
        )

    async def _handle(self, frame: Frame) -> Frame | None:
        """Deal with a message outside a step; what interrupted a step comes back to be handled next."""
        message = frame.message
        if self._is_repeat(message):
            log.info("a repeated %s is dropped", name_of(message))
        elif self._is_foreign(message):
            log.warning("%s of another run or epoch is ignored", name_of(message))
        elif isinstance(message, Welcome):
            return await self._join(message)
        elif isinstance(message, CatchUp):
            await self._catch_up(message, frame)
        elif isinstance(message, Update):
            await self._update(message, frame)
        elif isinstance(message, RoundStart):
            return await self._round(message)
        elif isinstance(message, EvalStart):
            return await self._evaluate(message)
        elif isinstance(message, Late):
            self._show_late(message)
        else:
            log.info("late %s ignored", name_of(message))
        return None

    def _is_repeat(self, message: Message) -> bool:
        """Whether this start was the last one on this connection."""
        return isinstance(message, (RoundStart, EvalStart)) and self._started == message

    def _is_foreign(self, message: Message) -> bool:
        """Whether it is of another run or epoch than the Welcome."""
        welcome = self._welcome
        if welcome is None or not isinstance(message, (CatchUp, Update, RoundStart, EvalStart)):
            return False
        return (message.run, message.epoch) != (welcome.run, welcome.epoch)

    def _show_late(self, message: Late) -> None:
        why = f"not taken: {message.reason}" if message.reason else "left out"
        self.display.say(f"its {message.answer} of round {message.round} was {why}")

    async def _join(self, welcome: Welcome) -> Frame | None:
        if welcome.width != self.device.manifest.width:
            raise ProtocolError(f"welcome with width {welcome.width}, the shard's is {self.device.manifest.width}")
        self._welcome = welcome
        if welcome.run != self.progress.run:
            self.progress.round, self.progress.loss, self.progress.accuracy = welcome.round, None, None
        self.progress.run, self.progress.rounds = welcome.run, welcome.settings.rounds
        self.display.say(f"joins run {welcome.run} ({welcome.settings.algorithm}), round {welcome.round}")
        left = threading.Event()
        try:
            await _in_thread(lambda: self.device.join(welcome, partial(self._fetch, left)), left.set)
        except SnapshotError as error:
            raise ConnectionLost(f"{error}; the missed rounds are replayed instead") from error
        except HistoryError as error:
            raise ConnectionLost(f"{error}; all rounds come again from the cloud") from error
        except ConnectionLost:
            if not self.link.is_closed:
                raise
            return await self._last_word()
        return None

    def _fetch(self, left: threading.Event, snapshot: Snapshot, path: Path) -> None:
        """Download a snapshot, in a thread; given up where the cloud has said its last word, or we leave."""
        size_mb = snapshot.size_bytes / 1e6
        self.display.say(f"downloads a snapshot of round {snapshot.round}, {size_mb:.1f} MB, instead of replaying")

        def on_progress(done: int, size: int) -> None:
            if left.is_set() or self.link.is_closed:
                raise ConnectionLost(f"the download of the snapshot was given up at {done} of {size} bytes")
            self.display.show_download("snapshot", done, size)

        fetch_snapshot(self.cloud, self._joined().run, snapshot, path, on_progress, self.device.note_link)

    async def _last_word(self) -> Frame:
        """The Complete that ended the connection; raises what a Refusal says."""
        while not isinstance((frame := await self._next()).message, Complete):
            pass
        return frame

    async def _catch_up(self, message: CatchUp, frame: Frame) -> None:
        coefficients = frame.tensors["coefficients"]
        rates = frame.tensors["learning_rates"].tolist()
        expected = self.device.applied_round + 1
        if message.first_round > expected:
            raise ProtocolError(f"catch-up from round {message.first_round}, expected round {expected}")
        updates = [UpdateRecord(message.first_round + row, coefficients[row], rates[row]) for row in range(len(rates))]
        missing = [update for update in updates if update.round > self.device.applied_round]
        await _in_thread(lambda: self.device.apply(missing))
        if message.last:
            await self._ready()

    async def _ready(self) -> None:
        device, welcome = self.device, self._joined()
        self.link.send(
            Ready(
                run=welcome.run,
                epoch=welcome.epoch,
                applied_round=device.applied_round,
                weights_digest=await _in_thread(device.digest),
                train_examples=len(device.train or ()),
                eval_examples=len(device.eval or ()),
            )
        )

    async def _update(self, message: Update, frame: Frame) -> None:
        device = self.device
        if message.round <= device.applied_round:
            return
        if message.round > device.applied_round + 1:
            raise ConnectionLost(f"update of round {message.round} came after round {device.applied_round}")
        record = UpdateRecord(message.round, frame.tensors["coefficients"], message.learning_rate)
        await _in_thread(lambda: device.apply([record]))
        self._warn_if_below_lattice(record)
        self.progress.round, self.progress.loss = message.round, float(frame.tensors["loss"])
        self.display.show(self.progress)
        settings = self._joined().settings
        if message.round % settings.report_every == 0 or message.round == settings.rounds:
            await self._report()

    def _warn_if_below_lattice(self, record: UpdateRecord) -> None:
        assert self.device.weights is not None
        resolution = self.device.weights.resolution(record)
        if resolution < 1.0 and not self._has_warned:
            self._has_warned = True
            log.warning(
                "round %d: a step is %.2g of the lattice spacing; it is kept on average only", record.round, resolution
            )

    async def _report(self) -> None:
        memory = read_memory()
        welcome = self._joined()
        self.link.send(
            Report(
                run=welcome.run,
                epoch=welcome.epoch,
                applied_round=self.device.applied_round,
                weights_digest=await _in_thread(self.device.digest),
                step_seconds=self.progress.step_seconds,
                peak_rss_bytes=memory.peak,
                anonymous_bytes=memory.anonymous,
                sent_bytes=self.progress.sent_bytes,
                received_bytes=self.progress.received_bytes,
                temperature_c=read_health().temperature_c,
            )
        )

    async def _round(self, start: RoundStart) -> Frame | None:
        device, settings = self.device, self._joined().settings
        if start.round != device.applied_round + 1:
            raise ConnectionLost(f"round {start.round} began after round {device.applied_round}")
        train = device.train
        assert train is not None
        await self.link.drain()
        await self.pace(self.progress, start.deadline_s)
        name = device.settings.name
        indices = batch_indices(settings.seed, start.round, name, len(train), settings.batch_size)
        context = self._begin(start)
        batch = await _in_thread(lambda: train.training_batch(indices, settings, start.round, name))
        steps = step.ROUNDS[settings.algorithm](context, batch)
        began = time.monotonic()
        # λ may wait for the slowest Anchor and for all that the tail computes before it.
        patience_s = PATIENCE * start.deadline_s or None
        interruption = await self._drive(steps, context, patience_s)
        self.progress.step_seconds = time.monotonic() - began
        return interruption

    async def _evaluate(self, start: EvalStart) -> Frame | None:
        totals = np.zeros(2, np.int64)

        def on_result(loss: float, correct: int, scored: int) -> None:
            totals[:] += (correct, scored)

        if self.device.eval is None:
            raise ProtocolError("eval-start, and this device has no held-out data")
        if start.round != self.device.applied_round:
            raise ConnectionLost(f"an evaluation of round {start.round} began at round {self.device.applied_round}")
        await self.link.drain()
        context = self._begin(start)
        interruption = await self._drive(step.evaluate(context, self.device.eval, on_result), context)
        if interruption is None and totals[1]:
            self.progress.accuracy, self.progress.accuracy_round = float(totals[0] / totals[1]), start.round
            self.display.show(self.progress)
        return interruption

    def _begin(self, start: RoundStart | EvalStart) -> step.RoundContext:
        self._started = start
        device, welcome = self.device, self._joined()
        assert device.weights is not None
        return step.RoundContext(
            run=welcome.run,
            epoch=welcome.epoch,
            round=start.round,
            attempt=start.attempt,
            settings=welcome.settings,
            shard=device.shard,
            weights=device.weights,
            held_sets=device.held_sets,
        )

    async def _drive(
        self, steps: step.Step, context: step.RoundContext, patience_s: float | None = None
    ) -> Frame | None:
        """Run a step to its end, computing in a thread; what the cloud sent instead of a reply, if it did.

        A reply that does not come within `patience_s` ends the device's part.
        """
        reply: Frame | None = None
        try:
            while True:
                action = await _in_thread(partial(_advance, steps, reply))
                reply = None
                if action is None:
                    return None
                if isinstance(action, step.Send):
                    self.link.send(action.message, action.tensors)
                else:
                    reply = await within(patience_s, self._reply(action, context))
        except asyncio.TimeoutError:
            self.display.say(
                f"no answer in round {context.round} for {patience_s:.0f} s; it goes on without this device"
            )
            return None
        except _Superseded as superseded:
            log.info("the cloud sent %s during a step", name_of(superseded.frame.message))
            return superseded.frame
        finally:
            await _in_thread(steps.close)

    async def _reply(self, expected: step.Receive, context: step.RoundContext) -> Frame:
        while True:
            frame = await self._next()
            if not isinstance(frame.message, _REPLIES):
                if self._is_repeat(frame.message):
                    continue
                raise _Superseded(frame)
            message = frame.message
            named = (message.run, message.epoch, message.round, message.attempt)
            if named != (context.run, context.epoch, context.round, context.attempt):
                log.info("%s of another attempt is dropped", name_of(message))
                if isinstance(message, Late):
                    self._show_late(message)
            elif isinstance(message, Late):
                raise _Superseded(frame)
            elif (type(message), message.id) == (expected.kind, expected.id):
                return frame
            else:
                log.info("a repeated %s is dropped", name_of(message))

    def _joined(self) -> Welcome:
        assert self._welcome is not None
        return self._welcome


def _advance(steps: step.Step, reply: Frame | None) -> step.Send | step.Receive | None:
    try:
        return steps.send(reply)
    except StopIteration:
        return None


async def _in_thread(work: Callable[[], T], on_cancel: Callable[[], None] = lambda: None) -> T:
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        # Work in a thread can't be interrupted, and must not go on behind our back, however often we are told to stop.
        on_cancel()
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future})
        raise
