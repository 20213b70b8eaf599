"""A connected device: its websocket drained by one task, its messages waiting for whoever asks.

A message from the device: `_read` takes its pieces off the socket, the Connection makes a frame of them and checks it,
and `_sort` puts it where it is waited for. A Report goes to `reports`, an answer of a round to `_answers`, from which
Fleet.drive takes it (`take`), and anything else to `_inbox`, which is read while the device joins (`next`). A message
to the device: `tell` queues it, `_write` encodes and sends it.

All of it runs on the event loop, so there are no locks. One task reads and one writes; neither waits for the other, or
a device that takes nothing could keep its own answers from being read. What may wait is bounded in both directions: a
device that sends more than it was asked for breaks the protocol, and one that takes nothing is cut off.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from hosl_cloud import metrics
from hosl_cloud.rounds.exchange import Ask, Shared, Tally, break_off, late
from hosl_protocol.exceptions import ProtocolError
from hosl_protocol.program.waiting import within
from hosl_protocol.wire.codec import PIECE_BYTES, Frame, Piece
from hosl_protocol.wire.connection import Connection, Phase, Role
from hosl_protocol.wire.messages import (
    Anchor,
    CutGradient,
    EvalBatch,
    EvalStart,
    Goodbye,
    Gradient,
    Message,
    Probe,
    Projections,
    Report,
    RoundStart,
    name_of,
)

log = logging.getLogger(__name__)

MAX_WAITING = 4
"""Frames that may wait to be asked for; a device that sends more breaks the protocol."""

REMEMBERED_STARTS = 64
"""Starts of which a device is told that it comes too late; of those before, that they are not under way."""

MESSAGE_TOO_BIG = 1009
"""Code with which a websocket ends whose peer sent a message too long to be read."""

OUTBOX_BYTES = 64 * 1024 * 1024
"""Bytes that may wait to be sent before one message more; a device that takes nothing for so long is cut off."""

_MESSAGE_BYTES = 512
"""About what a message takes beside its tensors."""

_ANSWERS = (Probe, Anchor, Projections, Gradient, EvalBatch)

_OF_LAMBDA = (Projections, Gradient)
"""Answers that a device makes of λ."""


class PeerGone(Exception):
    """The device's connection has ended."""


