"""Frames: golden bytes, round trips, and one refusal for each way in which a frame can be wrong."""

from __future__ import annotations

import json
import math
import re
import struct
import tracemalloc

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from hosl_protocol.exceptions import FrameError, LimitError
from hosl_protocol.run.settings import RunSettings, convert
from hosl_protocol.run.tasks import load_preset
from hosl_protocol.run.updates import UpdateShape
from hosl_protocol.wire.codec import (
    MAX_HEADER_BYTES,
    PIECE_BYTES,
    Bounds,
    FrameReader,
    encode,
    from_bfloat16_bits,
    to_bfloat16_bits,
)
from hosl_protocol.wire.messages import (
    Anchor,
    CatchUp,
    Complete,
    CutGradient,
    EvalBatch,
    EvalResult,
    EvalStart,
    FromCloud,
    FromEdge,
    Goodbye,
    Gradient,
    Hello,
    Late,
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
from hosl_protocol.wire.packing import Dither, pack, unpack

PLACE = {"run": "r1", "epoch": 0, "round": 7, "id": 0}
DIGEST = "0123456789abcdef" * 4
BOUNDS = {"B": 4, "T": 64, "D": 3, "N": 64, "P": 2, "R": 8}
DITHER = Dither(42, 56009)
"""Of `pi-1`."""

# Message, tensors, wire dtype, JSON header, payload. The same headers and payloads stand in protocol/README.md.
GOLDEN_FRAMES = {
    "goodbye": (
        Goodbye(reason="bye"),
        {},
        "float32",
        r'{"__metadata__":{"hosl":"{\"type\":\"goodbye\",\"reason\":\"bye\"}"}}',
        "",
    ),
    "projections": (
        Projections(run="r1", epoch=0, round=7, id=1),
        {"projections": np.array([0.5, -2.0], np.float32)},
        "float32",
        r'{"__metadata__":{"hosl":"{\"type\":\"projections\",\"run\":\"r1\",\"epoch\":0,\"round\":7,\"attempt\":0,\"id\":1}"},'
        r'"projections":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "0000003f 000000c0",
    ),
    "gradient": (
        Gradient(run="r1", epoch=0, round=7, id=1, rotation=56009),
        {"scales": np.array([0.5, -2.0], np.float32), "codes": np.array([0, 7, 255], np.uint8)},
        "float32",
        r'{"__metadata__":{"hosl":"{\"type\":\"gradient\",\"run\":\"r1\",\"epoch\":0,\"round\":7,\"attempt\":0,\"id\":1,\"rotation\":56009}"},'
        r'"scales":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        r'"codes":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}',
        "0000003f 000000c0 0007ff",
    ),
    "anchor": (
        Anchor(run="r1", epoch=0, round=7),
        {
            "activations": np.array([[1.0, -0.1, 70000.0], [2.0**-24, 0.0, 3.14159]], np.float32),
            "lengths": np.array([2], np.int32),
            "labels": np.array([1], np.int32),
        },
        "float16",
        r'{"__metadata__":{"hosl":"{\"type\":\"anchor\",\"run\":\"r1\",\"epoch\":0,\"round\":7,\"attempt\":0,\"id\":0}"},'
        r'"activations":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},'
        r'"lengths":{"dtype":"I32","shape":[1],"data_offsets":[12,16]},'
        r'"labels":{"dtype":"I32","shape":[1],"data_offsets":[16,20]}}',
        "003c 66ae ff7b 0100 0000 4842 02000000 01000000",
    ),
    "cut-gradient": (
        CutGradient(run="r1", epoch=0, round=7),
        {"lambda": np.array([[1.0, -0.1, 70000.0]], np.float32), "loss": np.float32(0.75)},
        "bfloat16",
        r'{"__metadata__":{"hosl":"{\"type\":\"cut-gradient\",\"run\":\"r1\",\"epoch\":0,\"round\":7,\"attempt\":0,\"id\":0,\"exponent\":0}"},'
        r'"lambda":{"dtype":"BF16","shape":[1,3],"data_offsets":[0,6]},'
        r'"loss":{"dtype":"F32","shape":[],"data_offsets":[6,10]}}',
        "803f cdbd 8947 0000403f",
    ),
    "anchor in int8": (
        Anchor(run="r1", epoch=0, round=7),
        {
            "activations": np.array([[1.0, -0.1, 70000.0], [2.0**-24, 0.0, 3.14159]], np.float32),
            "lengths": np.array([2], np.int32),
            "labels": np.array([1], np.int32),
        },
        "int8",
        r'{"__metadata__":{"hosl":"{\"type\":\"anchor\",\"run\":\"r1\",\"epoch\":0,\"round\":7,\"attempt\":0,\"id\":0}"},'
        r'"activations":{"dtype":"I8","shape":[2,5],"data_offsets":[0,10]},'
        r'"lengths":{"dtype":"I32","shape":[1],"data_offsets":[10,14]},'
        r'"labels":{"dtype":"I32","shape":[1],"data_offsets":[14,18]}}',
        "0a44 00007f cb3c 00007f 02000000 01000000",
    ),
    "cut-gradient in int4": (
        CutGradient(run="r1", epoch=0, round=7),
        {"lambda": np.array([[1.0, -0.1, 0.55], [0.0, 0.0, 0.0]], np.float32), "loss": np.float32(0.75)},
        "int4",
        r'{"__metadata__":{"hosl":"{\"type\":\"cut-gradient\",\"run\":\"r1\",\"epoch\":0,\"round\":7,\"attempt\":0,\"id\":0,\"exponent\":0}"},'
        r'"lambda":{"dtype":"U8","shape":[2,4],"data_offsets":[0,8]},'
        r'"loss":{"dtype":"F32","shape":[],"data_offsets":[8,12]}}',
        "133e 0704 0000 0000 0000403f",
    ),
    "catch-up": (
        CatchUp(run="r1", epoch=0, first_round=8, last=True),
        {
            "coefficients": np.array([[0.5, -2.0], [0.0, 2.0**-13]], np.float32),
            "learning_rates": np.array([0.001, 0.0009]),
        },
        "float32",
        r'{"__metadata__":{"hosl":"{\"type\":\"catch-up\",\"run\":\"r1\",\"epoch\":0,\"first_round\":8,\"last\":true}"},'
        r'"coefficients":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        r'"learning_rates":{"dtype":"F64","shape":[2],"data_offsets":[16,32]}}',
        "0000003f 000000c0 00000000 00000039 fca9f1d24d62503f 92cb7f48bf7d4d3f",
    ),
    "update": (
        Update(run="r1", epoch=0, round=8, learning_rate=0.001),
        {"coefficients": np.empty(0, np.float32), "loss": np.float32(0.75)},
        "float32",
        r'{"__metadata__":{"hosl":"{\"type\":\"update\",\"run\":\"r1\",\"epoch\":0,\"round\":8,\"attempt\":0,\"id\":0,\"learning_rate\":0.001}"},'
        r'"coefficients":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
        r'"loss":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        "0000403f",
    ),
}


