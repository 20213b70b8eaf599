"""A device's way to the cloud, for tests that want it bad: it can be cut in the middle of a frame, held, or slowed.

It outlives the cloud, whose port is fixed, and sees which messages the cloud sends, for their JSON travels unmasked.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Direction = Literal["up", "down"]

_MESSAGE = re.compile(rb'\\"type\\":\\"([a-z-]+)\\"[^{}]{0,200}?\\"round\\":(\d+)')
_LONGEST_MESSAGE = 400


@dataclass(eq=False)
class _Link:
    """One connection: the writers to both of its ends, and the end of what came down, where a message may go on."""

    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    seen: bytes = b""

    def cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


@dataclass
class _Count:
    """What to do once so many more bytes have passed in a direction."""

    direction: Direction
    left: int
    action: Callable[[], None]


@dataclass
class Proxy:
    """Forwards connections to a port of this machine."""

    upstream_port: int
    on_message: Callable[[str, int], None] = lambda kind, round_: None
    """Told the type and round of a message from the cloud before it is passed on; it must not wait."""
    delay_s: float = 0.0
    """What every piece is held up by."""
    port: int = 0
    _server: asyncio.Server | None = None
    _links: set[_Link] = field(default_factory=set)
    _counts: list[_Count] = field(default_factory=list)
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        """Listen on a free port."""
        self._flowing.set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Cut everything, and listen no more."""
        if self._server is not None:
            self._server.close()
        self.release()
        self.cut()

    def cut(self) -> None:
        """End every connection with whatever is under way."""
        for link in self._links:
            link.cut()

    def hold(self) -> None:
        """Pass nothing on, in either direction, and let new connections wait: nobody is told."""
        self._flowing.clear()

    def release(self) -> None:
        """Pass on what was held."""
        self._flowing.set()

    def after(self, direction: Direction, count: int, action: Callable[[], None]) -> None:
        """Do something between two bytes: when `count` more have passed, and before the next."""
        self._counts.append(_Count(direction, count, action))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # asyncio would print it
            await self._forward(reader, writer)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        except OSError:
            writer.transport.abort()
            return
        link = _Link((writer, upstream_writer))
        self._links.add(link)
        try:
            await asyncio.gather(
                self._pump(link, "up", reader, upstream_writer), self._pump(link, "down", upstream_reader, writer)
            )
        finally:
            self._links.discard(link)
            for each in link.writers:
                each.close()

    async def _pump(
        self, link: _Link, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._flowing.wait()
                if direction == "down":
                    self._look(link, data)
                await self._write(direction, data, writer)
            if not writer.transport.is_closing():
                writer.write_eof()
            return
        link.cut()

    async def _write(self, direction: Direction, data: bytes, writer: asyncio.StreamWriter) -> None:
        """Pass `data` on, stopping where something is to be done between two bytes."""
        counts = [count for count in self._counts if count.direction == direction]
        due = sorted((count for count in counts if count.left <= len(data)), key=lambda count: count.left)
        for count in counts:
            count.left -= len(data)
        passed = 0
        for count in due:
            end = count.left + len(data)
            writer.write(data[passed:end])
            await writer.drain()
            passed = end
            self._counts.remove(count)
            count.action()
        if not writer.transport.is_closing():
            writer.write(data[passed:])
            await writer.drain()

    def _look(self, link: _Link, data: bytes) -> None:
        link.seen += data
        end = 0
        for found in _MESSAGE.finditer(link.seen):
            end = found.end()
            self.on_message(found[1].decode(), int(found[2]))
        link.seen = link.seen[max(end, len(link.seen) - _LONGEST_MESSAGE) :]
