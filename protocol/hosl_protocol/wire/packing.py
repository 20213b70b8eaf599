"""Rows of activations in 8 or 4 bits a number: a scale for each block of 32 numbers, and whole numbers times it.

Blocks, because a few channels of a language model are a hundred times the others: with one scale a row these would take
all the levels. What is decoded has the same bits on every machine: every operation here is one that IEEE 754 rounds in
one way. Specification with golden frames: protocol/README.md, section "Frames".
Shapes: T rows, D numbers of a row, K blocks of a row, R bytes of a row, N blocks of all rows, E numbers of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hosl_protocol.arithmetic.directions import Stream, philox

BLOCK = 32
"""Numbers with one scale, fewer at a row's end."""
SCALE_BYTES = 2
"""Of a scale, in bfloat16: float32's range, and rounded up, so that no number is cut off."""

_NAN_BITS = np.uint16(0x7FC0)
_SMALLEST_BITS = np.uint32(0x00800000)  # of 2^-126: what is smaller some processors take for 0
_BYTES_A_BLOCK = 32  # of random words

Floats: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]


def row_bytes(width: int, bits: int) -> int:
    """Count the bytes of a row: its scales, then its codes."""
    return SCALE_BYTES * _blocks(width) + -(-width * bits // 8)


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


@dataclass(frozen=True)
class Dither:
    """Which random words round λ: those of a run and a device, and of a round."""

    seed: int = 0
    number: int = 0
    """The device's own, as that of its rotation: else the errors of many would not average out."""
    round: int = 0

    def draw(self, start: int, count: int) -> Floats:
        """Draw u for numbers [start, start + count) of a tensor, (byte + 1/2) / 256 each [count]."""
        block, skipped = divmod(start, _BYTES_A_BLOCK)
        generator = philox(self.seed, self.round, self.number, Stream.WIRE, 0, block)
        words = np.asarray(generator.random_raw((skipped + count + 7) // 8)).astype("<u8", copy=False)
        u = words.view(np.uint8)[skipped : skipped + count].astype(np.float32)
        u += np.float32(0.5)
        u *= np.float32(1.0 / 256.0)
        return u


def pack(values_TD: Floats, bits: int, dither: Dither | None = None, first_row: int = 0) -> Bytes:
    """Make the rows [T, R] of `values_TD`, which begin at `first_row` of a tensor.

    Rounded to the nearest, ties to even; with `dither` at random, so that the mean over its words is the number itself.
    A block with a number that is not finite comes back as NaN.
    """
    rows, width = values_TD.shape
    blocks, largest = _blocks(width), (1 << (bits - 1)) - 1
    x_NE = np.zeros((rows, blocks * BLOCK), np.float32)
    x_NE[:, :width] = values_TD
    x_NE = x_NE.reshape(rows * blocks, BLOCK)
    scale_bits_N, divisor_N = _scales(x_NE, largest)

    x_NE /= divisor_N[:, None]
    codes = x_NE.reshape(rows, blocks * BLOCK)[:, :width]
    if dither is None:
        np.rint(codes, out=codes)
    else:
        codes += dither.draw(first_row * width, rows * width).reshape(rows, width)
        np.floor(codes, out=codes)

    packed_TR = np.empty((rows, row_bytes(width, bits)), np.uint8)
    packed_TR[:, : SCALE_BYTES * blocks] = scale_bits_N.view(np.uint8).reshape(rows, SCALE_BYTES * blocks)
    packed_TR[:, SCALE_BYTES * blocks :] = _join(codes.astype(np.int8).view(np.uint8), bits)
    return packed_TR


def _scales(x_NE: Floats, largest: int) -> tuple[npt.NDArray[np.uint16], Floats]:
    """Find each block's scale, as bits of bfloat16 [N], and what its numbers are divided by [N].

    A block without a scale, zeros or what is not finite, becomes zeros that are divided by 1.
    """
    magnitude_N = _largest(np.abs(x_NE))
    finite_N = np.isfinite(magnitude_N)
    if not finite_N.all():
        x_NE[~finite_N] = 0.0
        magnitude_N[~finite_N] = 0.0
    magnitude_N /= np.float32(largest)

    exact_N = magnitude_N.view(np.uint32)
    # Up to the next bfloat16: no number then has a code above the largest.
    bits_N = np.where(exact_N < _SMALLEST_BITS, 0, (exact_N + np.uint32(0xFFFF)) >> np.uint32(16)).astype("<u2")
    scale_N = (bits_N.astype(np.uint32) << np.uint32(16)).view(np.float32)
    bits_N[~finite_N] = _NAN_BITS
    return bits_N, np.where(scale_N > 0.0, scale_N, np.float32(1.0))


def _largest(magnitudes_NE: Floats) -> Floats:
    """Find the largest of each row [N], NaN where there is one; halves against each other, several times as fast."""
    half = BLOCK
    while half > 1:
        half //= 2
        np.maximum(magnitudes_NE[:, :half], magnitudes_NE[:, half : 2 * half], out=magnitudes_NE[:, :half])
    return np.array(magnitudes_NE[:, 0])


def _join(codes: Bytes, bits: int) -> Bytes:
    """Join codes [T, D] in two's complement to bytes, the first in the lowest bits."""
    if bits == 8:
        return codes
    nibbles = codes & np.uint8(15)
    joined = nibbles[:, ::2].copy()
    joined[:, : codes.shape[1] // 2] |= nibbles[:, 1::2] << np.uint8(4)
    return np.asarray(joined)


def unpack(packed_TR: Bytes, bits: int, out_TD: Floats) -> None:
    """Read rows [T, R] into `out_TD`."""
    rows, width = out_TD.shape
    blocks = _blocks(width)
    scale_bits = np.ascontiguousarray(packed_TR[:, : SCALE_BYTES * blocks]).view("<u2").astype(np.uint32)
    scales_TK = (scale_bits << np.uint32(16)).view(np.float32)

    codes = packed_TR[:, SCALE_BYTES * blocks :]
    if bits == 8:
        out_TD[...] = codes.view(np.int8)
    else:
        out_TD[...] = np.take(_nibbles(), codes, axis=0).reshape(rows, 2 * codes.shape[1])[:, :width]
    # A scale that is not finite is the sender's: its numbers are found not to be when they are used.
    with np.errstate(over="ignore", invalid="ignore"):
        whole = width // BLOCK * BLOCK
        by_block_TKE = out_TD[:, :whole].reshape(rows, whole // BLOCK, BLOCK)
        by_block_TKE *= scales_TK[:, : whole // BLOCK, None]
        if whole < width:
            out_TD[:, whole:] *= scales_TK[:, -1:]


@lru_cache(maxsize=1)
def _nibbles() -> Floats:
    """Make the table from a byte to its two codes [256, 2]."""
    codes = np.arange(256)[:, None] >> np.array([0, 4]) & 15
    table = (codes - 16 * (codes > 7)).astype(np.float32)
    table.flags.writeable = False
    return np.asarray(table)
