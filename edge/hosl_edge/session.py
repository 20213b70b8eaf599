"""One connection to the cloud, from Hello to its end: what each message asks of the device.

A session lives on the event loop and handles one message after the other; while a handler awaits work in a thread, the
link goes on reading, and what comes waits in its queue. So weights, journal and data are changed by one handler at a
time, and the device stays in the run and epoch of the last Welcome: messages of others are dropped, since an update
applied under another epoch would be one that the cloud has taken back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hosl_edge import rounds
from hosl_edge.connection.fetch import fetch_snapshot
from hosl_edge.connection.goodbye import goodbye_reason
from hosl_edge.connection.link import Link
from hosl_edge.connection.trust import Cloud
from hosl_edge.device import Device
from hosl_edge.driver import StepDriver, in_thread, late_sentence
from hosl_edge.exceptions import ConnectionLost, DataError, HistoryError, RefusedError, SnapshotError
from hosl_edge.host.display import Display, Progress
from hosl_edge.host.health import read_health
from hosl_edge.model.memory import read_memory
from hosl_protocol.exceptions import HoslError, ProtocolError
from hosl_protocol.run.ordering import batch_indices
from hosl_protocol.run.updates import update_shape
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import (
    CatchUp,
    Complete,
    EvalStart,
    Hello,
    Late,
    Message,
    Ready,
    Refusal,
    Report,
    RoundStart,
    Snapshot,
    Update,
    Welcome,
    name_of,
)
from hosl_protocol.wire.updates import read_catch_up, read_update

log = logging.getLogger(__name__)

PATIENCE = 3
"""Deadlines of a stage for which a device waits for a reply of a cloud that still answers pings."""

STATES = {Welcome: "joining", CatchUp: "catching up", RoundStart: "training", EvalStart: "evaluating"}
"""What the device is doing while it deals with a message, in the words of its status."""

Handler = Callable[[Any, Frame], Awaitable[Frame | None]]
"""Deals with a message and its frame; returns what came in the middle and is to be handled next."""


async def _no_cool_down(progress: Progress, deadline_s: float) -> None:
    """Begin a round's work at once."""


