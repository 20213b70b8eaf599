"""Packed rows: how near they come to their numbers, what is not finite, and rounding whose mean is right."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from hosl_protocol.arithmetic.directions import Stream, philox
from hosl_protocol.wire.packing import BLOCK, Dither, pack, row_bytes, unpack

BITS = pytest.mark.parametrize("bits", [8, 4])
WIDTHS = (1, 3, 31, 32, 33, 64, 77)


def normals(rows, width, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def unpacked(packed_TR, width, bits):
    out_TD = np.empty((len(packed_TR), width), np.float32)
    unpack(packed_TR, bits, out_TD)
    return out_TD


def bfloat16_from(value):
    """The bits of the least bfloat16 that is not below `value`."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return (bits >> 16) + bool(bits & 0xFFFF)


def packed_by_the_book(row, bits, u=None):
    """One row as the specification has it, number by number."""
    scales, codes, largest = b"", [], 2 ** (bits - 1) - 1
    for start in range(0, len(row), BLOCK):
        block = row[start : start + BLOCK]
        exact = max(abs(x) for x in block) / np.float32(largest)
        scale = bfloat16_from(exact) if exact >= 2.0**-126 else 0
        scales += struct.pack("<H", scale)
        divisor = np.frombuffer(struct.pack("<I", scale << 16), "<f4")[0]
        for place, x in enumerate(block, start):
            v = x / divisor if scale else np.float32(0)
            codes.append(int(np.rint(v)) if u is None else math.floor(v + u[place]))
    if bits == 8:
        return scales + struct.pack(f"{len(codes)}b", *codes)
    codes.append(0)
    pairs = zip(codes[::2], codes[1::2], strict=False)
    return scales + bytes(low & 15 | (high & 15) << 4 for low, high in pairs)


@BITS
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_those_of_the_specification(bits, width):
    values = normals(5, width) * np.float32(10.0) ** np.arange(-20, 30, 10, dtype=np.float32)[:, None]
    packed = pack(values, bits)
    assert packed.shape == (5, row_bytes(width, bits))
    assert [bytes(row) for row in packed] == [packed_by_the_book(row, bits) for row in values]


@BITS
@pytest.mark.parametrize("width", WIDTHS)
def test_random_rounding_is_that_of_the_specification_from_any_row_on(bits, width):
    values, dither = normals(9, width), Dither(42, 56009, 7)
    words = philox(42, 7, 56009, Stream.WIRE).random_raw(9 * width)
    drawn = np.array([word >> 8 * byte & 255 for word in words.tolist() for byte in range(8)], np.float32)
    u = ((drawn + np.float32(0.5)) / np.float32(256))[: 9 * width].reshape(9, width)
    packed = np.concatenate([pack(values[:4], bits, dither), pack(values[4:], bits, dither, 4)])
    assert [bytes(row) for row in packed] == [
        packed_by_the_book(row, bits, u_D) for row, u_D in zip(values, u, strict=True)
    ]


floats = st.floats(-(2.0**127), 2.0**127, width=32)  # what comes back may be larger by a hundredth


@BITS
@pytest.mark.parametrize("is_dithered", [False, True])
@given(data=st.data())
def test_a_number_comes_back_within_a_step_of_its_block(bits, is_dithered, data):
    width = data.draw(st.integers(1, 70))
    values = data.draw(npst.arrays(np.float32, (2, width), elements=floats))
    back = unpacked(pack(values, bits, Dither(1, 2, 3) if is_dithered else None), width, bits)
    for start in range(0, width, BLOCK):
        block = values[:, start : start + BLOCK].astype(np.float64)
        largest = np.abs(block).max(axis=1, keepdims=True)
        step = largest / (2 ** (bits - 1) - 1) * (1 + 2.0**-7)  # a scale is rounded up
        error = np.abs(back[:, start : start + BLOCK] - block)
        # A scale below 2^-126 is 0.
        assert (error <= step * (1.002 if is_dithered else 0.501) + 2.0**-119).all()


@BITS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_its_block_nan_and_no_other(bits, value):
    values = normals(3, 70)
    values[1, 40] = value
    back = unpacked(pack(values, bits), 70, bits)
    expected = np.zeros((3, 70), bool)
    expected[1, 32:64] = True
    np.testing.assert_array_equal(np.isnan(back), expected)


@BITS
def test_zeros_stay_zeros_and_so_does_what_has_no_scale(bits):
    values = np.zeros((2, 40), np.float32)
    values[1] = 2.0**-140
    for dither in (None, Dither()):
        assert not unpacked(pack(values, bits, dither), 40, bits).any()


@BITS
def test_the_mean_of_random_rounding_is_the_number(bits):
    values = normals(1, 64)
    total = np.zeros((1, 64))
    for number in range(2000):
        total += unpacked(pack(values, bits, Dither(3, 1 + number, 5)), 64, bits)
    step = np.abs(values.reshape(2, 32)).max(axis=1).repeat(32) / (2 ** (bits - 1) - 1)
    off = (total[0] / 2000 - values[0]) / step
    # Standard deviation of a mean: at most half a step over the root of 2000.
    assert np.abs(off).max() < 4 * 0.5 / 2000**0.5 + 1 / 512
    nearest = (unpacked(pack(values, bits), 64, bits)[0] - values[0]) / step
    assert np.abs(nearest).max() > 0.3


def test_two_devices_and_two_rounds_round_otherwise():
    values = normals(2, 64)
    rows = {pack(values, 4, dither).tobytes() for dither in (Dither(1, 2, 3), Dither(1, 3, 3), Dither(1, 2, 4))}
    assert len(rows) == 3


@pytest.mark.parametrize(("width", "int8", "int4"), [(384, 408, 216), (576, 612, 324), (32, 34, 18), (33, 37, 21)])
def test_bytes_of_a_row(width, int8, int4):
    assert (row_bytes(width, 8), row_bytes(width, 4)) == (int8, int4)
