"""What a person at the device sees: sentences, and at a terminal below them one line that is drawn anew in place.

Elsewhere the rounds are a sentence now and then. The event loop and the worker threads of downloads write here; the
line is drawn by a thread of its own, which only looks at the figures.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hosl_edge.model.memory import read_memory
from hosl_protocol.program.live import Live, can_draw, fitting, write_line
from hosl_protocol.program.logs import is_json, is_quiet, name_speaker, sentence_line
from hosl_protocol.program.notify import notify
from hosl_protocol.program.pace import Pace, duration

PLAIN_INTERVAL_S = 10.0
"""Between sentences about rounds, at least."""
LARGE_BYTES = 1 << 20
"""A download of fewer is over before anybody asks."""
AT_ROUNDS = ("training", "evaluating", "waiting")
"""States of an agent that is in a run's rounds; in others its line says what it does instead."""


@dataclass
class Progress:
    """Figures of the run so far."""

    state: str = "starting"
    """What the agent is doing, in a word or two."""
    run: str | None = None
    rounds: int = 0
    round: int = 0
    loss: float | None = None
    right: int | None = None
    scored: int | None = None
    """Right predictions of the device's own held-out data, and all of them, in its last evaluation."""
    accuracy_round: int = 0
    """The round after which it was measured; evaluations are rarer than rounds."""
    step_seconds: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    report_every: int = 1
    """Rounds between sentences about them."""

    @property
    def accuracy(self) -> float | None:
        """Share of right predictions; None before the first evaluation."""
        return None if self.right is None or not self.scored else self.right / self.scored

    def line(self) -> str:
        """Put the figures on one line."""
        memory = read_memory()
        parts = [f"round {self.round}/{self.rounds}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.accuracy is not None:
            parts.append(self.score())

        parts += [
            f"step {self.step_seconds:.2f} s",
            f"memory {memory.resident / 1e6:.0f} MB (anonymous {memory.anonymous / 1e6:.0f}, "
            f"peak {memory.peak / 1e6:.0f})",
            f"sent {self.sent_bytes / 1e6:.1f} MB",
        ]
        return "  ".join(parts)

    def score(self) -> str:
        """Tell the accuracy, and when it was measured; empty where it was not."""
        if self.accuracy is None:
            return ""
        share = f"{100 * self.accuracy:.1f} % ({self.right} of {self.scored} right)"
        return f"accuracy on its own held-out data {share} at round {self.accuracy_round}"


@dataclass
class _Download:
    """A download under way."""

    what: str
    began: float
    first: int
    """Bytes that were there at its beginning."""
    done: int
    size: int

    def line(self) -> str:
        rate = (self.done - self.first) / max(time.monotonic() - self.began, 1e-6)
        left = f"  {duration((self.size - self.done) / rate)} left" if rate else ""
        return f"downloads {self.what}: {self.done / 1e6:.0f} of {self.size / 1e6:.0f} MB  {rate / 1e6:.1f} MB/s{left}"


class Display:
    """Writes to stderr, and tells systemd."""

    def __init__(self, name: str, on_alive: Callable[[], None] = lambda: None) -> None:
        self._name = name
        self._on_alive = on_alive
        self._live: Live | None = None
        self._written_at = self._noted_at = float("-inf")
        self._download: _Download | None = None
        self._pace = Pace()
        name_speaker(name)

    @contextlib.contextmanager
    def drawn(self, progress: Callable[[], Progress]) -> Iterator[None]:
        """Draw the line within, where standard error is a terminal; `progress` is asked for the figures of now."""
        # A program whose output goes elsewhere is one of several at this terminal, as a rule.
        if is_json() or is_quiet() or not can_draw(sys.stderr, sys.stdout):
            yield
            return

        live = self._live = Live(lambda columns: [self._line(progress(), columns)])
        live.start()
        last = ""
        try:
            yield
        except BaseException:
            # Whoever interrupts a run has its last figures before him.
            last = self._line(progress(), sys.maxsize) if progress().loss is not None else ""
            raise
        finally:
            self._live = None
            live.close(last)

    def _line(self, progress: Progress, columns: int) -> str:
        """Put what matters most on a line of so many columns."""
        download = self._download
        if download is not None or progress.state not in AT_ROUNDS or not progress.rounds:
            text = download.line() if download is not None else progress.state
            return f"{self._name}: {text}"[:columns]

        parts = [f"{self._name}: round {progress.round}/{progress.rounds}"]
        parts += [progress.state] if progress.loss is None else [f"loss {progress.loss:.4f}"]
        parts += [] if progress.accuracy is None else [f"own accuracy {100 * progress.accuracy:.1f} %"]
        parts += [left] if (left := self._pace.left(progress.rounds)) else []
        parts += [] if self._pace.round_s is None else [f"{self._pace.round_s:.2f} s a round"]
        memory = read_memory()
        parts += [f"memory {memory.resident / 1e6:.0f} MB", f"sent {progress.sent_bytes / 1e6:.1f} MB"]
        return fitting(parts, columns)

    def show(self, progress: Progress) -> None:
        """Show the figures of a round or an evaluation that is over."""
        self._pace.note(progress.round)
        now = time.monotonic()
        is_due = progress.round % progress.report_every == 0 or progress.round == progress.rounds
        if self._live is None and is_due and now - self._written_at >= PLAIN_INTERVAL_S:
            self._write(progress.line())
            self._written_at = now
        if now - self._noted_at >= PLAIN_INTERVAL_S:
            notify(f"STATUS={progress.line()}")
            self._noted_at = now

    def say(self, sentence: str, *, matters: bool = False) -> None:
        """Write a line that stays; with --quiet only one that `matters`, a result or trouble."""
        self._write(sentence, matters=matters)
        notify(f"STATUS={sentence}")

    def _write(self, sentence: str, *, matters: bool = False) -> None:
        if matters or not is_quiet():
            write_line(sys.stderr, sentence_line(self._name, sentence, "hosl-edge"), is_bare=is_json())

    def show_download(self, what: str, done: int, size: int, *, has_been_said: bool = False) -> None:
        """Show a large download: a line at its beginning and its end; every piece counts as a sign of life.

        The first line is left out for one that `has_been_said` to begin.
        """
        self._on_alive()
        if size < LARGE_BYTES:
            return
        download = self._download
        if download is None or (download.what, download.size) != (what, size) or done < download.done:
            download = self._download = _Download(what, time.monotonic(), done, done, size)
            if self._live is None and not has_been_said:
                self.say(f"downloads {what}, {size / 1e6:.1f} MB")

        download.done = done
        if done >= size:
            self._download = None
            self.say(f"downloaded {what}, {size / 1e6:.1f} MB in {duration(time.monotonic() - download.began)}")
