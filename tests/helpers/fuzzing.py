"""Frames to damage, ways to damage them, and what a connection must do with them whatever comes.

Shared by tests/protocol/wire/test_fuzz.py (seconds) and tests/fuzz.py (`make fuzz`, as long as one likes).
"""

from __future__ import annotations

import itertools
import json
import math
import random
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec.structs import replace

from hosl_protocol.exceptions import ProtocolError
from hosl_protocol.run.settings import RunSettings, WireDtype, convert
from hosl_protocol.run.tasks import load_preset
from hosl_protocol.run.updates import UpdateShape
from hosl_protocol.wire.codec import MAX_HEADER_BYTES, PIECE_BYTES, Frame, encode
from hosl_protocol.wire.connection import Connection, Phase, Role
from hosl_protocol.wire.messages import (
    Anchor,
    CatchUp,
    Complete,
    CutGradient,
    EvalBatch,
    EvalResult,
    EvalStart,
    Goodbye,
    Gradient,
    Hello,
    Late,
    Message,
    Probe,
    ProbeLoss,
    Projections,
    Ready,
    Refusal,
    Report,
    RoundStart,
    Snapshot,
    Update,
    Welcome,
)

WIDTH, ROWS, DIRECTIONS = 3, 4, 2
UPDATE = UpdateShape(coefficients=DIRECTIONS, codes=5)
"""As in first-order training, so that codes cross the wire; the algorithm says nothing else about frames."""
DIGEST = "0123456789abcdef" * 4
PLACE: dict[str, Any] = {"run": "r1", "epoch": 0, "round": 7, "id": 0}
STANDING: dict[str, Any] = {"run": "r1", "epoch": 0, "applied_round": 6, "weights_digest": DIGEST}
SETTINGS: RunSettings = convert(
    {"task": load_preset("sst2"), "batch_size": ROWS, "max_length": 16, "directions": DIRECTIONS}, RunSettings, "run"
)
WIRE_DTYPES: tuple[WireDtype, ...] = ("float32", "float16", "int8", "int4")
"""Of the connections' runs: numbers, and two kinds of packed rows."""

_LOSS = np.float32(0.75)
_BATCH = {
    "activations": np.linspace(-1.0, 1.0, 5 * WIDTH, dtype=np.float32).reshape(5, WIDTH),
    "lengths": np.array([2, 3], np.int32),
    "labels": np.array([0, 1], np.int32),
}
_COEFFICIENTS = np.array([0.5, -2.0], np.float32)
_CODES = np.arange(5, dtype=np.uint8)

MESSAGES: dict[Role, list[tuple[Message, Mapping[str, Any]]]] = {
    Role.EDGE: [
        (Hello(software="x 1", device="pi-1", shard_digest=DIGEST, data_digest=DIGEST), {}),
        (Ready(**STANDING, train_examples=9, eval_examples=2), {}),
        (Probe(**PLACE, direction=1, sign=-1), _BATCH),
        (Anchor(**PLACE), _BATCH),
        (Projections(**PLACE), {"projections": _COEFFICIENTS}),
        (Gradient(**PLACE, rotation=7), {"scales": _COEFFICIENTS, "codes": _CODES}),
        (EvalBatch(**PLACE, last=True), _BATCH),
        (
            Report(
                **STANDING,
                step_seconds=0.5,
                peak_rss_bytes=1,
                anonymous_bytes=2,
                sent_bytes=3,
                received_bytes=2**53 - 1,
            ),
            {},
        ),
        (Goodbye(reason="bye"), {}),
    ],
    Role.CLOUD: [
        (Welcome(run="r1", epoch=0, round=6, width=WIDTH, update=UPDATE, settings=SETTINGS, plan="continue"), {}),
        (
            Welcome(
                run="r1",
                epoch=0,
                round=6,
                width=WIDTH,
                update=UPDATE,
                settings=SETTINGS,
                plan="snapshot",
                snapshot=Snapshot(round=5, size_bytes=2**40, sha256=DIGEST),
            ),
            {},
        ),
        (
            CatchUp(run="r1", epoch=0, first_round=5, last=True),
            {
                "coefficients": np.ones((2, DIRECTIONS), np.float32),
                "codes": np.ones((2, 5), np.uint8),
                "learning_rates": np.ones(2),
            },
        ),
        (RoundStart(**PLACE, deadline_s=60.0), {}),
        (ProbeLoss(**PLACE, direction=1, sign=1), {"loss": _LOSS}),
        (CutGradient(**PLACE), {"lambda": _BATCH["activations"], "loss": _LOSS}),
        (Update(**PLACE, learning_rate=1e-3), {"coefficients": _COEFFICIENTS, "codes": _CODES, "loss": _LOSS}),
        (EvalStart(**PLACE), {}),
        (EvalResult(**PLACE, correct=1, scored=2), {"loss": _LOSS}),
        (Late(**PLACE, answer="anchor"), {}),
        (Complete(run="r1", reason="completed", round=7), {}),
        (Refusal(code="shard", reason="another shard", retry=False), {}),
    ],
}
"""Every message of each side, with tensors."""

_ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 4, "BF16": 4, "I32": 4, "U8": 1}


def other(role: Role) -> Role:
    """The other side."""
    return Role.CLOUD if role is Role.EDGE else Role.EDGE


def pieces_of(message: Message, tensors: Mapping[str, Any], wire_dtype: WireDtype = "float32") -> list[bytes]:
    """A valid frame: the header piece, then data pieces."""
    return [bytes(piece) for piece in encode(message, tensors, wire_dtype)]


def connection_in(role: Role, phase: Phase, wire_dtype: WireDtype = "float32") -> Connection:
    """A connection that has come as far as `phase`, its run agreed once it has left Hello."""
    connection = Connection(role)
    if phase is not Phase.HELLO:
        connection.agree(replace(SETTINGS, wire_dtype=wire_dtype), WIDTH, UPDATE)
    connection.phase = phase
    return connection


def largest_payload(message: Message, settings: RunSettings, width: int) -> int:
    """Bytes of the largest payload that this message may have in a run, counted from the specification's table."""
    tokens = settings.batch_size * settings.max_length
    sizes = {
        "B": settings.batch_size,
        "T": tokens,
        "D": width,
        "N": tokens if settings.task.kind == "lm" else settings.batch_size,
        "P": UPDATE.coefficients,
        "C": UPDATE.codes,
        "R": 4096,
    }
    tensors = type(message).tensors.values()
    return sum(_ELEMENT_BYTES[spec.dtypes[0]] * math.prod(sizes[each] for each in spec.shape) for spec in tensors)


def held_bytes(connection: Connection) -> int:
    """What a connection has taken for a frame that is under way."""
    return int(connection._reader._buffer.nbytes)


def check_held(connection: Connection) -> None:
    """No more memory is taken than the run's bounds allow for the message at hand; none before it is agreed."""
    message = connection._reader._message
    if message is None:
        assert held_bytes(connection) == 0
        return
    settings, width = connection.settings, connection._reader.bounds.largest.get("D", 0)
    largest = 0 if settings is None else largest_payload(message, settings, width)
    assert held_bytes(connection) <= largest, f"{held_bytes(connection)} bytes are held, the run allows {largest}"


def feed(connection: Connection, piece: bytes) -> Frame | ProtocolError | None:
    """Give a connection one piece: the frame, nothing yet, or its refusal. Any other exception escapes."""
    try:
        frame = connection.receive(piece)
    except ProtocolError as error:
        return error
    check_held(connection)
    return frame


# Ways to damage


NUMBERS = (
    "0", "-0", "-1", "1", "7", "1.0", "0.5", "1e3", "-1e400", "1e400", "NaN", "Infinity", "true", "null", "[]", "{}",
    "65536", "4294967296", "281474976710656", "9007199254740992", "9223372036854775807", "9223372036854775808",
    "18446744073709551616", "1" + "0" * 30, "9" * 4301, "[" * 2000,
)  # fmt: skip
STRINGS = (
    '""', '"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"', '"\\""', '"a/b"', '"' + "x" * 2000 + '"', '"\xff"',
    '"F64"', '"BF16"', '"F16"', '"activations"', '"hosl"', '"__metadata__"', '"\\ud83d\\ude00"',
)  # fmt: skip


def with_length(text: bytes) -> bytes:
    """A header piece whose length is right."""
    return struct.pack("<Q", len(text)) + text


def damage(random_: random.Random, pieces: list[bytes], others: list[list[bytes]]) -> list[bytes]:
    """A frame's pieces after one to three faults; `others` are frames to mix in."""
    pieces = list(pieces)
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        pieces = random_.choice(_FAULTS)(random_, pieces, others) or [b""]
    return pieces


def damage_bytes(random_: random.Random, data: bytes) -> bytes:
    """Some bytes after one fault of a kind that knows nothing about them."""
    place = random_.randrange(len(data) + 1)
    end = min(len(data), place + random_.choice((1, 1, 2, 4, 8, 64)))
    kind = random_.randrange(6)
    if kind == 0 and place < len(data):
        return data[:place] + bytes([data[place] ^ 1 << random_.randrange(8)]) + data[place + 1 :]
    if kind == 1:
        return data[:place] + random_.randbytes(end - place) + data[end:]
    if kind == 2:
        return data[:place] + random_.randbytes(random_.choice((1, 2, 8, 300))) + data[place:]
    if kind == 3:
        return data[:place] + data[end:]
    if kind == 4:
        return data[:end] + data[place:]
    return data[:place]


