"""How a round talks to devices: what its generators yield to their driver, and what they know of the round.

A generator yields a Tell or a Fault, and goes on at once, or an Await, and is sent the Answer. Fleet.drive
(runs/fleet.py) does what it asks for. A batch of activations is a frame up to `batch_of`, and BatchArrays from there to
the tail (tail/trainer.py).

Shapes: T tokens of a batch without padding, D width of the cut layer, B examples, N labels, P directions.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from hosl_cloud.exceptions import BatchError, NotFiniteError
from hosl_cloud.rounds.aggregation import aggregate
from hosl_cloud.settings import RunConfig
from hosl_protocol.arithmetic.rotation import GradientLayout
from hosl_protocol.wire.codec import Frame, Piece
from hosl_protocol.wire.messages import Late, Message, Refusal, RoundStart, name_of

log = logging.getLogger(__name__)

Floats: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]
BatchArrays: TypeAlias = tuple[Floats, npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""Activations [T, D], lengths [B], labels [N]."""


@dataclass(frozen=True)
class Tell:
    """Send this to a device; go on at once."""

    device: str
    message: Message
    tensors: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


class Shared(dict[str, npt.NDArray[Any]]):
    """The tensors of a message that goes to many devices: it is encoded once, by whichever Peer sends it first."""

    pieces: tuple[Piece, ...] | None = None
    """The frame, once somebody has made it."""


@dataclass
class Tally:
    """The bytes that went over the wire of a run, both ways."""

    wire_bytes: int = 0


@dataclass(frozen=True)
class Ask:
    """A message that is wanted of a device."""

    device: str
    kind: type
    round: int
    direction: int | None = None
    sign: int | None = None

    def __str__(self) -> str:
        """In words, for a device that sent something else."""
        which = "" if self.direction is None else f" of direction {self.direction}, sign {self.sign:+}"
        return f"{name_of(self.kind)}{which}"


@dataclass(frozen=True)
class Await:
    """Wait for the first of these; each has a deadline of its own, which runs from when it was first asked for."""

    asks: tuple[Ask, ...]
    waits: bool = True
    """False: take only what is there already, and else answer None at once."""


@dataclass(frozen=True)
class Answer:
    """The answer to one of the asks: its frame, or None where the device is late or gone."""

    ask: Ask
    frame: Frame | None


@dataclass(frozen=True)
class Fault:
    """A device sent what no working device sends: count it against the device."""

    device: str
    reason: str


T = TypeVar("T")
Action: TypeAlias = Tell | Await | Fault
Exchange: TypeAlias = Generator[Action, Answer | None, T]
"""A conversation with devices that returns a T."""


class Trainer(Protocol):
    """What a round needs of the tail: tail/trainer.py in one process, ranks/leader.py in many."""

    @property
    def at_once(self) -> int:
        """Batches that are worth handing over together."""

    def forward_backward_many(
        self, batches: Sequence[BatchArrays], weights: Sequence[float], *, wants_cut_gradient: bool
    ) -> Sequence[Any]:
        """Train on each batch: its StepResult, or the BatchError or NotFiniteError that left it out."""

    def evaluate_many(self, batches: Sequence[BatchArrays]) -> Sequence[Any]:
        """Score each batch: its EvalScore, or the BatchError or NotFiniteError."""

    def step(self, round_: int, total_weight: float) -> Any: ...

    def discard(self) -> None: ...


class Kept(Protocol):
    """What a round needs of the activations that are kept: rounds/kept.py. Devices are given by their names."""

    def has_batch(self, device: str, round_: int) -> bool: ...

    def batch(self, device: str, round_: int) -> BatchArrays | None: ...

    def settle(self, device: str, round_: int, batch: BatchArrays, places: Sequence[int] | None) -> BatchArrays: ...

    def keep(self, device: str, round_: int, batch: BatchArrays, places: Sequence[int] | None) -> None: ...

    def evaluation_names(self) -> set[str]: ...

    def held_out(self, device: str) -> Iterator[BatchArrays | None]: ...

    def keep_held_out(self, device: str, first: int, batch: BatchArrays) -> None: ...


