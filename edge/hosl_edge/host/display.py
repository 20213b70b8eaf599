"""What a person at the device sees: one live line on a terminal, a plain line now and then elsewhere.

The event loop and the worker threads of downloads write here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from hosl_edge.model.memory import read_memory
from hosl_protocol.program.logs import is_json, sentence_line
from hosl_protocol.program.notify import notify

PLAIN_INTERVAL_S = 10.0


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


class Display:
    """Writes to stderr, and tells systemd."""

    def __init__(self, name: str, on_alive: Callable[[], None] = lambda: None) -> None:
        self._name = name
        self._on_alive = on_alive
        self._is_live = sys.stderr.isatty() and not is_json()
        self._written_at = float("-inf")
        self._last = ""
        self._tenth = -1

    def show(self, progress: Progress) -> None:
        """Draw the live line anew, or write a plain one when it is due."""
        if self._is_live:
            print(f"\r{self._name}: {progress.line()}\x1b[K", end="", file=sys.stderr, flush=True)
            self._last = "\n"
        elif time.monotonic() - self._written_at >= PLAIN_INTERVAL_S:
            print(sentence_line(self._name, progress.line()), file=sys.stderr, flush=True)
            notify(f"STATUS={progress.line()}")
            self._written_at = time.monotonic()

    def say(self, sentence: str) -> None:
        """Write a line that stays."""
        print(self._last + sentence_line(self._name, sentence), file=sys.stderr, flush=True)
        notify(f"STATUS={sentence}")
        self._last = ""

    def show_download(self, what: str, done: int, size: int) -> None:
        """Write a line for each tenth of a large download; every piece counts as a sign of life."""
        self._on_alive()
        tenth = 10 * done // size
        if tenth != self._tenth and size > 1 << 20:
            self._tenth = tenth
            self.say(f"{what}: {done / 1e6:.0f} of {size / 1e6:.0f} MB")
