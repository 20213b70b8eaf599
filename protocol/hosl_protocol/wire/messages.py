"""Every message of the protocol as a typed struct, and the tensors that travel with it.

Specification: protocol/README.md, section "Messages". `run`, `epoch`, `round`, `attempt` and `id` name a message of a
type once and for all: a repeat carries the same five and is dropped.

A new message is a struct here, in FromEdge or FromCloud below; CONTRIBUTING.md lists all the other places.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, TypeAlias

import msgspec

from hosl_protocol.arithmetic.directions import MAX_DIRECTION, MAX_ROUND
from hosl_protocol.program.plain import plain
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.updates import UpdateShape

PROTOCOL_VERSION = 1

FLOATS = ("F32", "F16", "BF16", "I8", "U8")
"""Safetensors names of the wire dtypes; I8 and U8 are the bytes of rows of 8 or 4 bits a number (packing.py)."""

CATCH_UP_ROUNDS = 4096
"""Most rounds in one CatchUp."""

MAX_PLACES = 4096
"""Most places in one message: with more its header would outgrow its limit."""

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
"""A whole number that every JSON reader keeps exactly."""
Places: TypeAlias = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1, max_length=MAX_PLACES)]
"""Where a batch's examples stand in the device's data, in the order of the batch."""
RoundNumber: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_ROUND)]
DirectionNumber: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_DIRECTION - 1)]
Name: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9._-]{1,64}\Z")]
Digest: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""SHA-256 in lower-case hexadecimal digits."""
DigestOrNone: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{64})?\Z")]
MAX_SENTENCE = 1024
Sentence: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_SENTENCE)]
"""Text for people, see `_Message.sentences`."""
Exponent: TypeAlias = Annotated[int, msgspec.Meta(ge=-200, le=200)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0)]
Rate: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0)]
Celsius: TypeAlias = Annotated[float, msgspec.Meta(ge=-273.15, le=1000.0)]
Plan: TypeAlias = Literal["continue", "rebuild", "snapshot", "rewind"]


class TensorSpec(msgspec.Struct, frozen=True):
    """A tensor that a message carries: allowed types, and its shape in named dimensions.

    B examples, T tokens of the batch without padding, D width of the cut layer, N labels, P coefficients of an update,
    C bytes of its codes, R rounds.
    """

    dtypes: tuple[str, ...]
    shape: tuple[str, ...]
    required: bool = True
    """Whether it is there in every run; one that is not is there just where its last dimension is above 0."""
    dithered: bool = False
    """Whether what is packed is rounded at random, so that its mean is right."""


_ACTIVATIONS = TensorSpec(FLOATS, ("T", "D"))
_CUT_GRADIENT = TensorSpec(FLOATS, ("T", "D"), dithered=True)
_LENGTHS = TensorSpec(("I32",), ("B",))
_LABELS = TensorSpec(("I32",), ("N",))
_LOSS = TensorSpec(("F32",), ())
_COEFFICIENTS = TensorSpec(("F32",), ("P",))
_CODES = TensorSpec(("U8",), ("C",), required=False)


