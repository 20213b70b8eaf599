"""What a person at the terminal sees of runs: a line for each that is under way, drawn anew in place.

`RunsDisplay.hear` is a listener of runs (runs/progress.py), on their event loop. The lines are drawn by a thread of
their own, which looks at rows that are replaced as a whole.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from hosl_cloud.runs.progress import Evaluated, Evaluates, Event, Over, RoundBegins, RoundDone, Waits
from hosl_cloud.sentences import counted
from hosl_export.steps import Painter
from hosl_protocol.program.live import Live, can_draw
from hosl_protocol.program.logs import is_json, is_quiet
from hosl_protocol.program.pace import Pace, duration

NARROWEST_BAR, WIDEST_BAR = 6, 40
GAP = 2


@dataclass(frozen=True)
class _Row:
    """What is known of a run under way."""

    run: str
    round: int = 0
    rounds: int = 0
    loss: float | None = None
    accuracy: float | None = None
    devices: int = 0
    instead: str = ""
    """What it does where it is in no round."""
    pace: Pace = field(default_factory=Pace)

    def figures(self) -> list[str]:
        """What is shown beside the bar, what matters most first; empty where it is not known."""
        pace_s = self.pace.round_s
        return [
            f"{self.round}/{self.rounds}" if self.rounds else "",
            "" if self.loss is None else f"loss {self.loss:.4f}",
            "" if self.accuracy is None else f"accuracy {100 * self.accuracy:.1f} %",
            self.instead or self.pace.left(self.rounds),
            "" if pace_s is None else f"{pace_s:.2g} s a round" if pace_s < 10 else f"{duration(pace_s)} a round",
            counted(self.devices, "device") if self.devices and not self.instead else "",
        ]


class RunsDisplay:
    """Draws the runs that it hears of."""

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._loads_since: float | None = time.monotonic()

    @contextlib.contextmanager
    def drawn(self, *, shares_stdout: bool = True) -> Iterator[None]:
        """Draw within, where standard error is a terminal.

        With `shares_stdout` standard output has to be one, too: where it is read by another program, that program
        writes to this terminal, and knows nothing of what is drawn there.
        """
        streams = (sys.stderr, sys.stdout) if shares_stdout else (sys.stderr,)
        if is_json() or is_quiet() or not can_draw(*streams):
            yield
            return

        painter = Painter()
        live = Live(lambda columns: self._lines(painter, columns))
        live.start()
        last = ""
        try:
            yield
        except BaseException:
            # Whoever interrupts a run has its last figures before him.
            last = "\n".join(self._lines(painter, live.columns)) if self._rows else ""
            raise
        finally:
            live.close(last)

    def note_loaded(self) -> None:
        """Show no more that everything is being loaded."""
        self._loads_since = None

    def hear(self, event: Event) -> None:
        """Take in what has happened to a run."""
        self.note_loaded()
        row = self._rows.get(event.run, _Row(event.run))
        if isinstance(event, Over):
            self._rows = {run: each for run, each in self._rows.items() if run != event.run}
            return
        if isinstance(event, Waits):
            row.pace.forget()
            row = replace(row, instead=f"waits for devices: {event.ready} of {event.needed} are there")
        elif isinstance(event, Evaluates):
            row = replace(row, round=event.round, instead="evaluates")
        elif isinstance(event, Evaluated):
            row = replace(row, accuracy=event.evaluation.accuracy, instead="")
        elif isinstance(event, RoundBegins):
            row = replace(row, round=event.round - 1, rounds=event.rounds, instead="")
        elif isinstance(event, RoundDone):
            row.pace.note(event.round)
            row = replace(row, round=event.round, loss=event.loss, devices=event.devices)
        self._rows = {**self._rows, event.run: row}

    def _lines(self, painter: Painter, columns: int) -> list[str]:
        rows, since = list(self._rows.values()), self._loads_since
        if rows:
            return painter.lines(_table(rows, columns), columns)
        loads = "" if since is None else f"loads everything  {duration(time.monotonic() - since)}"
        return painter.lines(Text(loads, "dim"), columns) if loads else []


def _table(rows: Sequence[_Row], columns: int) -> Table:
    """Lay the rows out: figures that do not fit are left out, the least ones first, and the bar takes the rest."""
    names = [row.run for row in rows] if len(rows) > 1 else []
    figures = [texts for texts in zip(*(row.figures() for row in rows), strict=True) if any(texts)]
    texts = [*([tuple(names)] if names else []), *figures]

    def width(texts: Sequence[Sequence[str]]) -> int:
        return sum(max(map(len, column)) + GAP for column in texts)

    while len(texts) > 1 and width(texts) + NARROWEST_BAR > columns:
        texts.pop()
    bar = min(columns - width(texts), WIDEST_BAR) if any(row.rounds for row in rows) else 0

    has_bar = bar >= NARROWEST_BAR
    table = Table.grid(*(Column(no_wrap=True) for _ in range(len(texts) + has_bar)), padding=(0, GAP, 0, 0))
    for place, row in enumerate(rows):
        cells: list[RenderableType] = [Text(column[place]) for column in texts]
        if has_bar:
            shown = ProgressBar(row.rounds or 1, row.round, width=bar, complete_style="green", finished_style="green")
            cells.insert(1 if names else 0, shown)
        table.add_row(*cells)
    return table