@dataclass
class Session:
    """A connection in progress."""

    device: Device
    display: Display
    progress: Progress
    software: str
    cloud: Cloud
    cool_down: Callable[[Progress, float], Awaitable[None]] = _no_cool_down
    """Awaited before each round's work, with its deadline: a hot device pauses."""
    _welcome: Welcome | None = None
    _started: RoundStart | EvalStart | None = None
    """The last round or evaluation that began."""
    _has_warned: bool = False

    def __post_init__(self) -> None:
        self.link = Link(self.progress)
        self._driver = StepDriver(self.link.send, self._receive_frame, self.display.say)

    async def take_part(self) -> Complete:
        """Take part until the run ends. Raises ConnectionLost, RefusedError, or what the device's data deserves."""
        async with self.link.open(self.cloud):
            try:
                await self._say_hello()

                interruption: Frame | None = None
                while True:
                    frame = interruption or await self._receive_frame()
                    if isinstance(frame.message, Complete):
                        return frame.message
                    self.progress.state = STATES.get(type(frame.message), self.progress.state)
                    handler = self._handler_of(frame.message)
                    interruption = await handler(frame.message, frame) if handler is not None else None
                    self.progress.state = "waiting"
            except (ConnectionLost, RefusedError):
                raise  # the cloud knows, or cannot be told
            except HoslError as error:
                await self.link.leave(goodbye_reason(error))
                raise
            except OSError as error:  # a full disk may have room again
                await self.link.leave("its disk cannot be used, see its log")
                raise ConnectionLost(f"this device's disk: {error}") from error

    async def _receive_frame(self) -> Frame:
        """Wait for the next frame; a Refusal is raised as the error that it is for this device."""
        frame = await self.link.receive()
        if isinstance(frame.message, Refusal):
            if frame.message.code in ("data", "eval-data"):
                settings = self.device.settings
                path = settings.data if frame.message.code == "data" else settings.eval or "--eval"
                raise DataError(Path(path), None, frame.message.reason)
            raise RefusedError(frame.message.reason, retry=frame.message.retry, code=frame.message.code)
        return frame

    def _handler_of(self, message: Message) -> Handler | None:
        """Choose what deals with a message outside a step; None drops it."""
        handlers: dict[type, Handler] = {
            Welcome: self._join,
            CatchUp: self._catch_up,
            RoundStart: self._train,
            Update: self._update,
            EvalStart: self._evaluate,
            Late: self._show_late,
        }

        # A start that the cloud repeats, because it has no sign of the first, must not be run twice.
        if isinstance(message, (RoundStart, EvalStart)) and self._started == message:
            log.info("a repeated %s is dropped", name_of(message))
            return None
        if self._is_foreign(message):
            log.warning("%s of another run or epoch is ignored", name_of(message))
            return None
        if type(message) not in handlers:
            log.info("late %s ignored", name_of(message))
        return handlers.get(type(message))

    def _is_foreign(self, message: Message) -> bool:
        """Whether it is of another run or epoch than the Welcome."""
        welcome = self._welcome
        if welcome is None or not isinstance(message, (CatchUp, Update, RoundStart, EvalStart)):
            return False
        return (message.run, message.epoch) != (welcome.run, welcome.epoch)

    async def _show_late(self, message: Late, frame: Frame) -> None:
        self.display.say(late_sentence(message))

    async def _say_hello(self) -> None:
        device, header = self.device, self.device.header
        # The cloud decides by these figures whether the device replays or downloads; to measure takes a moment.
        speed = await in_thread(device.catch_up_speed)
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
                weights_digest=await in_thread(device.digest),
                replay_s=speed.replay_s,
                link_bytes_per_s=speed.link_bytes_per_s,
                base_round=header.base_round if header else 0,
            )
        )

    async def _join(self, welcome: Welcome, frame: Frame) -> Frame | None:
        if welcome.width != self.device.manifest.width:
            raise ProtocolError(f"welcome with width {welcome.width}, the shard's is {self.device.manifest.width}")
        expected = update_shape(welcome.settings, self.device.manifest)
        if welcome.update != expected:
            raise ProtocolError(f"welcome with {welcome.update}, by the shard's manifest it is {expected}")
        # From here on, whatever becomes of the plan: messages of another run or epoch are dropped.
        self._welcome = welcome
        if welcome.run != self.progress.run:
            self.progress.round, self.progress.loss = welcome.round, None
            self.progress.right = self.progress.scored = None
        self.progress.run, self.progress.rounds = welcome.run, welcome.settings.rounds
        self.progress.report_every = welcome.settings.report_every
        self.display.say(f"joins run {welcome.run} ({welcome.settings.algorithm}), round {welcome.round}")

        # A download in a thread hears of a cancelled task by this alone.
        left = threading.Event()
        try:
            await in_thread(lambda: self.device.join(welcome, partial(self._fetch, left)), left.set)
        except SnapshotError as error:
            raise ConnectionLost(f"{error}; the missed rounds are replayed instead") from error
        except HistoryError as error:
            raise ConnectionLost(f"{error}; what is missing comes again from the cloud") from error
        except ConnectionLost:
            if not self.link.is_closed:
                raise
            # The run ended during the download, which was given up for that: what ended it lies in the queue.
            return await self._last_word()
        if self.device.cache_sentence:
            self.display.say(self.device.cache_sentence)
        return None

    def _fetch(self, left: threading.Event, snapshot: Snapshot, path: Path) -> None:
        """Download a snapshot, in a thread; given up where the cloud has said its last word, or we leave."""
        size_mb = snapshot.size_bytes / 1e6
        self.display.say(f"downloads a snapshot of round {snapshot.round}, {size_mb:.1f} MB, instead of replaying")

        def on_progress(done: int, size: int) -> None:
            if left.is_set() or self.link.is_closed:
                raise ConnectionLost(f"the download of the snapshot was given up at {done} of {size} bytes")
            self.display.show_download("the snapshot", done, size, has_been_said=True)

        fetch_snapshot(self.cloud, self._joined.run, snapshot, path, on_progress, self.device.note_link)

    async def _last_word(self) -> Frame:
        """Find the Complete that ended the connection; raises what a Refusal says."""
        while not isinstance((frame := await self._receive_frame()).message, Complete):
            pass
        return frame

    async def _catch_up(self, message: CatchUp, frame: Frame) -> None:
        """Apply the updates of missed rounds; after the last of them the device is ready."""
        expected = self.device.applied_round + 1
        if message.first_round > expected:
            raise ProtocolError(f"catch-up from round {message.first_round}, expected round {expected}")

        # Rounds that the weights have already are passed over.
        missing = [update for update in read_catch_up(frame) if update.round > self.device.applied_round]
        await in_thread(lambda: self.device.apply(missing))
        if message.last:
            await self._say_ready()

    async def _say_ready(self) -> None:
        device, welcome = self.device, self._joined
        self.link.send(
            Ready(
                run=welcome.run,
                epoch=welcome.epoch,
                applied_round=device.applied_round,
                weights_digest=await in_thread(device.digest),
                train_examples=len(device.train or ()),
                eval_examples=len(device.eval or ()),
            )
        )

    async def _train(self, start: RoundStart, frame: Frame) -> Frame | None:
        """Take the device's part in a round, as the run's algorithm has it (rounds.py)."""
        device, settings, train = self.device, self._joined.settings, self.device.train
        if start.round != device.applied_round + 1:
            raise ConnectionLost(f"round {start.round} began after round {device.applied_round}")
        assert train is not None
        # On a slow link the last uploads may still wait; beside another set they would fill the memory.
        await self.link.drain()
        await self.cool_down(self.progress, start.deadline_s)

        name = device.settings.name
        indices = batch_indices(settings.seed, start.round, name, len(train), settings.batch_size)
        context = self._begin(start)
        batch = await in_thread(lambda: train.training_batch(indices, settings, start.round, name))

        began = time.monotonic()
        # λ may wait for the slowest Anchor and for all that the tail computes before it.
        patience_s = PATIENCE * start.deadline_s or None
        interruption = await self._driver.drive(rounds.PARTS[settings.algorithm](context, batch), start, patience_s)
        self.progress.step_seconds = time.monotonic() - began
        return interruption

    async def _evaluate(self, start: EvalStart, frame: Frame) -> Frame | None:
        """Send the held-out data, and sum up what the cloud scores of it."""
        if self.device.eval is None:
            raise ProtocolError("eval-start, and this device has no held-out data")
        if start.round != self.device.applied_round:
            raise ConnectionLost(f"an evaluation of round {start.round} began at round {self.device.applied_round}")
        await self.link.drain()

        totals = np.zeros(2, np.int64)

        def on_result(loss: float, correct: int, scored: int) -> None:
            totals[:] += (correct, scored)

        steps = rounds.evaluate(self._begin(start), self.device.eval, on_result)
        interruption = await self._driver.drive(steps, start)
        if interruption is None and totals[1]:
            (self.progress.right, self.progress.scored), self.progress.accuracy_round = totals.tolist(), start.round
            self.display.show(self.progress)
        return interruption

    def _begin(self, start: RoundStart | EvalStart) -> rounds.DeviceRound:
        """Note that a round or evaluation has begun, so that a repeat of its start is dropped."""
        self._started = start
        device, welcome = self.device, self._joined
        assert device.weights is not None

        return rounds.DeviceRound(
            run=welcome.run,
            device=device.settings.name,
            epoch=welcome.epoch,
            round=start.round,
            attempt=start.attempt,
            settings=welcome.settings,
            shard=device.shard,
            weights=device.weights,
            held_sets=device.held_sets,
        )

    async def _update(self, message: Update, frame: Frame) -> None:
        """Apply a round's update, and report now and then."""
        device = self.device
        if message.round <= device.applied_round:
            return  # a repeat
        # A gap is no fault of the protocol: a new connection catches up.
        if message.round > device.applied_round + 1:
            raise ConnectionLost(f"update of round {message.round} came after round {device.applied_round}")
        record = read_update(frame)
        await in_thread(lambda: device.apply([record]))
        self._warn_if_below_lattice(record)

        self.progress.round, self.progress.loss = message.round, float(frame.tensors["loss"])
        self.display.show(self.progress)
        settings = self._joined.settings
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
        memory, welcome = read_memory(), self._joined
        self.link.send(
            Report(
                run=welcome.run,
                epoch=welcome.epoch,
                applied_round=self.device.applied_round,
                weights_digest=await in_thread(self.device.digest),
                step_seconds=self.progress.step_seconds,
                peak_rss_bytes=memory.peak,
                anonymous_bytes=memory.anonymous,
                sent_bytes=self.progress.sent_bytes,
                received_bytes=self.progress.received_bytes,
                temperature_c=read_health().temperature_c,
            )
        )

    @property
    def _joined(self) -> Welcome:
        """The Welcome of this connection; the cloud's messages that need it come after it (connection.py)."""
        assert self._welcome is not None
        return self._welcome
