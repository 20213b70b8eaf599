"""What a program writes at a terminal: whole lines that stay, and below them a few that are drawn anew in place.

`write_line` is for the lines that stay, `Live` for the others. A line goes out in one write, and at a terminal it first
erases what stands at the cursor: two programs at one terminal never run their lines together.

The cursor rests at the start of what is drawn. So a terminal that is made narrower, and breaks the drawn lines in two,
leaves nothing of them behind at the next drawing; and the cursor is never hidden, since a program that is killed could
not show it again.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

INTERVAL_S = 0.25
"""Between drawings."""
_ERASE = "\r\x1b[J"
"""From the start of the line to the end of the screen."""

_lock = threading.RLock()
"""Held for a write: by the thread that draws, and by whoever has a line to say."""
_live: Live | None = None
"""What is drawn in this process now."""


def write_line(stream: TextIO, line: str, *, is_bare: bool = False) -> None:
    """Write a line that stays, above what is drawn; one that `is_bare` has nothing for the terminal in it."""
    with _lock:
        if is_bare or not moves_cursor(stream):
            _write(stream, line + "\n")
            return
        drawing = _live.drawing if _live is not None and _is_in_front(stream) else ""
        _write(stream, f"{_ERASE}{line}\n{drawing}")


def is_live() -> bool:
    """Whether this process draws anything in place."""
    return _live is not None


def moves_cursor(stream: TextIO) -> bool:
    """Whether a stream is a terminal in which the cursor can be moved."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def can_draw(*streams: TextIO) -> bool:
    """Whether a program may draw: these streams are terminals, and it is in their foreground.

    In the background whoever is in front, a shell or another program, has the last line.
    """
    return all(moves_cursor(stream) and _is_in_front(stream) for stream in streams)


def _is_in_front(stream: TextIO) -> bool:
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except OSError:  # not the terminal that controls this process: nobody else is in front
        return True


class Live:
    """Lines that are drawn in place on standard error, by a thread of their own."""

    def __init__(self, lines: Callable[[int], Sequence[str]]) -> None:
        """`lines` is asked for them, on that thread, with the columns that each of them may take."""
        self.drawing = ""
        """What is on the screen now, with what leads the cursor back to its start."""
        self._lines, self._stream = lines, sys.stderr
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._draw_on, name="display", daemon=True)

    @property
    def columns(self) -> int:
        """How many a line may take."""
        # One is left free: after the last one a terminal may or may not begin another line.
        return max(self._size().columns, 2) - 1

    def _size(self) -> os.terminal_size:
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except OSError:  # it may be gone
            columns = rows = 0
        return os.terminal_size((columns or 80, rows or 24))

    def start(self) -> None:
        """Draw from now on."""
        global _live
        _live = self
        self._thread.start()

    def draw(self) -> None:
        """Draw anew what has changed."""
        with _lock:
            if self._is_over.is_set():
                return
            if not _is_in_front(self._stream):
                self.drawing = ""
                return
            lines = list(self._lines(self.columns))[: max(self._size().lines - 1, 1)]
            back = f"\r\x1b[{len(lines) - 1}A" if len(lines) > 1 else "\r"
            drawing = "\n".join(lines) + back if lines else ""
            if drawing != self.drawing:
                self.drawing = drawing
                _write(self._stream, _ERASE + drawing)

    def close(self, last: str = "") -> None:
        """Erase what is drawn, and leave `last` in its place, if anything."""
        global _live
        with _lock:
            if self._is_over.is_set():
                return
            self._is_over.set()
            _live = None
            with contextlib.suppress(OSError):  # the terminal may be gone
                _write(self._stream, (_ERASE if self.drawing else "") + (last + "\n" if last else ""))

    def _draw_on(self) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            while not self._is_over.is_set():
                self.draw()
                self._is_over.wait(INTERVAL_S)


@contextlib.contextmanager
def drawn(lines: Callable[[int], Sequence[str]]) -> Iterator[Live]:
    """Draw lines in place within; whatever ends it, the screen is left in order."""
    live = Live(lines)
    live.start()
    try:
        yield live
    finally:
        live.close()


def fitting(parts: Sequence[str], columns: int, gap: str = "  ") -> str:
    """Put the first of the parts that fit on one line; at least the first, cut."""
    line = parts[0][:columns]
    for part in parts[1:]:
        if len(line) + len(gap) + len(part) > columns:
            break
        line += gap + part
    return line


def _write(stream: TextIO, text: str) -> None:
    if text:
        stream.write(text)
        stream.flush()