def golden_bytes(name):
    text = GOLDEN_FRAMES[name][3].encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, bytes.fromhex(GOLDEN_FRAMES[name][4])


def make_run_settings():
    return convert({"task": load_preset("sst2")}, RunSettings, "run")


def make_reader(union=FromEdge | FromCloud, **bounds):
    return FrameReader(union, Bounds({**BOUNDS, **bounds}))


def read_all(reader, pieces):
    frames = [reader.feed(piece) for piece in pieces]
    assert all(frame is None for frame in frames[:-1])
    return frames[-1]


# Golden bytes


@pytest.mark.parametrize("name", GOLDEN_FRAMES)
def test_frames_have_their_golden_bytes(name):
    message, tensors, wire_dtype, _, _ = GOLDEN_FRAMES[name]
    header, payload = golden_bytes(name)
    first, *rest = encode(message, tensors, wire_dtype, DITHER)
    assert (bytes(first), b"".join(rest)) == (header, payload)
    assert len(first) % 8 == 0


@pytest.mark.parametrize("name", GOLDEN_FRAMES)
def test_golden_bytes_are_read_back_as_their_message(name):
    message, tensors, _, _, _ = GOLDEN_FRAMES[name]
    header, payload = golden_bytes(name)
    bounds = {"update": {"P": 0}, "gradient": {"C": 3}}.get(name, {})
    frame = read_all(make_reader(**bounds), [header, *([payload] if payload else [])])
    assert frame.message == message
    assert {key: array.shape for key, array in frame.tensors.items()} == {
        key: array.shape for key, array in tensors.items()
    }