class _Message(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    tensors: ClassVar[dict[str, TensorSpec]] = {}
    sentences: ClassVar[tuple[str, ...]] = ()
    """Fields of text that somebody else has written and people will read: on both sides they are one plain line."""

    def __post_init__(self) -> None:
        for name in self.sentences:
            msgspec.structs.force_setattr(self, name, plain(getattr(self, name))[:MAX_SENTENCE])


class _RoundMessage(_Message, kw_only=True, frozen=True):
    run: Name
    """The run's id."""
    epoch: Count
    """Grows by one whenever the cloud drops rounds."""
    round: RoundNumber
    """From 1; 0 only where an evaluation comes before the first round."""
    attempt: Count = 0
    """Which start of the round this belongs to, as the cloud counts them; one that came to nothing starts again."""
    id: Count = 0
    """Place of the message among those that the device sends in this attempt, from 0; a reply has that of the answered
    message."""


class Hello(_Message, kw_only=True, frozen=True, tag="hello"):
    """edge -> cloud, first: who I am and where I stand."""

    sentences: ClassVar[tuple[str, ...]] = ("software", "device")
    protocol: Count = PROTOCOL_VERSION
    software: Sentence
    """Name and version of the client, for example `hosl-edge 0.1.0`."""
    device: Sentence
    """The device's name, 1 to 64 characters of `A-Za-z0-9._-`; another is answered with Refusal `device`."""
    shard_digest: Digest
    """Manifest.shard_digest of the shard at hand."""
    data_digest: Digest
    """SHA-256 of the training data's files."""
    run: Name | None = None
    """The run that the journal belongs to; null without a journal."""
    epoch: Count = 0
    applied_round: RoundNumber = 0
    """The last round in the device's weights; 0 is the base shard."""
    weights_digest: DigestOrNone = ""
    """Digest of the trainable weights at `applied_round`; empty without a journal."""
    replay_s: Seconds = 0.0
    """Seconds in which the device replays one coefficient; 0 where it does not know."""
    link_bytes_per_s: Rate = 0.0
    """Speed of its last download; 0 where it does not know."""
    base_round: RoundNumber = 0
    """The earliest round that it can go back to by itself."""
    eval_digest: DigestOrNone = ""
    """SHA-256 of the held-out data's files; empty without."""


class Snapshot(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A file with the trainable weights after `round`, to be fetched from `/v1/snapshot/{run}/{round}`."""

    round: RoundNumber
    size_bytes: Count
    sha256: Digest


class Welcome(_Message, kw_only=True, frozen=True, tag="welcome"):
    """cloud -> edge: the run, and how to reach its state."""

    protocol: Count = PROTOCOL_VERSION
    run: Name
    epoch: Count
    round: RoundNumber
    """The cloud's last finished round."""
    width: Count
    """D."""
    update: UpdateShape
    """Sizes of the run's updates, as the device's manifest gives them, too."""
    settings: RunSettings
    plan: Plan
    """`continue`: add what CatchUp brings; `rebuild`: drop the journal and start at the base shard; `snapshot`: drop
    it and start at the snapshot; `rewind`: take back the rounds after `rewind_to`. Whatever the plan,
    the device is in the Welcome's epoch from here on."""
    snapshot: Snapshot | None = None
    """Where the plan is `snapshot`."""
    rewind_to: RoundNumber = 0
    """Where the plan is `rewind`: the last round to keep, as the cloud lost those after it."""


class CatchUp(_Message, kw_only=True, frozen=True, tag="catch-up"):
    """cloud -> edge: missed updates in order; answered by Ready once `last` is true."""

    tensors: ClassVar[dict[str, TensorSpec]] = {
        "coefficients": TensorSpec(("F32",), ("R", "P")),
        "codes": TensorSpec(("U8",), ("R", "C"), required=False),
        "learning_rates": TensorSpec(("F64",), ("R",)),
    }
    run: Name
    epoch: Count
    first_round: RoundNumber
    """Round of the first row; the rest follow without a gap."""
    last: bool


class Ready(_Message, kw_only=True, frozen=True, tag="ready"):
    """edge -> cloud: data is loaded and the weights stand at `applied_round`."""

    run: Name
    epoch: Count
    applied_round: RoundNumber
    weights_digest: Digest
    train_examples: Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1)]
    eval_examples: Count


class RoundStart(_RoundMessage, kw_only=True, frozen=True, tag="round-start"):
    """cloud -> edge: take part in this round."""

    deadline_s: Seconds
    """Seconds in which each stage of the round should be answered; 0 where the cloud waits for ever."""


class Probe(_RoundMessage, kw_only=True, frozen=True, tag="probe"):
    """edge -> cloud, HOSL: activations of θ + sign·ε·z; the cloud only evaluates. Answered by ProbeLoss."""

    tensors: ClassVar[dict[str, TensorSpec]] = {"activations": _ACTIVATIONS, "lengths": _LENGTHS, "labels": _LABELS}
    direction: DirectionNumber
    sign: Literal[-1, 1]


class ProbeLoss(_RoundMessage, kw_only=True, frozen=True, tag="probe-loss"):
    """cloud -> edge, HOSL: the loss at one probe."""

    tensors: ClassVar[dict[str, TensorSpec]] = {"loss": _LOSS}
    direction: DirectionNumber
    sign: Literal[-1, 1]


class Anchor(_RoundMessage, kw_only=True, frozen=True, tag="anchor"):
    """edge -> cloud: activations of the clean θ, on which the tail trains."""

    tensors: ClassVar[dict[str, TensorSpec]] = {"activations": _ACTIVATIONS, "lengths": _LENGTHS, "labels": _LABELS}
    places: Places | msgspec.UnsetType = msgspec.UNSET
    """In the training data; with them the cloud may keep the activations of a frozen run."""


class CutGradient(_RoundMessage, kw_only=True, frozen=True, tag="cut-gradient"):
    """cloud -> edge, HO-SFL: λ, the gradient of this device's own mean loss with respect to its activations."""

    tensors: ClassVar[dict[str, TensorSpec]] = {"lambda": _CUT_GRADIENT, "loss": _LOSS}
    exponent: Exponent = 0
    """λ is the tensor times 2^exponent: float16 alone would lose a mean loss's small gradients."""


class Projections(_RoundMessage, kw_only=True, frozen=True, tag="projections"):
    """edge -> cloud, HO-SFL: v_p = ⟨λ, f(θ + μu_p) − f(θ)⟩ for every direction."""

    tensors: ClassVar[dict[str, TensorSpec]] = {"projections": _COEFFICIENTS}


