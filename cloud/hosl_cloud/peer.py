"""A connected device: its websocket drained by one task, its messages waiting for whoever asks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from hosl_cloud import metrics
from hosl_cloud.rounds import Ask
from hosl_protocol import (
    Anchor,
    Connection,
    EvalBatch,
    Frame,
    Goodbye,
    Message,
    Phase,
    Probe,
    Projections,
    ProtocolError,
    Refusal,
    Report,
    Role,
    name_of,
)

log = logging.getLogger(__name__)

MAX_WAITING = 4
"""Frames that may wait to be asked for; a device that sends more breaks the protocol."""

_ROUND_MESSAGES = (Probe, Anchor, Projections, EvalBatch)


class PeerGone(Exception):
    """The device's connection has ended."""


class Peer:
    """One connection of one device."""

    def __init__(self, socket: WebSocket) -> None:
        self.name = "?"
        self.is_ready = False
        """Joined, at the cloud's round, and proven so by its digest."""
        self.eval_examples = 0
        self.farewell = ""
        """Why the device left, where it said so."""
        self.reports: asyncio.Queue[Report] = asyncio.Queue()
        self.connection = Connection(Role.CLOUD)
        self._socket = socket
        self._inbox: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._outbox: asyncio.Queue[tuple[Message, Mapping[str, Any]] | None] = asyncio.Queue()
        self.gone = asyncio.Event()

    async def serve(self) -> None:
        """Read and write until the connection ends."""
        writer = asyncio.create_task(self._write())
        try:
            await self._read()
        except ProtocolError as error:
            log.warning("device %s: %s", self.name, error)
            self.tell(Refusal(code="message", reason=str(error)[:500], retry=True))
        finally:
            self.gone.set()
            self.is_ready = False
            self._inbox.put_nowait(None)
            self._outbox.put_nowait(None)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(writer, 5.0)

    async def _read(self) -> None:
        while True:
            event = await self._socket.receive()
            if event["type"] == "websocket.disconnect":
                return
            piece = event.get("bytes")
            if piece is None:
                raise ProtocolError("a text message, expected binary ones")
            metrics.wire_bytes.labels("received").inc(len(piece))
            if self.connection.phase is Phase.CLOSED:
                continue  # said goodbye; what was under way is drained
            frame = self.connection.receive(piece)
            if frame is None:
                continue
            if isinstance(frame.message, Goodbye):
                self.farewell = frame.message.reason[:200]
                return
            if isinstance(frame.message, Report):
                self.reports.put_nowait(frame.message)
                continue
            if self._inbox.qsize() >= MAX_WAITING:
                raise ProtocolError(f"{name_of(frame.message)} while {MAX_WAITING} messages wait already")
            self._inbox.put_nowait(frame)

    async def _write(self) -> None:
        try:
            while (item := await self._outbox.get()) is not None:
                message, tensors = item
                if self.connection.phase is Phase.CLOSED:
                    continue  # queued before the device said goodbye
                for piece in self.connection.send(message, tensors):
                    await self._socket.send({"type": "websocket.send", "bytes": bytes(piece)})
                    metrics.wire_bytes.labels("sent").inc(len(piece))
            await self._socket.close()
        except (WebSocketDisconnect, RuntimeError, OSError) as error:
            log.info("device %s: the connection broke while writing: %s", self.name, error)
        except Exception:
            log.exception("device %s: writing failed", self.name)
        finally:
            self.gone.set()

    def tell(self, message: Message, tensors: Mapping[str, Any] | None = None) -> None:
        """Queue a message; dropped where the connection has ended."""
        if not self.gone.is_set():
            self._outbox.put_nowait((message, tensors or {}))

    def end(self, message: Message) -> None:
        """Say a last message and close."""
        self.tell(message)
        self.hang_up()

    def hang_up(self) -> None:
        """Close once what is queued has been sent."""
        self._outbox.put_nowait(None)

    async def next(self, timeout_s: float) -> Frame:
        """The next message. Raises PeerGone, or TimeoutError."""
        if self._inbox.empty():
            frame = await asyncio.wait_for(self._inbox.get(), max(timeout_s, 0.0))
        else:
            frame = self._inbox.get_nowait()
        if frame is None:
            self._inbox.put_nowait(None)
            raise PeerGone(self.name)
        return frame

    async def answer(self, ask: Ask, deadline: float) -> Frame | None:
        """The message that `ask` wants; others are dropped; None where it is late or the device gone.

        `deadline` is a time of the event loop; what already waits is taken even after it.
        """
        try:
            while True:
                frame = await self.next(deadline - asyncio.get_running_loop().time())
                if _matches(frame.message, ask):
                    return frame
                log.info("device %s: %s is late and dropped", self.name, name_of(frame.message))
        except asyncio.TimeoutError:
            log.warning("device %s sent no %s in time", self.name, name_of(ask.kind))
        except PeerGone:
            log.warning("device %s left before its %s", self.name, name_of(ask.kind))
        return None


def _matches(message: Message, ask: Ask) -> bool:
    if not isinstance(message, ask.kind) or not isinstance(message, _ROUND_MESSAGES) or message.round != ask.round:
        return False
    return not isinstance(message, Probe) or (message.direction, message.sign) == (ask.direction, ask.sign)