@pytest.mark.parametrize("name", ["goodbye", "projections", "anchor"])
def test_a_captured_frame_opens_in_the_reader_of_safetensors(name):
    _, tensors, _, _, _ = GOLDEN_FRAMES[name]
    opened = safetensors.numpy.load(b"".join(golden_bytes(name)))
    assert {key: array.shape for key, array in opened.items()} == {key: array.shape for key, array in tensors.items()}
    if name == "projections":
        assert opened["projections"].tolist() == [0.5, -2.0]


def test_old_headers_without_defaulted_fields_and_in_another_order_are_read():
    text = rb'{"lengths":{"dtype":"I32","shape":[1],"data_offsets":[16,20]},'
    text += rb'"labels":{"data_offsets":[12,16],"shape":[1],"dtype":"I32"},"__metadata__":{"other":"x",'
    text += rb'"hosl":"{\"round\":7,\"epoch\":0,\"run\":\"r1\",\"type\":\"anchor\"}"},'
    text += rb'"activations":{"dtype":"F32","shape":[1,3],"data_offsets":[0,12]}}'
    frame = read_all(make_reader(), [struct.pack("<Q", len(text)) + text, struct.pack("<fffii", 1, 2, 3, 4, 1)])
    assert frame.message == Anchor(run="r1", epoch=0, round=7)
    assert (frame.tensors["labels"].tolist(), frame.tensors["lengths"].tolist()) == ([4], [1])


# Round trips

names = st.text("abcXYZ019._-", min_size=1, max_size=64)
counts = st.integers(0, 2**53 - 1)
rounds = st.integers(0, 2**48 - 1)
directions = st.integers(0, 2**16 - 2)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
sentences = st.text(max_size=40)
numbers = st.floats(0.0, 1e300)
booleans = st.booleans()
signs = st.sampled_from([-1, 1])
places = st.just(msgspec.UNSET) | st.lists(counts, min_size=1, max_size=3).map(tuple)
round_fields = {"run": names, "epoch": counts, "round": rounds, "attempt": counts, "id": counts}
standing = {"run": names, "epoch": counts, "applied_round": rounds, "weights_digest": digests}
FIELDS = {
    Hello: {
        "software": sentences, "device": sentences, "shard_digest": digests, "data_digest": digests,
        "run": st.none() | names, "epoch": counts, "applied_round": rounds,
        "weights_digest": st.just("") | digests, "protocol": counts, "replay_s": numbers, "link_bytes_per_s": numbers,
        "base_round": rounds, "eval_digest": st.just("") | digests,
    },
    Welcome: {
        "run": names, "epoch": counts, "round": rounds, "width": counts, "protocol": counts,
        "settings": st.builds(make_run_settings), "update": st.builds(UpdateShape, coefficients=counts, codes=counts),
        "plan": st.sampled_from(["continue", "rebuild", "snapshot", "rewind"]), "rewind_to": rounds,
        "snapshot": st.none() | st.builds(Snapshot, round=rounds, size_bytes=counts, sha256=digests),
    },
    CatchUp: {"run": names, "epoch": counts, "first_round": rounds, "last": booleans},
    Ready: {**standing, "train_examples": st.integers(1, 2**53 - 1), "eval_examples": counts},
    RoundStart: {**round_fields, "deadline_s": numbers},
    Probe: {**round_fields, "direction": directions, "sign": signs},
    ProbeLoss: {**round_fields, "direction": directions, "sign": signs},
    Anchor: {**round_fields, "places": places},
    CutGradient: {**round_fields, "exponent": st.integers(-200, 200)},
    Projections: round_fields,
    Gradient: round_fields | {"rotation": st.integers(1, 65534)},
    Update: {**round_fields, "learning_rate": numbers},
    EvalStart: round_fields,
    EvalBatch: {**round_fields, "last": booleans},
    EvalResult: {**round_fields, "correct": counts, "scored": counts},
    Late: {
        **round_fields,
        "answer": names,
        "code": st.sampled_from(["stage", "run", "epoch", "round", "attempt", "unasked", "numbers"]),
        "reason": sentences,
    },
    Report: {
        **standing, "step_seconds": numbers, "peak_rss_bytes": counts, "anonymous_bytes": counts,
        "sent_bytes": counts, "received_bytes": counts, "temperature_c": st.none() | st.floats(-273.0, 1000.0),
    },
    Complete: {
        "run": names, "round": rounds, "reason": st.sampled_from(["completed", "stopped-early", "stopped", "failed"]),
    },
    Refusal: {
        "code": st.sampled_from(
            ["protocol", "shard", "device", "data", "eval-data", "weights", "run", "message", "late"]
        ),
        "reason": sentences, "retry": booleans,
    },
    Goodbye: {"reason": sentences},
}  # fmt: skip
TYPES = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "U8": np.uint8}
ELEMENTS = {"I32": st.integers(-(2**31), 2**31 - 1), "U8": st.integers(0, 255)}
CODES = 3
WIRE_DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")