class StatefulTrainer(Trainer, Protocol):
    """What the course of a run and its checkpoints need of the tail, beyond what a round needs."""

    @property
    def head_rows(self) -> tuple[int, ...]: ...

    @property
    def parameters(self) -> Mapping[str, Any]: ...

    def state(self) -> Mapping[str, Any]: ...

    def gather(self) -> Generator[Any, None, None]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class CloudRound:
    """What a round's generator on the cloud needs to know; a device's is hosl_edge/rounds.py's."""

    run: str
    epoch: int
    round: int
    config: RunConfig
    trainer: Trainer
    devices: Sequence[str]
    """Who is to take part, in order."""
    attempt: int = 0
    """Grows with every start, so that what is under way of a former one is told from this one's."""
    layout: GradientLayout | None = None
    """Of the gradients that devices send, in first-order training."""
    kept: Kept | None = None
    """Activations that need not be sent again, in a frozen run."""

    def name(self, id_: int) -> dict[str, Any]:
        """Give the fields that name a message of this round (specification: A round's messages)."""
        return {"run": self.run, "epoch": self.epoch, "round": self.round, "attempt": self.attempt, "id": id_}

    def weight(self, batch: BatchArrays) -> float:
        """Weigh a device's batch: w_m before it is divided by the sum of all.

        Never more than the run's batch size, which the codec checks.
        """
        return float(batch[1].size) if self.config.devices.weighting == "examples" else 1.0

    @property
    def quorum(self) -> int:
        """Devices whose batches a step of the tail needs."""
        return len(self.devices) if self.config.strict else self.config.devices.quorum

    def start(self, devices: Collection[str] | None = None) -> Generator[Tell, None, None]:
        """Open the round for every participant, or for these."""
        # 0 tells the device that nobody leaves it behind, however long it takes.
        limit_s = 0.0 if self.config.strict else self.config.devices.round_deadline_s
        for device in self.devices if devices is None else devices:
            yield Tell(device, RoundStart(**self.name(0), deadline_s=limit_s))

    def combine(self, values: Mapping[str, Doubles], weights: Mapping[str, float]) -> Doubles:
        """Average numbers [P] over devices as the run's settings say; zeros where no device has any."""
        # The same average for every algorithm: projections of HO-SFL, estimates of HOSL.
        devices = self.config.devices
        if not values:
            return np.zeros(self.config.directions)
        return aggregate(values, weights, devices.aggregation, trim=devices.trim, clip=devices.clip)


def first(asks: list[Ask]) -> Exchange[tuple[Ask, Frame | None]]:
    """Wait for the first answer to any of `asks`, which is then taken off the list."""
    answer = yield Await(tuple(asks))
    assert answer is not None
    asks.remove(answer.ask)
    return answer.ask, answer.frame


def first_few(asks: list[Ask], most: int) -> Exchange[list[tuple[Ask, Frame | None]]]:
    """Wait for the first answer to any of `asks`, and take up to `most` that are there by then; off the list."""
    # As many as the trainer takes at once, but never waiting for more than the first: a slow device holds up nobody.
    taken = [(yield from first(asks))]
    while asks and len(taken) < most:
        answer = yield Await(tuple(asks), waits=False)
        if answer is None:
            break
        asks.remove(answer.ask)
        taken.append((answer.ask, answer.frame))
    return taken


def is_finite(batch: BatchArrays) -> bool:
    """Whether its activations are numbers."""
    return bool(np.isfinite(batch[0]).all())


def blame(device: str, batch: BatchArrays, error: NotFiniteError) -> Generator[Fault, None, str]:
    """Say why a batch cannot be used, for its device; its activations are its fault, a tail that diverged is not."""
    if is_finite(batch):
        return f"{error.what} is {error.value} though its activations are finite: the cloud's tail has diverged"
    yield Fault(device, "activations that are not finite")
    return "its activations are not finite"


def refuse(device: str, error: BatchError) -> Tell:
    """End the connection of a device whose batch contradicts itself."""
    log.warning("device %s is refused: %s", device, error, extra={"device": device})
    return Tell(device, break_off(str(error)))


def leave_out(device: str, message: Message, reason: str) -> Tell:
    """Tell a device that the numbers of its answer cannot be used: it would wait for the reply."""
    return Tell(device, late(message, "numbers", reason))


def late(answer: Message, code: str, reason: str) -> Late:
    """Refuse an answer, by its own numbers."""
    named = {name: getattr(answer, name) for name in ("run", "epoch", "round", "attempt", "id")}
    return Late(**named, answer=name_of(answer), code=code, reason=reason)  # type: ignore[arg-type]


def break_off(reason: str) -> Refusal:
    """End the connection of a device that broke the protocol: it would do so again."""
    return Refusal(code="message", reason=reason, retry=False)


def batch_of(frame: Frame) -> BatchArrays:
    """Take the arrays of a device's batch out of its frame, in which the codec has checked their types and lengths."""
    return frame.tensors["activations"], frame.tensors["lengths"], frame.tensors["labels"]