Fault = Callable[[random.Random, list[bytes], list[list[bytes]]], list[bytes]]


def _in_the_header(random_: random.Random, pieces: list[bytes], _: list[list[bytes]]) -> list[bytes]:
    text = damage_bytes(random_, pieces[0][8:])
    return [with_length(text), *pieces[1:]]


def _in_the_raw_header(random_: random.Random, pieces: list[bytes], _: list[list[bytes]]) -> list[bytes]:
    return [damage_bytes(random_, pieces[0]), *pieces[1:]]


def _another_value(random_: random.Random, pieces: list[bytes], _: list[list[bytes]]) -> list[bytes]:
    """A number or a string of the header becomes another."""
    text = pieces[0][8:].decode("utf-8", "replace")
    spans = _values(text)
    if not spans:
        return pieces
    start, end = random_.choice(spans)
    value = random_.choice(NUMBERS + STRINGS)
    if text[max(start - 1, 0)] == "\\" or '\\"' in text[start:end]:
        value = json.dumps(value)[1:-1]  # within the message, which is text within text
    changed = text[:start] + value + text[end:]
    return [with_length(changed.encode("utf-8", "surrogatepass")), *pieces[1:]]


def _values(text: str) -> list[tuple[int, int]]:
    """Places of numbers and of quoted strings, those of the nested message too."""
    spans: list[tuple[int, int]] = []
    place = 0
    while place < len(text):
        end = place + 1
        if text[place].isdigit() or text[place] == "-":
            while end < len(text) and text[end] in "0123456789.eE+-":
                end += 1
            spans.append((place, end))
        elif text.startswith('\\"', place):
            end = text.find('\\"', place + 2) + 2
            if end > 1:
                spans.append((place, end))
            else:
                end = place + 1
        place = end
    return spans


def _in_the_tree(random_: random.Random, pieces: list[bytes], others: list[list[bytes]]) -> list[bytes]:
    """The header is parsed, an entry changes, and it is written again."""
    try:
        header = json.loads(pieces[0][8:])
        message = json.loads(header["__metadata__"]["hosl"])
        entry_name = random_.choice(sorted(header))
        entry = header[entry_name]
        kind = random_.randrange(8)
        if kind == 0:
            del header[entry_name]
        elif kind == 1:
            header[random_.choice(("activations", "labels", "loss", "x", "", "__metadata__"))] = entry
        elif kind == 2:
            message[random_.choice(sorted(message))] = json.loads(random_.choice(NUMBERS[:12]))
        elif kind == 3:
            message[random_.choice(("type", "more", "round", "settings"))] = random_.choice(
                ("anchor", "welcome", 3, {})
            )
        elif kind == 4:
            del message[random_.choice(sorted(message))]
        elif "shape" in entry:
            _change_tensor(random_, entry)
        header.get("__metadata__", {})["hosl"] = json.dumps(message)
        text = json.dumps(header).encode()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return pieces  # damaged before
    return [with_length(text), *pieces[1:]]


def _change_tensor(random_: random.Random, entry: dict[str, Any]) -> None:
    if not all(isinstance(each, int) for each in (*entry["shape"], *entry["data_offsets"])):
        return  # damaged before
    size = random_.choice((0, 1, 3, 4, 5, 64, 65, 2**31, 2**40, 2**62, 2**64, -1))
    if random_.random() < 0.3:
        entry["dtype"] = random_.choice(("F64", "F32", "F16", "BF16", "I32", "I8", "U8", ""))
    if entry["shape"] and random_.random() < 0.7:
        entry["shape"][random_.randrange(len(entry["shape"]))] = size
    first = entry["data_offsets"][0]
    width = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}.get(entry["dtype"], 1)
    fitting = [first, first + width * math.prod(entry["shape"])]
    entry["data_offsets"] = random_.choice((fitting, fitting, [first, first + size], [size, size]))


def _other_payload(random_: random.Random, pieces: list[bytes], _: list[list[bytes]]) -> list[bytes]:
    payload = random_.choice((damage_bytes, lambda r, data: r.randbytes(len(data))))(random_, b"".join(pieces[1:]))
    return [pieces[0], *([payload] if payload else [])]


def _cut_anew(random_: random.Random, pieces: list[bytes], _: list[list[bytes]]) -> list[bytes]:
    payload = b"".join(pieces[1:])
    places = sorted(random_.randrange(len(payload) + 1) for _ in range(random_.randrange(4)))
    return [pieces[0], *(payload[a:b] for a, b in zip([0, *places], [*places, len(payload)], strict=True))]