def test_every_message_has_a_round_trip_here():
    assert set(FIELDS) == set(FromEdge.__args__) | set(FromCloud.__args__)
    assert all(set(fields) == set(kind.__struct_fields__) for kind, fields in FIELDS.items())


@st.composite
def frames(draw, kind):
    sizes = {"D": BOUNDS["D"], "P": BOUNDS["P"], "C": CODES}
    tensors = {}
    for name, spec in kind.tensors.items():
        for dimension in spec.shape:
            sizes.setdefault(dimension, draw(st.integers(0, BOUNDS.get(dimension, 0))))
        shape = tuple(sizes[dimension] for dimension in spec.shape)
        elements = ELEMENTS.get(spec.dtypes[0], st.floats(width=32))
        tensors[name] = draw(npst.arrays(TYPES[spec.dtypes[0]], shape, elements=elements, fill=st.just(1)))
    return draw(st.builds(kind, **FIELDS[kind])), tensors


def as_read(array, spec, wire_dtype, dither=None):
    if len(spec.dtypes) == 1 or wire_dtype == "float32":
        return array
    if wire_dtype == "bfloat16":
        return from_bfloat16_bits(to_bfloat16_bits(array))
    if wire_dtype in ("int8", "int4"):
        bits, back = int(wire_dtype.removeprefix("int")), np.empty_like(array)
        unpack(pack(array, bits, dither if spec.dithered else None), bits, back)
        return back
    return np.clip(array, -65504, 65504).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
@settings(max_examples=20)
@given(data=st.data(), wire_dtype=st.sampled_from(WIRE_DTYPES))
def test_what_is_encoded_is_read_back(kind, data, wire_dtype):
    message, tensors = data.draw(frames(kind))
    reader = make_reader(C=CODES)
    frame = read_all(reader, encode(message, tensors, wire_dtype, DITHER))
    dither = Dither(DITHER.seed, DITHER.number, getattr(message, "round", 0))
    assert frame.message == message
    assert list(frame.tensors) == list(tensors)
    for name, spec in kind.tensors.items():
        expected = as_read(tensors[name], spec, wire_dtype, dither)
        assert frame.tensors[name].dtype == TYPES[spec.dtypes[0]]
        assert frame.tensors[name].shape == tensors[name].shape
        np.testing.assert_array_equal(frame.tensors[name], expected)
    assert reader.is_between_frames


@pytest.mark.parametrize(
    ("codes", "sent", "sentence"),
    [
        (3, 0, "update lacks tensor codes"),
        (0, 3, "dimension C of update.codes is 3, the limit is 0"),
        (3, 2, "is 2, expected 3"),
    ],
)
def test_codes_are_there_just_where_the_run_has_some(codes, sent, sentence):
    tensors = {"coefficients": np.ones(2, np.float32), "codes": np.zeros(sent, np.uint8), "loss": np.float32(1.5)}
    with pytest.raises((FrameError, LimitError), match=sentence):
        read_all(make_reader(C=codes), encode(Update(**PLACE, learning_rate=0.1), tensors))


def test_one_reader_reads_frame_after_frame():
    reader = make_reader()
    for round_ in range(3):
        message = Projections(run="r1", epoch=0, round=round_)
        assert read_all(reader, encode(message, {"projections": np.ones(2, np.float32)})).message == message


@given(st.integers(0, 5), st.data())
def test_a_payload_may_be_cut_into_pieces_anywhere(cuts, data):
    header, payload = golden_bytes("anchor")
    places = sorted(data.draw(st.sets(st.integers(1, len(payload) - 1), min_size=cuts, max_size=cuts)))
    pieces = [payload[a:b] for a, b in zip([0, *places], [*places, len(payload)], strict=True)]
    assert read_all(make_reader(), [header, *pieces]).message == GOLDEN_FRAMES["anchor"][0]


@given(st.integers(0, 1000))
def test_a_header_piece_cut_short_is_refused(cut):
    header, _ = golden_bytes("anchor")
    reader = make_reader()
    with pytest.raises(FrameError):
        reader.feed(header[: cut % len(header)])
    assert reader.is_between_frames


