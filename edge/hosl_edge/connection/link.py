"""One websocket to the cloud: frames come and go while the session computes.

Everything runs on the event loop, in two tasks beside the session's: the reader drains the socket into a queue, and the
writer sends what the session queued, in its order. Both feed the protocol's state machine, which never awaits, so that
each change of its state is whole. The session must not change a tensor that it has queued before it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from hosl_edge.connection.trust import UNKNOWN_TOKEN, Cloud, explain
from hosl_edge.exceptions import ConnectionLost, NoRun, RefusedError
from hosl_edge.host.display import Progress
from hosl_protocol.exceptions import HoslError, ProtocolError
from hosl_protocol.program.proxies import through
from hosl_protocol.program.waiting import within
from hosl_protocol.wire.codec import PIECE_BYTES, Frame
from hosl_protocol.wire.connection import Connection, Phase, Role
from hosl_protocol.wire.messages import Goodbye, Message

log = logging.getLogger(__name__)

HEARTBEAT_S = 15.0
"""A peer that answers no ping for this long, after as long a silence, is gone."""

GOODBYE_S = 5.0
"""How long a last word may take to be sent."""


class _Connect(connect):
    """Follows no redirect: the cloud may not send a device, with its token, anywhere else."""

    def process_redirect(self, exc: Exception) -> Exception:
        """The redirect is an error."""
        return exc


class Link:
    """The protocol's connection over a socket; what comes in waits in a queue, as does what goes out."""

    def __init__(self, progress: Progress) -> None:
        """Counts the bytes of both ways in `progress`."""
        self._progress = progress
        self._connection = Connection(Role.EDGE)
        self._incoming: asyncio.Queue[Frame | HoslError] = asyncio.Queue()
        self._outgoing: asyncio.Queue[tuple[Message, Mapping[str, Any]]] = asyncio.Queue()
        self._writer: asyncio.Task[None] | None = None

    @property
    def is_closed(self) -> bool:
        """Whether one side has said its last word."""
        return self._connection.phase is Phase.CLOSED

    @asynccontextmanager
    async def open(self, cloud: Cloud) -> AsyncIterator[None]:
        """Talk to the cloud, within. Raises ConnectionLost, RefusedError (token) and NoRun."""
        async with await _connect(cloud) as socket:
            self._writer = asyncio.create_task(self._write(socket))
            tasks = [asyncio.create_task(self._read(socket)), self._writer]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def send(self, message: Message, tensors: Mapping[str, Any] | None = None) -> None:
        """Queue a message; its tensors must stay as they are until it is sent."""
        self._outgoing.put_nowait((message, tensors or {}))

    async def receive(self) -> Frame:
        """Wait for the next frame. Raises ConnectionLost or ProtocolError, once what came before is taken."""
        item = await self._incoming.get()
        if isinstance(item, HoslError):
            raise item
        return item

    async def drain(self) -> None:
        """Wait until everything is sent: on a slow link sets of activations would pile up behind each other."""
        assert self._writer is not None
        emptied = asyncio.create_task(self._outgoing.join())
        await asyncio.wait({emptied, self._writer}, return_when=asyncio.FIRST_COMPLETED)
        emptied.cancel()

    async def leave(self, reason: str) -> None:
        """Say why this device leaves, where the cloud still listens; waits GOODBYE_S at most."""
        if self.is_closed:
            return
        self.send(Goodbye(reason=reason))
        with contextlib.suppress(asyncio.TimeoutError):
            await within(GOODBYE_S, self._outgoing.join())

    async def _read(self, socket: ClientConnection) -> None:
        """Drain the socket, so that pings are answered whatever the rest is doing."""
        try:
            async for piece in socket:
                if isinstance(piece, str):
                    raise ProtocolError("a text message, expected binary ones")
                self._progress.received_bytes += len(piece)

                # After the last word the cloud may still send what it had begun; only the pings matter then.
                if self.is_closed:
                    continue
                frame = self._connection.receive(piece)
                if frame is not None:
                    self._incoming.put_nowait(frame)
            error: HoslError = ConnectionLost("the cloud closed the connection")
        except HoslError as broken:
            error = broken
        except (ConnectionClosed, OSError) as broken:
            error = ConnectionLost(f"the connection broke: {broken}")
        except Exception as broken:  # without an error in the queue the session would wait for ever
            log.exception("reading failed")
            error = ConnectionLost(f"reading failed: {broken}")

        self._incoming.put_nowait(error)

    async def _write(self, socket: ClientConnection) -> None:
        try:
            while True:
                message, tensors = await self._outgoing.get()
                for piece in self._connection.send(message, tensors):
                    await socket.send(piece)
                    self._progress.sent_bytes += len(piece)
                del tensors  # a set of activations, which would stay until the next message comes

                self._outgoing.task_done()
        except ConnectionClosed:
            pass  # the reader reports it
        except Exception as error:
            log.exception("writing failed")
            self._incoming.put_nowait(ConnectionLost(f"writing failed: {error}"))


async def _connect(cloud: Cloud) -> ClientConnection:
    try:
        return await _Connect(
            cloud.address.rstrip("/") + "/v1/device",
            additional_headers=cloud.headers,
            ssl=cloud.context,
            logger=_quiet_logger(),
            compression=None,
            proxy=cloud.proxy.url if cloud.proxy is not None else None,
            max_size=PIECE_BYTES,
            ping_interval=HEARTBEAT_S,
            ping_timeout=HEARTBEAT_S,
        )

    except InvalidStatus as error:
        code = error.response.status_code
        if code in (401, 403):
            raise RefusedError(UNKNOWN_TOKEN, retry=False) from error
        if code == 503:
            raise NoRun(error.response.headers.get("Retry-After")) from error
        raise ConnectionLost(f"{cloud.address} answered {code}") from error
    except (OSError, InvalidHandshake, ConnectionClosed, asyncio.TimeoutError) as error:
        raise ConnectionLost(f"cannot talk to {cloud.address}{through(cloud.proxy)}: {explain(error)}") from error


def _quiet_logger() -> logging.Logger:
    """For websockets, whose debug lines show every header, and so the token."""
    quiet = logging.getLogger("hosl_edge.websocket")
    quiet.setLevel(logging.INFO)
    return quiet
