"""The store's rows, as its readers see them: runs, rounds, evaluations, devices, tokens and a run's log."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.class_counts import ClassCounts
from hosl_cloud.storage.stored_settings import StoredSettings
from hosl_protocol.run.tasks import TOKEN_KINDS

UNENDED = ("pending", "running", "paused")
"""States of runs that go on, now or later."""

BegunBy = Literal["start", "serve", "simulate"]
"""How a run began: by `run start` or the HTTP API, by `serve --config`, or in a simulation."""


@dataclass(frozen=True)
class RunRow:
    """A run as stored."""

    id: str
    bundle: Path
    shard_digest: str
    settings: StoredSettings
    state: str
    epoch: int
    round: int
    reason: str = ""
    """Why it failed, or could not go on."""
    created_at: float = 0.0
    """Unix time."""
    begun_by: BegunBy = "start"

    @property
    def config(self) -> RunConfig:
        """The settings, to train with. Raises ForeignSettings where another version wrote them."""
        return self.settings.config(self.id)


@dataclass(frozen=True)
class RoundRow:
    """A finished round's figures."""

    round: int
    loss: float
    seconds: float
    wire_bytes: int
    """On the wire, both ways, since the round before."""
    finished_at: float
    """Unix time."""


@dataclass(frozen=True)
class CurvePoint:
    """Some rounds in a row as one point of a chart."""

    round: int
    """The last of them."""
    rounds: int
    """How many there are."""
    loss: float
    """The mean; beside it the lowest and the highest."""
    low: float
    high: float
    seconds: float
    """Means of a round."""
    wire_bytes: float


@dataclass(frozen=True)
class EventRow:
    """A sentence of a run's log."""

    id: int
    at: float
    """Unix time."""
    level: str
    text: str


@dataclass(frozen=True)
class NewEvent:
    """A sentence that is to go into a run's log; EventRow is one that is there."""

    run: str
    at: float
    """Unix time."""
    level: str
    text: str
    is_ending: bool = False
    """Whether it says how the run ended."""


@dataclass(frozen=True)
class TokenRow:
    """A device's own token."""

    name: str
    digest: bytes
    """SHA-256 of its secret."""
    created_at: float
    revoked_at: float | None
    """Unix times."""
    bundle: str = ""
    """Whose runs the device may take part in; empty: all."""


@dataclass(frozen=True)
class DeviceRow:
    """The part of a device's row that admission asks for, of one that joined before."""

    data_digest: str
    """Of its training data when it was ready last; empty for one that never was."""
    eval_digest: str
    """Of its held-out data then; empty without."""
    strikes: int
    """Faults counted against it."""


@dataclass(frozen=True)
class Evaluation:
    """The score of the devices' held-out data after a round."""

    round: int
    loss: float
    correct: int
    """Right predictions."""
    scored: int
    """All predictions: one for each example, or for each token of `lm` but a text's first."""
    examples: int = 0
    """Scored held-out examples: of devices that sent all they have."""
    of_examples: int = 0
    """Of all devices of the run, those that are away too."""
    held_out: str = ""
    """Digest of whose held-out data was scored; evaluations of the same can be compared."""
    macro_f1: float | None = None
    """Mean of the classes' F1; None where the task has no classes, or the evaluation is an older version's."""
    by_class: ClassCounts | None = field(default=None, compare=False, repr=False)
    """None like `macro_f1`, and where the store was not asked for it."""

    @property
    def is_complete(self) -> bool:
        """Whether all held-out data that is known was scored."""
        return self.examples == self.of_examples

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return self.correct / self.scored


def perplexity(loss: float, kind: str) -> float | None:
    """Make the perplexity of a language model's mean loss of a token; None for a task of another kind.

    Also for a loss whose perplexity is no number that JSON has.
    """
    return math.exp(loss) if kind in TOKEN_KINDS and loss < _LARGEST_EXPONENT else None


_LARGEST_EXPONENT = 709.0
