"""What one address may take of the service: connections, time for a request's head, failures, joins.

A connection that is too much is closed as it is accepted, before TLS, HTTP or anything of ours takes memory for it.

The way of a connection: `Listener.accept` counts it and sets a deadline for its TLS handshake. `HttpProtocol` takes it
over from there, ends that deadline (`settle`), and sets one for the head of each request. `_Accepted.close` counts it
off. The counts are right only because every accepted socket is closed through `_Accepted.close`, whoever ends it. All
of it runs on the event loop, so there are no locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import resource
import socket
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import h11
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from hosl_cloud import metrics
from hosl_protocol.program.waiting import within

HEAD_TIMEOUT_S = 10.0
"""Longest time for a TLS handshake, and then for the head of a request."""
STALL_TIMEOUT_S = 60.0
"""Longest time for which a client may take nothing of an answer."""
MAX_HEAD_BYTES = 8192
BODY_TIMEOUT_S = 10.0
MAX_BODY_BYTES = 1 << 20
_SPARE_FILES = 128
"""Descriptors that are left for the database, checkpoints and downloads."""


class Buckets:
    """A token bucket for each address; the addresses that were longest away are forgotten."""

    def __init__(self, burst: float, per_second: float, addresses: int = 4096) -> None:
        self._burst, self._per_second, self._addresses = burst, per_second, addresses
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By address: what was left, and when."""

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, address: str, now: float | None = None) -> float:
        """Take one; 0 where there was one, else the seconds until there is."""
        now = time.monotonic() if now is None else now
        key = network_of(address)
        # Taken out and put in at the end: the first of the dictionary is the address that was longest away.
        left, since = self._levels.pop(key, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_second)
        wait_s = 0.0 if left >= 1.0 else (1.0 - left) / self._per_second
        self._levels[key] = (left if wait_s else left - 1.0, now)
        if len(self._levels) > self._addresses:
            self._levels.popitem(last=False)
        return wait_s


@dataclass
class Limits:
    """The limits of a service."""

    connections: int = 4096
    """Open at once, of all addresses."""
    connections_per_address: int = 512
    """A fleet behind one router has one address."""
    failures: Buckets = field(default_factory=lambda: Buckets(burst=30, per_second=0.5))
    """Requests without a right token."""
    joins: Buckets = field(default_factory=lambda: Buckets(burst=600, per_second=10))
    """Connections of devices."""


def network_of(address: str) -> str:
    """What counts as one address: of IPv6 the 64 bits that a site has."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False).network_address)
    return str(parsed)


class Listener(socket.socket):
    """A listening socket that closes at once what is above the limits."""

    def __init__(self, family: int, kind: int, protocol: int, limits: Limits) -> None:
        super().__init__(family, kind, protocol)
        self._limits = limits
        self._open: Counter[str] = Counter()
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = limits.connections if files < 0 else min(limits.connections, max(files - _SPARE_FILES, 1))

    @property
    def connections(self) -> int:
        """How many are open."""
        return self._open.total()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection. Raises ConnectionAbortedError where it is one too many: an event loop goes on."""
        connection, address = super().accept()
        key = network_of(address[0])
        if self._open[key] >= self._limits.connections_per_address or self.connections >= self._most:
            connection.close()
            metrics.connections_refused.inc()
            raise ConnectionAbortedError

        self._open[key] += 1
        accepted = _Accepted(fileno=connection.detach())
        accepted.on_close = lambda: self._release(key)
        # By descriptor: the event loop gives HttpProtocol a transport of it, and not this object.
        loop = asyncio.get_running_loop()
        _handshakes[accepted.fileno()] = loop.call_later(HEAD_TIMEOUT_S, accepted.give_up)
        return accepted, address

    def _release(self, key: str) -> None:
        self._open[key] -= 1
        if not self._open[key]:
            del self._open[key]


_handshakes: dict[int, asyncio.TimerHandle] = {}
"""What ends a connection whose TLS handshake does not end, by its descriptor."""


def settle(descriptor: int) -> None:
    """End the deadline of a TLS handshake, which is over or has failed."""
    if (deadline := _handshakes.pop(descriptor, None)) is not None:
        deadline.cancel()


class _Accepted(socket.socket):
    """A connection that tells when it is closed."""

    on_close: Callable[[], None] | None = None

    def close(self) -> None:
        """Close, and make room for another."""
        on_close, self.on_close = self.on_close, None  # once, however often it is closed
        settle(self.fileno())
        super().close()
        if on_close is not None:
            on_close()

    def give_up(self) -> None:
        """End it; the event loop reads the end, and closes."""
        with contextlib.suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)


class HttpProtocol(H11Protocol):
    """Drops a client that does not send a whole head, or does not take its answer: uvicorn would wait for ever."""

    _head_deadline: asyncio.TimerHandle | None = None
    _stall_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin with a connection, whose TLS stands where there is any."""
        super().connection_made(transport)
        settle(transport.get_extra_info("socket").fileno())
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the deadlines with the connection."""
        super().connection_lost(exc)
        self._unwatch()
        self._unstall()

    def pause_writing(self) -> None:
        """Begin to watch a client that does not keep up."""
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        """The client has taken something of its answer."""
        super().resume_writing()
        self._unstall()

    def on_response_complete(self) -> None:
        """Close where the answer was sent before the request's body came: nobody waits for the rest."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.close()

    def _watch_head(self) -> None:
        """A head is awaited while the client's side is idle; between requests uvicorn's own limit holds."""
        if self.conn.their_state is not h11.IDLE or self.timeout_keep_alive_task is not None:
            self._unwatch()
        elif self._head_deadline is None:
            self._head_deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _watch_stall(self) -> None:
        self._unstall()
        waiting = self.transport.get_write_buffer_size()
        self._stall_deadline = self.loop.call_later(STALL_TIMEOUT_S, self._check_stall, waiting)

    def _check_stall(self, waited: int) -> None:
        if self.transport.get_write_buffer_size() < waited:
            self._watch_stall()
        else:
            self.transport.abort()

    def _unstall(self) -> None:
        if self._stall_deadline is not None:
            self._stall_deadline.cancel()
            self._stall_deadline = None

    def _unwatch(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None


async def read_body(request: Request) -> bytes | None:
    """A request's body; None where it is longer than MAX_BODY_BYTES, or slower than BODY_TIMEOUT_S."""
    with contextlib.suppress(asyncio.TimeoutError):
        return await within(BODY_TIMEOUT_S, _read_body(request))
    return None


async def _read_body(request: Request) -> bytes | None:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            return None
    return body
