"""How a run goes, as events for whoever follows it in this process: a display at a terminal, a program of one's own.

A Run has listeners, and `Run.tell` calls them on the event loop, one after the other: what they do must be quick. An
event is told after what it tells of is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from hosl_cloud.storage.records import Evaluation


@dataclass(frozen=True)
class Waits:
    """The run waits for devices: at the wait's beginning, and when one has come or gone."""

    run: str
    """The run's id, here as below."""
    ready: int
    needed: int


@dataclass(frozen=True)
class Evaluates:
    """The devices' held-out data is being scored."""

    run: str
    round: int
    """The last finished one."""


@dataclass(frozen=True)
class Evaluated:
    """The devices' held-out data was scored."""

    run: str
    evaluation: Evaluation


@dataclass(frozen=True)
class RoundBegins:
    """A round is tried; one that comes to nothing begins again."""

    run: str
    round: int
    rounds: int
    """Of the whole run."""


@dataclass(frozen=True)
class RoundDone:
    """A round is over."""

    run: str
    round: int
    rounds: int
    loss: float
    seconds: float
    devices: int
    """How many took part."""
    wire_bytes: int
    """Of both ways, since the round before."""


@dataclass(frozen=True)
class Over:
    """The run has ended, or is paused."""

    run: str
    round: int
    """The last finished one."""
    ending: Literal["completed", "stopped-early", "stopped", "failed", "paused"]


Event: TypeAlias = Waits | Evaluates | Evaluated | RoundBegins | RoundDone | Over
Listener: TypeAlias = Callable[[Event], None]