@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16", "int8", "int4"])
def test_the_last_piece_of_a_big_frame_is_no_more_work_than_the_others(wire_dtype):
    tokens, width = 4096, 512
    values = np.random.default_rng(0).standard_normal((tokens, width)).astype(np.float32)
    tensors = {"activations": values, "lengths": np.full(8, 512, np.int32), "labels": np.zeros(8, np.int32)}
    header, *data = encode(Anchor(**PLACE), tensors, wire_dtype)
    payload = b"".join(data)
    pieces = [header, *(payload[place : place + 99_999] for place in range(0, len(payload), 99_999))]  # cuts numbers
    reader = make_reader(B=8, T=tokens, D=width, N=8)
    assert [reader.feed(piece) for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    tracemalloc.start()
    frame = reader.feed(pieces[-1])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 8 * PIECE_BYTES < values.nbytes
    assert (
        frame.tensors["activations"].tobytes() == as_read(values, Anchor.tensors["activations"], wire_dtype).tobytes()
    )


def test_small_tensors_share_a_piece():
    tensors = {"coefficients": np.ones(2, np.float32), "loss": np.float32(1.5)}
    _, *data = encode(Update(**PLACE, learning_rate=0.1), tensors)
    assert [len(piece) for piece in data] == [12]
    activations = np.zeros((PIECE_BYTES // 16 + 1, 4), np.float32)
    ones = np.ones(3, np.int32)
    _, *data = encode(Anchor(**PLACE), {"activations": activations, "lengths": ones, "labels": ones})
    assert [len(piece) for piece in data] == [PIECE_BYTES, 16 + 12 + 12]


def test_big_tensors_travel_in_pieces_of_at_most_256_kib():
    h_TD = np.arange(300_000, dtype=np.float32).reshape(-1, 3)
    tensors = {"activations": h_TD, "lengths": np.array([1], np.int32), "labels": np.array([0], np.int32)}
    pieces = list(encode(Anchor(**PLACE), tensors))
    assert max(len(piece) for piece in pieces[1:]) == PIECE_BYTES
    frame = read_all(make_reader(T=100_000), pieces)
    assert np.array_equal(frame.tensors["activations"], h_TD)


def test_arrays_that_are_not_contiguous_or_not_float32_are_converted():
    v = np.array([1.0, 9.0, 2.0, 9.0])[::2]
    frame = read_all(make_reader(), encode(Projections(**PLACE), {"projections": v}))
    assert frame.tensors["projections"].tolist() == [1.0, 2.0]


def test_our_own_missing_tensor_or_endless_header_is_noticed_before_it_is_sent():
    with pytest.raises(KeyError, match="projections"):
        list(encode(Projections(**PLACE), {}))
    with pytest.raises(LimitError, match="header in bytes"):
        list(encode(Complete(run="x" * 70_000, reason="failed", round=1), {}))


# Wire types


@given(st.floats(width=32))
def test_bfloat16_is_the_nearest_with_ties_to_even(value):
    bits = int(to_bfloat16_bits(np.array([value], np.float32))[0])
    back = float(from_bfloat16_bits(np.array([bits], np.uint16))[0])
    if math.isnan(value):
        assert math.isnan(back)
        return
    (exact,) = struct.unpack("<I", struct.pack("<f", value))
    below, rest = exact >> 16, exact & 0xFFFF
    expected = below + (rest > 0x8000 or (rest == 0x8000 and below % 2 == 1))
    assert bits == expected


@pytest.mark.parametrize(
    ("exact", "rounded"), [(0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0x3F808001, 0x3F81), (0x7F7FFFFF, 0x7F80)]
)
def test_bfloat16_ties_go_to_even_and_the_largest_values_to_infinity(exact, rounded):
    assert to_bfloat16_bits(np.array([exact], np.uint32).view(np.float32)).tolist() == [rounded]


def test_float16_clips_what_it_cannot_hold_and_keeps_nan():
    h_TD = np.array([[1e9, -math.inf, math.nan]], np.float32)
    tensors = {"activations": h_TD, "lengths": np.array([1], np.int32), "labels": np.array([0], np.int32)}
    (row,) = read_all(make_reader(), encode(Anchor(**PLACE), tensors, "float16")).tensors["activations"].tolist()
    assert row[:2] == [65504.0, -65504.0]
    assert math.isnan(row[2])


# One test for each way in which a frame can be wrong. None may take memory for the payload.


def anchor_layout(**changes):
    layout = {
        "activations": {"dtype": "F32", "shape": [5, 3], "data_offsets": [0, 60]},
        "lengths": {"dtype": "I32", "shape": [2], "data_offsets": [60, 68]},
        "labels": {"dtype": "I32", "shape": [2], "data_offsets": [68, 76]},
    }
    for name, change in changes.items():
        layout[name] = {**layout.get(name, {}), **change}
    return layout


def header_of(layout, message='{"type":"anchor","run":"r1","epoch":0,"round":7}'):
    return with_length(json.dumps({"__metadata__": {"hosl": message}, **layout}).encode())


def with_length(text):
    return struct.pack("<Q", len(text)) + text


def refuse(piece, match, error=FrameError, reader=None):
    """The piece is refused, and less than 1 MiB was taken on the way."""
    reader = reader or make_reader()
    tracemalloc.start()
    try:
        with pytest.raises(error, match=match):
            reader.feed(piece)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_frame_that_the_wrong_ones_depart_from_is_right():
    assert read_all(make_reader(), [header_of(anchor_layout()), bytes(76)]).tensors["labels"].size == 2


def test_header_piece_above_its_limit():
    refuse(bytes(MAX_HEADER_BYTES + 9), f"the limit is {MAX_HEADER_BYTES + 8}", LimitError)


def test_header_piece_shorter_than_a_length():
    refuse(b"\0" * 7, "header piece of 7 bytes, expected at least 8")


def test_empty_header_piece():
    refuse(b"", "header piece of 0 bytes")


@pytest.mark.parametrize("length", [0, 9, 11, 2**63, 2**64 - 1])
def test_header_length_that_is_not_that_of_the_piece(length):
    refuse(struct.pack("<Q", length) + b"0123456789", f"header length says {length}, the piece holds 10")


@pytest.mark.parametrize("text", [b"", b"nonsense", b"[1]", b"null", b'{"a":1', b"{}{}", b'{"\xff":1}', b"{" * 5000])
def test_header_that_is_not_a_json_object(text):
    refuse(with_length(text), r"^frame header(:| is not JSON)")


def test_header_nested_without_end():
    refuse(with_length(b'{"a":' + b"[" * 60_000), "frame header is not JSON")
    refuse(with_length(b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}"), "frame header is not JSON")


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ("null", "__metadata__ of the frame header: expected `object`, got `null`"),
        ('"x"', "__metadata__ of the frame header: expected `object`, got `str`"),
        ("{}", "__metadata__ of the frame header has no entry 'hosl', the message"),
        ('{"hosl":7}', "entry 'hosl' of __metadata__: expected `str`, got `int`"),
        ('{"hosl":{"type":"goodbye"}}', "entry 'hosl' of __metadata__: expected `str`, got `object`"),
        ('{"hosl":"","other":7}', "entry 'other' of __metadata__: expected `str`, got `int`"),
        ('{"hosl":""}', "message is not JSON: Input data was truncated"),
        ('{"hosl":"anchor"}', "message is not JSON: JSON is malformed"),
        ('{"hosl":"[]"}', "message: expected `object`, got `array`"),
    ],
)
def test_metadata_without_a_message_is_named_where_it_is_wrong(metadata, sentence):
    refuse(with_length(b'{"__metadata__":' + metadata.encode() + b"}"), f"^{re.escape(sentence)}")


def test_header_without_metadata():
    refuse(with_length(b"{}"), "^frame header without __metadata__, where the message is$")


@pytest.mark.parametrize("message", ['{"type":"pickle"}', "{}"])
def test_message_of_unknown_type(message):
    refuse(header_of({}, message), r"^message: field type: expected hello or .*, got ('pickle'|'')$")


def test_message_that_the_other_side_sends():
    refuse(
        header_of({}, '{"type":"eval-start","run":"r1","epoch":0,"round":7}'),
        "eval-start",
        reader=make_reader(FromEdge),
    )


def test_message_with_an_unknown_field():
    refuse(
        header_of({}, '{"type":"goodbye","reason":"x","more":1}'),
        "message goodbye: object contains unknown field `more`",
    )


def test_message_that_lacks_a_field():
    refuse(header_of({}, '{"type":"goodbye"}'), "^message goodbye: object missing required field `reason`$")


@pytest.mark.parametrize("value", ['"7"', "7.0", "7.5", "true", "null", "-1", "281474976710656", "1e3", "9" * 5000])
def test_field_of_the_wrong_type_or_outside_its_range(value):
    message = f'{{"type":"anchor","run":"r1","epoch":0,"round":{value}}}'
    refuse(header_of(anchor_layout(), message), "^message( anchor: field round: | anchor is not JSON)")


@pytest.mark.parametrize("run", ["", "a/b", "a b", "x" * 65, "run\n", "\u00e9"])
def test_name_outside_its_alphabet(run):
    refuse(
        header_of(anchor_layout(), json.dumps({"type": "anchor", "run": run, "epoch": 0, "round": 7})),
        "anchor: field run: ",
    )


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64])
def test_digest_that_is_not_64_lower_case_hexadecimal_digits(digest):
    ready = {"type": "ready", "run": "r", "epoch": 0, "applied_round": 0, "train_examples": 1, "eval_examples": 0}
    refuse(header_of({}, json.dumps({**ready, "weights_digest": digest})), "ready: field weights_digest: ")


