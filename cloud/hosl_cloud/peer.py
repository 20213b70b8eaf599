"""A connected device: its websocket drained by one task, its messages waiting for whoever asks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from hosl_cloud import metrics
from hosl_cloud.exchange import Ask
from hosl_protocol import (
    Anchor,
    Connection,
    EvalBatch,
    EvalStart,
    Frame,
    Goodbye,
    Late,
    Message,
    Phase,
    Probe,
    Projections,
    ProtocolError,
    Refusal,
    Report,
    Role,
    RoundStart,
    name_of,
)

log = logging.getLogger(__name__)

MAX_WAITING = 4
"""Frames that may wait to be asked for; a device that sends more breaks the protocol."""

_ANSWERS = (Probe, Anchor, Projections, EvalBatch)


class PeerGone(Exception):
    """The device's connection has ended."""


class Peer:
    """One connection of one device."""

    def __init__(self, socket: WebSocket, on_arrival: Callable[[], None] = lambda: None) -> None:
        """`on_arrival` hears of every answer, and of the connection's end."""
        self.name = "?"
        self.is_ready = False
        """Joined, at the cloud's round, and proven so by its digest."""
        self.eval_examples = 0
        self.farewell = ""
        """Why the device left, where it said so."""
        self.reports: asyncio.Queue[Report] = asyncio.Queue()
        self.connection = Connection(Role.CLOUD)
        self.gone = asyncio.Event()
        self._socket = socket
        self._on_arrival = on_arrival
        self._inbox: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._answers: deque[Frame] = deque()
        self._round: tuple[int, int] | None = None
        """Epoch and round in which answers are expected."""
        self._outbox: asyncio.Queue[tuple[Message, Mapping[str, Any]] | None] = asyncio.Queue()

    async def serve(self) -> None:
        """Read and write until the connection ends."""
        writer = asyncio.create_task(self._write())
        try:
            await self._read()
        except ProtocolError as error:
            log.warning("device %s: %s", self.name, error)
            self.tell(Refusal(code="message", reason=str(error)[:500], retry=True))
        finally:
            self._set_gone()
            self.is_ready = False
            self._inbox.put_nowait(None)
            self._outbox.put_nowait(None)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(writer, 5.0)

    def _set_gone(self) -> None:
        self.gone.set()
        self._on_arrival()

    async def _read(self) -> None:
        frame_bytes = 0
        while True:
            event = await self._socket.receive()
            if event["type"] == "websocket.disconnect":
                return
            piece = event.get("bytes")
            if piece is None:
                raise ProtocolError("a text message, expected binary ones")
            if self.connection.phase is Phase.CLOSED:
                continue  # said goodbye; what was under way is drained
            frame_bytes += len(piece)
            frame = self.connection.receive(piece)
            if frame is None:
                continue
            metrics.wire_bytes.labels("received", name_of(frame.message)).inc(frame_bytes)
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
            if (message.epoch, message.round) != self._round:
                self._refuse_late(message)
                return
            _check_room(message, len(self._answers))
            self._answers.append(frame)
            self._on_arrival()
        else:
            _check_room(message, self._inbox.qsize())
            self._inbox.put_nowait(frame)

    def _refuse_late(self, message: Any) -> None:
        kind = name_of(message)
        log.warning("device %s: its %s of round %d is late", self.name, kind, message.round)
        metrics.late_answers.labels(kind).inc()
        self.tell(Late(run=message.run, epoch=message.epoch, round=message.round, id=message.id, answer=kind))

    async def _write(self) -> None:
        try:
            while (item := await self._outbox.get()) is not None:
                message, tensors = item
                if self.connection.phase is Phase.CLOSED:
                    continue  # queued before the device said goodbye
                sent = metrics.wire_bytes.labels("sent", name_of(message))
                for piece in self.connection.send(message, tensors):
                    await self._socket.send({"type": "websocket.send", "bytes": bytes(piece)})
                    sent.inc(len(piece))
            await self._socket.close()
        except (WebSocketDisconnect, RuntimeError, OSError) as error:
            log.info("device %s: the connection broke while writing: %s", self.name, error)
        except Exception:
            log.exception("device %s: writing failed", self.name)
        finally:
            self._set_gone()

    def tell(self, message: Message, tensors: Mapping[str, Any] | None = None) -> None:
        """Queue a message; dropped where the connection has ended."""
        if self.gone.is_set():
            return
        if isinstance(message, (RoundStart, EvalStart)):
            self._round = message.epoch, message.round
        self._outbox.put_nowait((message, tensors or {}))

    def end(self, message: Message) -> None:
        """Say a last message and close."""
        self.tell(message)
        self.hang_up()

    def hang_up(self) -> None:
        """Close once what is queued has been sent."""
        self._outbox.put_nowait(None)

    async def next(self, timeout_s: float) -> Frame:
        """The next message that is no answer of a round. Raises PeerGone, or TimeoutError."""
        if self._inbox.empty():
            frame = await asyncio.wait_for(self._inbox.get(), max(timeout_s, 0.0))
        else:
            frame = self._inbox.get_nowait()
        if frame is None:
            self._inbox.put_nowait(None)
            raise PeerGone(self.name)
        return frame

    def take(self, ask: Ask) -> Frame | None:
        """The answer to `ask`, if it is in; what came instead is refused by name."""
        while self._answers:
            frame = self._answers.popleft()
            if _matches(frame.message, ask):
                return frame
            self._refuse_late(frame.message)
        return None

    def leave_round(self) -> None:
        """Answers of this round are late from here on."""
        self._round = None
        while self._answers:
            self._refuse_late(self._answers.popleft().message)


def _check_room(message: Message, waiting: int) -> None:
    if waiting >= MAX_WAITING:
        raise ProtocolError(f"{name_of(message)} while {MAX_WAITING} messages wait already")


def _matches(message: Message, ask: Ask) -> bool:
    if not isinstance(message, ask.kind):
        return False
    return not isinstance(message, Probe) or (message.direction, message.sign) == (ask.direction, ask.sign)