class Gradient(_RoundMessage, kw_only=True, frozen=True, tag="gradient"):
    """edge -> cloud, first-order: the gradient of ⟨λ, f(θ)⟩ for everything that trains, compressed."""

    tensors: ClassVar[dict[str, TensorSpec]] = {"scales": _COEFFICIENTS, "codes": _CODES}
    rotation: Annotated[int, msgspec.Meta(ge=1, le=MAX_DIRECTION - 1)]
    """Number of the random signs; each device has its own (`rotation_of`)."""


class Update(_RoundMessage, kw_only=True, frozen=True, tag="update"):
    """cloud -> every device: the round's step, durable in the cloud's store before it is sent.

    SGD adds coefficient·z. AdamW takes Σ coefficient·z as its gradient, with `learning_rate`. First-order: coefficients
    are the scales, and with `codes` the devices' average gradient.
    """

    tensors: ClassVar[dict[str, TensorSpec]] = {
        "coefficients": _COEFFICIENTS,
        "codes": _CODES,
        "loss": _LOSS,
    }
    learning_rate: Rate


class EvalStart(_RoundMessage, kw_only=True, frozen=True, tag="eval-start"):
    """cloud -> edge: send the held-out data, batch by batch."""


class EvalBatch(_RoundMessage, kw_only=True, frozen=True, tag="eval-batch"):
    """edge -> cloud: activations of held-out examples. Answered by EvalResult."""

    tensors: ClassVar[dict[str, TensorSpec]] = {"activations": _ACTIVATIONS, "lengths": _LENGTHS, "labels": _LABELS}
    last: bool


class EvalResult(_RoundMessage, kw_only=True, frozen=True, tag="eval-result"):
    """cloud -> edge: what the batch scored."""

    tensors: ClassVar[dict[str, TensorSpec]] = {"loss": _LOSS}
    correct: Count
    """Right predictions: examples, or tokens for `lm`."""
    scored: Count
    """Out of how many."""


class Late(_RoundMessage, kw_only=True, frozen=True, tag="late"):
    """cloud -> edge: your answer is not taken; you are left out of what remains of its stage. It brings the answer's
    own numbers."""

    sentences: ClassVar[tuple[str, ...]] = ("reason",)
    answer: Name
    """Type of the answer that is refused, for example `anchor`; its `id` is this message's."""
    code: Literal["stage", "run", "epoch", "round", "attempt", "unasked", "numbers"] = "stage"
    """What is wrong with it: its stage is over, it is of another run, epoch, round or attempt, another answer was asked
    for, or its numbers cannot be used."""
    reason: Sentence = ""
    """That in words, with what would have been right."""


class Report(_Message, kw_only=True, frozen=True, tag="report"):
    """edge -> cloud: how the device fares; also lets the cloud check its weights."""

    run: Name
    epoch: Count
    applied_round: RoundNumber
    weights_digest: Digest
    step_seconds: Seconds
    """Duration of the last round on the device."""
    peak_rss_bytes: Count
    anonymous_bytes: Count
    """Resident memory that no file backs, now."""
    sent_bytes: Count
    received_bytes: Count
    temperature_c: Celsius | None = None
    """Of the hottest part; null where the device has no sensor."""


class Complete(_Message, kw_only=True, frozen=True, tag="complete"):
    """cloud -> edge: the run has ended."""

    run: Name
    reason: Literal["completed", "stopped-early", "stopped", "failed"]
    round: RoundNumber


class Refusal(_Message, kw_only=True, frozen=True, tag="refusal"):
    """cloud -> edge: the connection ends, and why."""

    sentences: ClassVar[tuple[str, ...]] = ("reason",)
    code: Literal["protocol", "shard", "device", "data", "eval-data", "weights", "run", "message", "late"]
    reason: Sentence
    retry: bool
    """Whether the same device may be let in when it connects again."""


class Goodbye(_Message, kw_only=True, frozen=True, tag="goodbye"):
    """edge -> cloud: the device leaves on purpose."""

    sentences: ClassVar[tuple[str, ...]] = ("reason",)
    reason: Sentence


FromEdge: TypeAlias = Hello | Ready | Probe | Anchor | Projections | Gradient | EvalBatch | Report | Goodbye
FromCloud: TypeAlias = (
    Welcome
    | CatchUp
    | RoundStart
    | ProbeLoss
    | CutGradient
    | Update
    | EvalStart
    | EvalResult
    | Complete
    | Refusal
    | Late
)
Message: TypeAlias = FromEdge | FromCloud


def is_device_name(name: str) -> bool:
    """Whether a device may be called so: it names files, too, and none of them hidden."""
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name) is not None


def name_of(message: Message | type) -> str:
    """The message's tag."""
    kind = message if isinstance(message, type) else type(message)
    return str(kind.__struct_config__.tag)  # type: ignore[attr-defined]