@pytest.mark.parametrize("value", ["1e400", "-1.0", "NaN", "Infinity", "null"])
def test_duration_that_is_no_finite_number_from_zero_on(value):
    message = f'{{"type":"round-start","run":"r1","epoch":0,"round":7,"deadline_s":{value}}}'
    refuse(header_of({}, message), "^message( round-start: field deadline_s: | round-start is not JSON| is not JSON)")


@pytest.mark.parametrize("name", ["activations", "lengths", "labels"])
def test_missing_tensor(name):
    layout = anchor_layout()
    del layout[name]
    refuse(header_of(layout), f"anchor lacks tensor {name}")


def test_extra_tensor():
    refuse(
        header_of(anchor_layout(keys={"dtype": "F32", "shape": [1], "data_offsets": [76, 80]})), "unknown tensor 'keys'"
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("activations", "F64"), ("lengths", "I64"), ("labels", "F32"), ("labels", "U8"), ("labels", "?")],
)
def test_tensor_of_the_wrong_type(name, dtype):
    refuse(header_of(anchor_layout(**{name: {"dtype": dtype}})), f"anchor.{name} has type")


def test_wire_dtype_other_than_the_agreed_one():
    layout = anchor_layout(activations={"dtype": "F16"})
    reader = FrameReader(FromEdge, Bounds(BOUNDS, wire_dtypes=("F32",)))
    refuse(header_of(layout), "has type 'F16', expected F32", reader=reader)


