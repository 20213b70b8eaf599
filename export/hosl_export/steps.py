"""The steps of a command that people wait for: at a terminal what is under way, with its seconds; a line for each
that is over."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.spinner import Spinner
from rich.table import Table

from hosl_protocol.program.live import can_draw, drawn, write_line
from hosl_protocol.program.logs import is_json, is_quiet, sentence_line
from hosl_protocol.program.pace import duration


class Painter:
    """Makes lines of what rich shows, in the colours that standard error has; none with NO_COLOR."""

    def __init__(self) -> None:
        # What stands in for the stream later, to keep a library quiet, is no terminal.
        self._console = Console(file=sys.stderr, highlight=False, legacy_windows=False)

    def lines(self, shown: RenderableType, columns: int) -> list[str]:
        """Render for a terminal of so many columns."""
        self._console.width = columns
        with self._console.capture() as captured:
            self._console.print(shown, no_wrap=True, overflow="ellipsis")
        return [line.rstrip() for line in captured.get().splitlines()]


class Steps:
    """What shows a command's steps: called with a step's name, entered while it runs."""

    def __init__(self, program: str, *, keeps_lines: bool = True) -> None:
        """Without `keeps_lines` nothing is left of a step that is over."""
        self._program, self._keeps_lines = program, keeps_lines
        self._name, self._began = "", 0.0
        self._spinner = Spinner("dots", style="cyan")

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Draw what is under way within, where standard error is a terminal."""
        if is_json() or is_quiet() or not can_draw(sys.stderr):
            yield
            return
        painter = Painter()
        with drawn(lambda columns: painter.lines(self._line(), columns) if self._name else []):
            yield

    def _line(self) -> Table:
        line = Table.grid(padding=(0, 1))
        line.add_row(self._spinner, self._name, f"[dim]{duration(time.monotonic() - self._began)}")
        return line

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Show a step while it runs."""
        # This stream, not whatever sys.stderr is later: libraries are kept quiet by another stream in its place.
        stream, ending = sys.stderr, "stopped after "
        self._name, self._began = name, time.monotonic()
        try:
            yield
            ending = ""
        finally:
            self._name = ""
            if self._keeps_lines and not is_quiet():
                sentence = f"{name}: {ending}{time.monotonic() - self._began:.1f} s"
                write_line(stream, sentence_line(self._program, sentence), is_bare=is_json())