def _order(random_: random.Random, pieces: list[bytes], _: list[list[bytes]]) -> list[bytes]:
    kind, place = random_.randrange(4), random_.randrange(len(pieces))
    if kind == 0:
        return pieces[:place] + pieces[place + 1 :]
    if kind == 1:
        return pieces[: place + 1] + pieces[place:]
    if kind == 2:
        return [*pieces, *pieces]
    return random_.sample(pieces, len(pieces))


def _mixed(random_: random.Random, pieces: list[bytes], others: list[list[bytes]]) -> list[bytes]:
    foreign = random_.choice(others)
    kind = random_.randrange(4)
    if kind == 0:
        return [foreign[0], *pieces[1:]]
    if kind == 1:
        return [pieces[0], *foreign, *pieces[1:]]
    if kind == 2:
        return [*pieces[:-1], *foreign]
    cut, join = random_.randrange(len(pieces[0]) + 1), random_.randrange(len(foreign[0]) + 1)
    return [with_length((pieces[0][:cut] + foreign[0][join:])[8:]), *pieces[1:]]


def _sizes(random_: random.Random, pieces: list[bytes], _: list[list[bytes]]) -> list[bytes]:
    size = random_.choice(
        (0, 1, 7, 8, 9, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 8, MAX_HEADER_BYTES + 9, PIECE_BYTES + 1)
    )
    place = random_.randrange(len(pieces))
    filler = random_.choice((b" ", b"\0", b"[", b"{", b'"')) * size
    return [*pieces[:place], random_.choice((filler, with_length(filler))), *pieces[place + 1 :]]


_FAULTS: tuple[Fault, ...] = (
    _in_the_header, _in_the_header, _in_the_raw_header, _another_value, _another_value, _another_value, _in_the_tree,
    _in_the_tree, _in_the_tree, _other_payload, _cut_anew, _order, _mixed,
)  # fmt: skip
_RARE_FAULTS: tuple[Fault, ...] = (_sizes,)


@dataclass
class Tally:
    """What came of the frames."""

    accepted: int = 0
    open: int = 0
    """Frames whose end never came."""
    refused: Counter[str] = field(default_factory=Counter)

    def outcomes(self) -> Counter[str]:
        """How often each came."""
        return self.refused + Counter({"accepted": self.accepted, "left open": self.open})

    @property
    def frames(self) -> int:
        """In all."""
        return self.accepted + self.open + sum(self.refused.values())


def _is_taken(connection: Connection, pieces: list[bytes]) -> bool:
    return not any(isinstance(feed(connection, piece), ProtocolError) for piece in pieces)


CASES = [(role, phase) for role in Role for phase in Phase]
_DUE: dict[WireDtype, list[tuple[Role, Phase, list[list[bytes]]]]] = {each: [] for each in WIRE_DTYPES}
_FRAMES = {each: {role: [pieces_of(*frame, each) for frame in MESSAGES[role]] for role in Role} for each in WIRE_DTYPES}
VALID = _FRAMES["float32"]


for _wire_dtype, (_role, _phase) in itertools.product(WIRE_DTYPES, CASES):
    _frames = [
        pieces
        for pieces in _FRAMES[_wire_dtype][other(_role)]
        if _is_taken(connection_in(_role, _phase, _wire_dtype), pieces)
    ]
    _DUE[_wire_dtype] += [(_role, _phase, _frames)] * bool(_frames)


def fuzz_frame(random_: random.Random, tally: Tally) -> None:
    """Damage one frame and give it to a connection in a role and phase of its own. AssertionError is a finding."""
    wire_dtype = random_.choice(WIRE_DTYPES)
    role, phase = random_.choice(CASES)
    frames = _FRAMES[wire_dtype][other(role)]
    if random_.random() < 0.8:  # what is not due is refused before it is looked at
        role, phase, frames = random_.choice(_DUE[wire_dtype])
    faults = damage if random_.random() > 0.01 else lambda r, pieces, _: _sizes(r, pieces, _)
    give(connection_in(role, phase, wire_dtype), faults(random_, random_.choice(frames), frames), tally)


def give(connection: Connection, pieces: list[bytes], tally: Tally) -> None:
    """Feed pieces until one is refused; then nothing more may be accepted."""
    for piece in pieces:
        got = feed(connection, piece)
        if isinstance(got, ProtocolError):
            tally.refused[type(got).__name__] += 1
            for frame in VALID[other(connection.role)][:2]:
                assert isinstance(feed(connection, frame[0]), ProtocolError), "a piece was accepted after a refusal"
            return
    if connection.is_between_frames:
        tally.accepted += 1
    else:
        tally.open += 1