@pytest.mark.parametrize(("dtype", "size"), [("I8", 5), ("U8", 4)])
def test_packed_rows_have_the_bytes_of_the_width(dtype, size):
    def layout(row):
        end = 5 * row
        return anchor_layout(
            activations={"dtype": dtype, "shape": [5, row], "data_offsets": [0, end]},
            lengths={"data_offsets": [end, end + 8]},
            labels={"data_offsets": [end + 8, end + 16]},
        )

    assert make_reader().feed(header_of(layout(size))) is None
    for row in (size - 1, size + 1, 3, 2**40):
        refuse(header_of(layout(row)), f"has rows of {row} bytes, expected {size} for a width of 3")


@pytest.mark.parametrize(
    ("name", "shape"), [("activations", [15]), ("activations", [1, 5, 3]), ("lengths", []), ("labels", [2, 1])]
)
def test_tensor_of_the_wrong_rank(name, shape):
    refuse(header_of(anchor_layout(**{name: {"shape": shape}})), f"anchor.{name} has {len(shape)} dimensions")


@pytest.mark.parametrize(
    ("name", "shape", "dimension"),
    [("activations", [65, 3], "T"), ("activations", [2**40, 3], "T"), ("lengths", [5], "B"), ("labels", [65], "N"),
     ("activations", [5, 4], "D"), ("activations", [10**30, 3], "T")],
)  # fmt: skip
def test_dimension_above_its_bound(name, shape, dimension):
    size = 4 * math.prod(shape)
    piece = header_of(anchor_layout(**{name: {"shape": shape, "data_offsets": [0, size]}}))
    refuse(piece, f"dimension {dimension} of anchor.{name} is .*, the limit is {BOUNDS[dimension]}", LimitError)


def test_negative_dimension():
    refuse(header_of(anchor_layout(activations={"shape": [-5, -3]})), "negative dimension -5")


@pytest.mark.parametrize("shape", [[5, 2], [5, 0]])
def test_width_other_than_the_cut_layers(shape):
    refuse(
        header_of(anchor_layout(activations={"shape": shape})), "dimension D of anchor.activations is .*, expected 3"
    )


