"""A device's way to the cloud, for tests that want it bad: cut in the middle of a frame, held, slowed, or repeating.

It outlives the cloud, whose port is fixed, and sees which messages the cloud sends, for their JSON travels unmasked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Direction = Literal["up", "down"]

_MESSAGE = re.compile(rb'\\"type\\":\\"([a-z-]+)\\"[^{}]{0,200}?\\"round\\":(\d+)')
_LONGEST_MESSAGE = 400


class _Messages:
    """Follows hosl's messages in one direction of a websocket, to tell where they end; other HTTP has none."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._is_open = False
        """Past the handshake."""
        self._is_http = False
        self._message = b""
        """What came of the message under way, as it was on the wire."""
        self._left = 0
        """Bytes of tensors that it lacks."""

    def take(self, data: bytes) -> list[tuple[int, bytes]]:
        """The messages that end in `data`: how far into it, and the message as it was on the wire."""
        if self._is_http:
            return []
        self._buffer += data
        if not self._is_open and not self._has_opened():
            return []

        found = []
        while (size := self._size()) and len(self._buffer) >= size:
            frame = bytes(self._buffer[:size])
            del self._buffer[:size]
            if frame[0] & 0x0F >= 8:  # a ping or the like
                continue

            payload = _payload(frame)
            self._left = self._left - len(payload) if self._message else _tensor_bytes(payload)
            self._message += frame
            if self._left <= 0:
                found.append((len(data) - len(self._buffer), self._message))
                self._message = b""
        return found

    def _has_opened(self) -> bool:
        head, end, _ = self._buffer.partition(b"\r\n\r\n")
        if end:
            self._is_http = b"upgrade: websocket" not in head.lower()
            self._is_open = not self._is_http
            del self._buffer[: len(head) + len(end)]
        return self._is_open

    def _size(self) -> int:
        """Of the websocket frame (RFC 6455, 5.2) that the buffer begins with; 0 where its header is not whole yet."""
        if len(self._buffer) < 2:
            return 0
        start, length = _layout(self._buffer)
        return start + length if len(self._buffer) >= start else 0


def _layout(frame: bytes | bytearray) -> tuple[int, int]:
    """Where a websocket frame's payload begins, and its length."""
    mask, length = 4 * (frame[1] >> 7), frame[1] & 0x7F
    more = {126: 2, 127: 8}.get(length, 0)
    if more:
        length = int.from_bytes(frame[2 : 2 + more], "big")
    return 2 + more + mask, length


def _payload(frame: bytes) -> bytes:
    start, _ = _layout(frame)
    if not frame[1] >> 7:
        return frame[start:]
    mask = frame[start - 4 : start]
    return bytes(byte ^ mask[index % 4] for index, byte in enumerate(frame[start:]))


def _is_hello(message: bytes) -> bool:
    return b'\\"type\\":\\"hello\\"' in _payload(message[:_LONGEST_MESSAGE])


def _tensor_bytes(header: bytes) -> int:
    """How many bytes follow a message's header."""
    layout = json.loads(header[8:])
    return max((entry["data_offsets"][1] for name, entry in layout.items() if name != "__metadata__"), default=0)


@dataclass(eq=False)
class _Link:
    """One connection: the writers to both of its ends, and the end of what came down, where a message may go on."""

    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    seen: bytes = b""
    messages: dict[Direction, _Messages] = field(default_factory=lambda: {"up": _Messages(), "down": _Messages()})

    def cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


@dataclass
class _Count:
    """What to do once so many more bytes have passed in a direction."""

    direction: Direction
    left: int
    action: Callable[[], None]


async def _end(writer: asyncio.StreamWriter) -> None:
    """Wait until a connection that was closed is gone."""
    with contextlib.suppress(OSError):
        await writer.wait_closed()


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
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """One a connection."""
    _counts: list[_Count] = field(default_factory=list)
    _repeats: dict[Direction, list[Callable[[], None]]] = field(default_factory=lambda: {"up": [], "down": []})
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        """Listen on a free port."""
        self._flowing.set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Cut everything, and listen no more."""
        if self._server is not None:
            self._server.close()
        self.release()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

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

    def repeat(self, direction: Direction, action: Callable[[], None]) -> None:
        """Send the next message twice, and do something."""
        self._repeats[direction].append(action)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(asyncio.CancelledError):  # asyncio would print it
            await self._forward(reader, writer)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        except OSError:
            writer.transport.abort()
            await _end(writer)
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
                await _end(each)

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
                await self._write(direction, self._with_repeats(link, direction, data), writer)
            if not writer.transport.is_closing():
                writer.write_eof()
            return
        link.cut()

    def _with_repeats(self, link: _Link, direction: Direction, data: bytes) -> bytes:
        passed, actions, out = 0, self._repeats[direction], b""
        for end, message in link.messages[direction].take(data):
            out, passed = out + data[passed:end], end
            # Nobody says hello again on a connection, and whoever does is refused for good.
            if actions and not _is_hello(message):
                out += message
                actions.pop(0)()
        return out + data[passed:]

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