class Peer:
    """One connection of one device."""

    def __init__(
        self,
        socket: WebSocket,
        may_be: Callable[[str], bool] = lambda name: True,
    ) -> None:
        """`may_be` tells whether the token that the connection showed is one of the device in its Hello."""
        self.tally = Tally()
        """Counts its bytes; its fleet's, once it has one."""
        self.name = "?"
        self.may_be = may_be
        self.is_ready = False
        """Joined, at the cloud's round, and proven so by its digest."""
        self.sent_round = 0
        self.train_examples = self.eval_examples = 0
        self.data_digest = self.eval_digest = ""
        self.heard_at = time.time()
        """Unix time of its last message."""
        self.farewell = ""
        """Why the device left, where it said so."""
        self.reports: asyncio.Queue[Report] = asyncio.Queue()
        self.connection = Connection(Role.CLOUD)
        self.gone = asyncio.Event()
        self._socket = socket

        self.on_arrival: Callable[[], None] = lambda: None
        """Hears of every answer, and of the connection's end."""
        self._inbox: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._answers: deque[Frame] = deque()
        self._started: RoundStart | EvalStart | None = None
        """What the device was last asked to take part in."""
        self._former: deque[tuple[str, int, int, int]] = deque(maxlen=REMEMBERED_STARTS)
        """What it was asked to take part in before that."""
        self._is_in_round = False
        """Whether its answers are still expected."""
        self._has_gradient = False
        """Whether the round's CutGradient was told, without which neither projections nor a gradient can be made."""
        self._answered: set[tuple[type, int]] = set()
        """Kinds and ids of the answers that have come in it."""

        self._outbox: asyncio.Queue[tuple[Message, Mapping[str, Any]] | None] = asyncio.Queue()
        self._waiting_bytes = 0
        self._emptied = asyncio.Event()
        """Set while nothing waits to be sent."""
        self._emptied.set()
        self._tasks: list[asyncio.Task[None]] = []

    async def serve(self) -> None:
        """Read and write until the connection ends."""
        # The connection lives as long as the reader; the writer outlives it by what is still to be said.
        reader, writer = self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        try:
            await asyncio.wait({reader})
            if not reader.cancelled():
                reader.result()
        except ProtocolError as error:
            log.warning("device %s: %s", self.name, error)
            self.tell(break_off(str(error)))  # the writer still runs, and sends it
        finally:
            reader.cancel()
            self._set_gone()
            self.is_ready = False

            # None ends who waits in `next`, and the writer once it has sent what is queued, a refusal perhaps.
            self._inbox.put_nowait(None)
            self._outbox.put_nowait(None)
            await asyncio.wait({writer}, timeout=5.0)
            writer.cancel()

    def _set_gone(self) -> None:
        self.gone.set()
        self.on_arrival()

    async def _read(self) -> None:
        frame_bytes = 0
        while True:
            event = await self._socket.receive()
            self.heard_at = time.time()
            if event["type"] == "websocket.disconnect":
                if event.get("code") == MESSAGE_TOO_BIG:
                    log.warning("device %s sent a piece of more than %d bytes", self.name, PIECE_BYTES)
                return

            piece = event.get("bytes")
            if piece is None:
                raise ProtocolError("a text message, expected binary ones")
            if self.connection.phase is Phase.CLOSED:
                continue  # said goodbye; what was under way is drained
            # A frame of activations comes in many pieces; it is None until the last of them.
            frame_bytes += len(piece)
            frame = self.connection.receive(piece)
            if frame is None:
                continue

            metrics.wire_counter("received", name_of(frame.message)).inc(frame_bytes)
            self.tally.wire_bytes += frame_bytes
            frame_bytes = 0
            if isinstance(frame.message, Goodbye):
                self.farewell = frame.message.reason[:200]
                return
            self._sort(frame)

    def _sort(self, frame: Frame) -> None:
        """Put a frame where it is waited for."""
        message = frame.message
        if isinstance(message, Report):
            self.reports.put_nowait(message)

        elif isinstance(message, _ANSWERS):
            if (fault := self._lateness(message)) is not None:
                self._refuse_late(message, *fault)
                return
            if (type(message), message.id) in self._answered:
                log.info("device %s: a repeated %s is dropped", self.name, name_of(message))
                return

            # A device is asked for one answer at a time, and may be some ahead; more would fill our memory.
            _check_room(message, len(self._answers))
            self._answered.add((type(message), message.id))
            self._answers.append(frame)
            self.on_arrival()

        else:
            _check_room(message, self._inbox.qsize())
            self._inbox.put_nowait(frame)

    def _lateness(self, answer: Any) -> tuple[str, str] | None:
        """Tell why an answer is not taken, as Late's code and reason; None where it is."""
        # The answer names its run, epoch, round and attempt. One by one they tell the device what it missed.
        started = self._started
        if started is None:
            return "round", "no round has begun for this device on this connection"
        if _start_key(answer) in self._former:
            return "stage", f"its stage is over, the last start here is of round {started.round}"

        for field in ("run", "epoch", "round", "attempt"):
            theirs, ours = getattr(answer, field), getattr(started, field)
            if theirs != ours:
                return field, f"its {field} is {theirs}, that of the last start here is {ours}"

        if not self._is_in_round:
            return "stage", "its stage is over"
        if isinstance(answer, _OF_LAMBDA) and not self._has_gradient:
            return "unasked", "it is made of a cut-gradient, and none was sent in this round"
        return None

    def _refuse_late(self, message: Any, code: str, reason: str) -> None:
        kind = name_of(message)
        log.warning("device %s: its %s of round %d is not taken: %s", self.name, kind, message.round, reason)
        metrics.late_answers.labels(kind).inc()
        self.tell(late(message, code, reason))

    async def _write(self) -> None:
        try:
            while (item := await self._outbox.get()) is not None:
                if self.connection.phase is not Phase.CLOSED:  # else queued before the device said goodbye
                    await self._put(*item)
                self._waiting_bytes -= _size(item[1])
                if self._outbox.empty():
                    self._emptied.set()

            await self._socket.close()
        except (WebSocketDisconnect, RuntimeError, OSError) as error:
            log.info("device %s: the connection broke while writing: %s", self.name, error)
        except Exception:  # nobody awaits this task's result
            log.exception("device %s: writing failed", self.name)
        finally:
            self._emptied.set()
            self._set_gone()

    async def _put(self, message: Message, tensors: Mapping[str, Any]) -> None:
        # Encoded only now, piece by piece: what waits in the queue takes the tensors' memory, not a frame's beside it.
        pieces: Iterable[Piece] = self.connection.send(message, tensors)
        if isinstance(tensors, Shared):  # the first peer encodes what goes to all
            tensors.pieces = pieces = tensors.pieces or tuple(pieces)

        sent = 0
        for piece in pieces:
            # uvicorn takes what has a length and bytes; its types say bytes.
            await self._socket.send({"type": "websocket.send", "bytes": piece})
            sent += len(piece)
        metrics.wire_counter("sent", name_of(message)).inc(sent)
        self.tally.wire_bytes += sent

    def tell(self, message: Message, tensors: Mapping[str, Any] | None = None) -> None:
        """Queue a message; dropped where the connection has ended. What nobody takes away ends it."""
        if self.gone.is_set():
            return
        if self._waiting_bytes > OUTBOX_BYTES:
            log.warning(
                "device %s takes nothing: %d bytes wait for it, the limit is %d; it is cut off",
                self.name,
                self._waiting_bytes,
                OUTBOX_BYTES,
            )
            self._abort()
            return

        # What is queued decides at once which answers are taken: the device answers only what it has read.
        if isinstance(message, (RoundStart, EvalStart)):
            if self._started is not None:
                self._former.append(_start_key(self._started))
            self._started, self._is_in_round, self._has_gradient = message, True, False
            self._answered.clear()
        elif isinstance(message, CutGradient):
            self._has_gradient = True

        # Taken off again by `_write`, with the same figure.
        self._waiting_bytes += _size(tensors)
        self._emptied.clear()
        self._outbox.put_nowait((message, tensors or {}))

    def _abort(self) -> None:
        """End the connection with nothing more said."""
        self.is_ready = False
        self._set_gone()
        for task in self._tasks:
            task.cancel()

    async def emptied(self, timeout_s: float) -> None:
        """Wait until all that was queued is sent, or the connection has ended. Raises TimeoutError."""
        await within(timeout_s, self._emptied.wait())

    def end(self, message: Message) -> None:
        """Say a last message and close."""
        self.tell(message)
        self.hang_up()

    def hang_up(self) -> None:
        """Close once what is queued has been sent."""
        self._outbox.put_nowait(None)

    async def next(self, timeout_s: float) -> Frame:
        """Wait for the next message that is no answer of a round. Raises PeerGone, or TimeoutError."""
        if self._inbox.empty():
            frame = await within(max(timeout_s, 0.0), self._inbox.get())
        else:
            frame = self._inbox.get_nowait()
        if frame is None:
            self._inbox.put_nowait(None)  # for whoever asks next
            raise PeerGone(self.name)
        return frame

    def take(self, ask: Ask) -> Frame | None:
        """Take the answer to `ask`, if it is in; what came instead is refused by name."""
        # Answers come in the order of the asking, so that what stands before the right one is not wanted.
        while self._answers:
            frame = self._answers.popleft()
            if _matches(frame.message, ask):
                return frame
            self._refuse_late(frame.message, "unasked", f"what is asked for now is: {ask}")
        return None

    def leave_round(self) -> None:
        """Refuse this round's answers as late from here on."""
        # What came in time but was not taken: the device waits for a reply to it.
        self._is_in_round = False
        while self._answers:
            self._refuse_late(self._answers.popleft().message, "stage", "its stage is over")


def _start_key(message: Any) -> tuple[str, int, int, int]:
    """Identify the start of a round that a message belongs to."""
    return message.run, message.epoch, message.round, message.attempt


def _size(tensors: Mapping[str, Any] | None) -> int:
    return _MESSAGE_BYTES + sum(int(tensor.nbytes) for tensor in (tensors or {}).values())


def _check_room(message: Message, waiting: int) -> None:
    if waiting >= MAX_WAITING:
        raise ProtocolError(f"{name_of(message)} while {MAX_WAITING} messages wait already")


def _matches(message: Message, ask: Ask) -> bool:
    if not isinstance(message, ask.kind):
        return False
    return not isinstance(message, Probe) or (message.direction, message.sign) == (ask.direction, ask.sign)
