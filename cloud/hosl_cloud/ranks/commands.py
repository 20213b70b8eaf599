"""What rank 0 tells the other ranks, and what they answer; ranks/group.py carries it.

A command is JSON, and the arrays that it announces follow it. Only processes of one start read these: they have no
version, and their fields may change.
"""

from __future__ import annotations

import msgspec

from hosl_cloud.settings import RunConfig


class CommandBase(msgspec.Struct, kw_only=True, frozen=True, tag=True, forbid_unknown_fields=True):
    """Root of all commands."""


class Load(CommandBase, frozen=True):
    """Load the tail of a bundle, which every machine has at this path. Answered by a Reply."""

    tail: int
    """The number by which later commands name it; rank 0 counts them."""
    bundle: str
    digest: str
    """SHA-256 of the manifest at rank 0."""
    config: RunConfig


class BatchShape(msgspec.Struct, kw_only=True, frozen=True):
    """The shape of a batch whose arrays follow."""

    tokens: int
    examples: int
    labels: int
    weight: float = 1.0


class Train(CommandBase, frozen=True):
    """Forward and backward through each of a rank's batches. Answered by a Reply, and then λ of each result."""

    tail: int
    shares: tuple[tuple[BatchShape, ...], ...]
    """By rank."""
    passes: int
    """Micro-batches that every rank runs in step with the others; who has fewer runs empty ones."""
    wants_cut_gradient: bool


class Evaluate(CommandBase, frozen=True):
    """Forward alone. Answered by a Reply."""

    tail: int
    shares: tuple[tuple[BatchShape, ...], ...]
    passes: int


class Step(CommandBase, frozen=True):
    """One optimizer step."""

    tail: int
    round: int
    total_weight: float


class Discard(CommandBase, frozen=True):
    """Drop the round's gradients."""

    tail: int


class Gather(CommandBase, frozen=True):
    """Put the tensors of the state together, one after the other."""

    tail: int


class Entry(msgspec.Struct, kw_only=True, frozen=True):
    """A float32 tensor that follows."""

    name: str
    shape: tuple[int, ...]


class Restore(CommandBase, frozen=True):
    """Take the state that follows, tensor by tensor."""

    tail: int
    entries: tuple[Entry, ...]


class Free(CommandBase, frozen=True):
    """Free a tail."""

    tail: int


class Heartbeat(CommandBase, frozen=True):
    """Say that you are there."""


class ShutDown(CommandBase, frozen=True):
    """The service ends."""


Command = Load | Train | Evaluate | Step | Discard | Gather | Restore | Free | Heartbeat | ShutDown


class BatchOutcome(msgspec.Struct, kw_only=True, frozen=True):
    """The loss and score of one batch, or the error that left it out."""

    error: str = ""
    """Empty, `not-finite` or `spoilt`."""
    what: str = ""
    """Of an error: which number is not finite."""
    value: str = "0.0"
    """The loss, or that number; as text, for JSON has no infinity."""
    correct: int = 0
    scored: int = 0
    predicted: tuple[int, ...] | None = None
    """Of an Evaluate: the class that each example was given; None where the task has no classes."""


class Reply(msgspec.Struct, kw_only=True, frozen=True):
    """A rank's answer to a Load, a Train or an Evaluate."""

    outcomes: tuple[BatchOutcome, ...] = ()
    error: str = ""
    """Why the rank cannot load the tail; its exit code beside it."""
    exit_code: int = 0


# Made here, on import: threads that use a type for the first time at once crash msgspec.
COMMAND_DECODER: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
REPLY_DECODER = msgspec.json.Decoder(Reply)
