"""A real pseudo-terminal for a program, and what a person would see in it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

_SEQUENCE = re.compile(r"\x1b\[([0-9;]*)([A-Za-z])|\x1b(.)")


class Process(Protocol):
    """What a terminal needs of a program: subprocess.Popen, or Program of processes.py."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: signal.Signals, /) -> None: ...


class Terminal:
    """Runs a program in a terminal of its own, whose foreground it has."""

    def __init__(
        self, start: Sequence[object] | Callable[[str], Process], columns: int = 80, rows: int = 24, **variables: str
    ) -> None:
        """Start a command, with these variables in its environment; or call `start` with the terminal's name."""
        # Both ends: a program that opens its end by name may do so late, and until then nobody else would have it open.
        self._main, self._inner = pty.openpty()
        self._columns, self._rows = columns, rows
        self.resize(columns)
        self.process = start(os.ttyname(self._inner)) if callable(start) else _run(start, self._inner, variables)
        self._received = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self._main, 65536)
            except OSError:  # nobody has it open any more
                return
            if not piece:
                return
            self._received += piece

    @property
    def raw(self) -> str:
        """All that was written, as it was written."""
        return self._received.decode(errors="replace")

    @property
    def lines(self) -> list[str]:
        """What is to be seen, from the first line that was ever written; without what was erased."""
        return show(self.raw)

    @property
    def text(self) -> str:
        """The same in one piece."""
        return "\n".join(self.lines)

    def resize(self, columns: int) -> None:
        """Change its width, as a person does who pulls at the window."""
        fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", self._rows, columns, 0, 0))

    def press(self, keys: str) -> None:
        """Type something; `\\x03` is Ctrl-C."""
        os.write(self._main, keys.encode())

    def wait_for(self, is_there: Callable[[str], object], seconds: float = 120.0) -> None:
        """Wait until what is to be seen is right."""
        ends = time.monotonic() + seconds
        while not is_there(self.text):
            if self.process.poll() is not None:
                self._read_rest()
                assert is_there(self.text), f"the program ended:\n{self.text}"
                return
            assert time.monotonic() < ends, f"this is to be seen:\n{self.text}"
            time.sleep(0.02)

    def end(self, seconds: float = 60.0) -> int:
        """Wait for the program's end; its exit code."""
        code = self.process.wait(seconds)
        self._read_rest()
        return code

    def _read_rest(self) -> None:
        """Read what a program has left that has ended: all of it, for nobody can write any more."""
        if self._inner >= 0:
            os.close(self._inner)
            self._inner = -1
        self._reader.join(5.0)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._read_rest()
        os.close(self._main)


def show(written: str) -> list[str]:
    """Show what a terminal shows that has no end of columns and rows; a sequence that is not known is an error."""
    lines: list[list[str]] = [[]]
    row = column = place = 0
    while place < len(written):
        letter = written[place]
        if letter == "\x1b":
            found = _SEQUENCE.match(written, place)
            assert found is not None, repr(written[place : place + 20])
            count = int(found[1] or 1) if found[1] is not None and found[1].isdecimal() else 1
            if found[2] == "A":
                row = max(row - count, 0)
            elif found[2] in ("J", "K") and not found[1]:
                del lines[row][column:]
                if found[2] == "J":
                    del lines[row + 1 :]
            else:
                assert found[2] == "m", f"{found[0]!r} is not known"
            place = found.end()
            continue

        place += 1
        if letter == "\r":
            column = 0
        elif letter == "\n":
            row += 1
            lines += [[]] if row == len(lines) else []
        else:
            lines[row] += " " * (column - len(lines[row]))
            lines[row][column : column + 1] = [letter]
            column += 1
    return ["".join(line).rstrip() for line in lines]


def python(folder: Path, script: str) -> list[str]:
    """A command that runs a script."""
    path = folder / "script.py"
    path.write_text(script, encoding="utf-8")
    return [sys.executable, str(path)]


def _run(command: Sequence[object], terminal: int, variables: dict[str, str]) -> Process:
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    environment |= {"TERM": "xterm-256color", **variables}

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    words = [str(word) for word in command]
    ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    return subprocess.Popen(words, env=environment, start_new_session=True, preexec_fn=take_terminal, **ends)
