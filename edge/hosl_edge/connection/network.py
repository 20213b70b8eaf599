"""Notices when an address or a route appears on this machine: a device then need not sit out its pause.

Linux's route netlink; where it can't be had, a pause is a pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct

from hosl_protocol.program.waiting import within

log = logging.getLogger(__name__)

# From linux/rtnetlink.h.
_GROUPS = 0x10 | 0x40 | 0x100 | 0x400  # addresses and routes of IPv4 and IPv6
_NEW_ADDRESS, _NEW_ROUTE = 20, 24
_HEADER = struct.Struct("=IHHII")


class NetworkWatch:
    """Listens for the kernel's news; used on the event loop."""

    def __init__(self, listener: socket.socket | None = None) -> None:
        self._listener = listener or _open_listener()
        if self._listener is not None:
            self._listener.setblocking(False)

    async def pause(self, seconds: float) -> bool:
        """Wait so many seconds, or until the network changes. Returns whether it did."""
        if self._listener is None:
            await asyncio.sleep(seconds)
            return False
        self._drain()  # what came while nobody waited

        try:
            await within(seconds, self._changed(self._listener))
        except asyncio.TimeoutError:
            return False
        return True

    async def _changed(self, listener: socket.socket) -> None:
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(listener, news.set)
        try:
            while True:
                await news.wait()
                news.clear()
                if self._drain():
                    return
        finally:
            loop.remove_reader(listener)

    def _drain(self) -> bool:
        """Read the messages that wait. Returns whether an address or a route is new."""
        is_new = False
        with contextlib.suppress(OSError):
            while self._listener is not None and (data := self._listener.recv(65536)):
                is_new |= any(kind in (_NEW_ADDRESS, _NEW_ROUTE) for kind in _kinds(data))
        return is_new

    def close(self) -> None:
        """Stop listening."""
        if self._listener is not None:
            self._listener.close()


def _open_listener() -> socket.socket | None:
    try:
        listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        listener.bind((0, _GROUPS))
    except (OSError, AttributeError) as error:
        log.debug("the network cannot be watched: %s", error)
        return None
    return listener


def _kinds(data: bytes) -> list[int]:
    """Types of the netlink messages in a datagram."""
    kinds, place = [], 0
    while place + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, place)
        if length < _HEADER.size:
            break
        kinds.append(kind)
        place += (length + 3) & ~3
    return kinds