def test_another_number_of_directions_than_agreed():
    layout = {"projections": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    message = '{"type":"projections","run":"r1","epoch":0,"round":7}'
    refuse(header_of(layout, message), "dimension P of projections.projections is 1, expected 2")


def test_two_tensors_that_disagree_about_a_dimension():
    layout = {
        "coefficients": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
        "learning_rates": {"dtype": "F64", "shape": [2], "data_offsets": [24, 40]},
    }
    message = '{"type":"catch-up","run":"r1","epoch":0,"first_round":1,"last":true}'
    refuse(header_of(layout, message), "has R = 2, another tensor of the frame has 3")


@pytest.mark.parametrize(
    ("what", "name", "offsets"),
    [
        ("overlapping", "lengths", [56, 64]),
        ("the same place twice", "labels", [60, 68]),
        ("a hole", "labels", [72, 80]),
        ("a hole at the start", "activations", [4, 64]),
        ("a wrong begin alone", "labels", [72, 76]),
        ("negative", "activations", [-60, 0]),
        ("backwards", "activations", [60, 0]),
        ("too short for the shape", "activations", [0, 56]),
        ("too long for the shape", "labels", [68, 80]),
        ("beyond 64 bits", "labels", [2**64 + 68, 2**64 + 76]),
        ("terabytes", "labels", [68, 2**42]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_offsets_with(what, name, offsets):
    refuse(header_of(anchor_layout(**{name: {"data_offsets": offsets}})), "has offsets .*, expected")


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_tensor_entry_that_lacks_a_field(field):
    layout = anchor_layout()
    del layout["labels"][field]
    refuse(header_of(layout), f"missing required field `{field}`")


@pytest.mark.parametrize(
    "change", [{"shape": [5.0, 3]}, {"shape": "5"}, {"data_offsets": [0, 60, 60]}, {"data_offsets": [0]}, {"more": 1}]
)
def test_tensor_entry_of_another_form(change):
    refuse(header_of(anchor_layout(activations=change)), "^entry 'activations' of the frame header: ")


def test_nothing_is_allowed_before_bounds_are_agreed():
    refuse(header_of(anchor_layout()), "the limit is 0", LimitError, FrameReader(FromEdge))


def started():
    reader = make_reader()
    assert reader.feed(header_of(anchor_layout())) is None
    assert not reader.is_between_frames
    return reader


def test_empty_data_piece():
    refuse(b"", "data piece of 0 bytes, expected 1 to 76", reader=started())


def test_surplus_bytes_in_a_data_piece():
    reader = started()
    reader.feed(bytes(70))
    refuse(bytes(7), "data piece of 7 bytes, expected 1 to 6", reader=reader)


def test_surplus_bytes_after_a_frame_are_no_header():
    reader = started()
    assert reader.feed(bytes(76)) is not None
    refuse(bytes(76), "header length says 0, the piece holds 68", reader=reader)


def test_oversized_data_piece():
    reader = make_reader(T=100_000)
    size = 100_000 * 12
    layout = anchor_layout(
        activations={"shape": [100_000, 3], "data_offsets": [0, size]},
        lengths={"data_offsets": [size, size + 8]},
        labels={"data_offsets": [size + 8, size + 16]},
    )
    reader.feed(header_of(layout))
    with pytest.raises(FrameError, match=f"data piece of {PIECE_BYTES + 1} bytes, expected 1 to {PIECE_BYTES}"):
        reader.feed(bytes(PIECE_BYTES + 1))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_frame_error_and_nothing_else(piece):
    with pytest.raises(FrameError):
        make_reader().feed(piece)


@given(st.data())
def test_a_damaged_header_is_refused_or_still_within_its_bounds(data):
    header = bytearray(golden_bytes("anchor")[0])
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(8, len(header) - 1))] = data.draw(st.integers(0, 255))
    reader = make_reader()
    try:
        reader.feed(bytes(header))
    except (FrameError, LimitError):
        return
    assert reader._buffer.size <= 4 * (64 * 3 + 64 + 4)


def test_messages_are_immutable_and_keyword_only():
    with pytest.raises(AttributeError):
        Goodbye(reason="x").reason = "y"
    with pytest.raises(TypeError):
        Goodbye("x")
    assert msgspec.json.decode(msgspec.json.encode(Goodbye(reason="x")), type=FromEdge) == Goodbye(reason="x")
