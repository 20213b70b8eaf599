"""Gradients in a few bits a number: rotated at random, cut to levels with one scale a block, and turned back.

After DRIVE (arXiv 2105.08339) and EDEN (arXiv 2108.08842). A block of B entries is multiplied by random signs and by a
Hadamard matrix, which makes its entries alike, nearly normal; each is cut to one of 2^bits levels, odd whole numbers c.
The scale Σy² / (B · Σ y·c) makes what comes back unbiased over uniform rotations, and nearly so over these.

What is decoded has the same bits on every machine: the transform back is one of whole numbers below 2^24, which float32
adds exactly in whatever order, and then each is multiplied once by its block's scale. Specification with golden
vectors: protocol/README.md, section "Gradients". Everything here is stateless, and may be called from any thread.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from hosl_protocol.arithmetic import kernel
from hosl_protocol.arithmetic.directions import CHUNK, MAX_DIRECTION, Stream, Vector, philox, read_bits, signs
from hosl_protocol.exceptions import HoslError

GradientBits = Literal[1, 2, 4, 8, 32]
Codes: TypeAlias = npt.NDArray[np.uint8]

LONGEST_BLOCK, SHORTEST_BLOCK, SHORTEST_PADDED = 4096, 32, 8
"""Entries of a block. A tensor is cut into blocks of powers of two, the longest first, so that few entries are padded;
what is left at the end, below 32, is padded with zeros to a power of two of at least 8, whose codes are whole bytes."""

_STEPS: dict[int, float] = {1: 1.596, 2: 0.9957, 4: 0.3352, 8: 0.0308}
"""Distance of levels, in standard deviations, that loses least of a normal's entries (Max 1960, table II)."""


@dataclass(frozen=True)
class Rotation:
    """Which random signs: of one run and round, and of one sender."""

    seed: int
    round: int
    number: int
    """0 for the cloud's updates; each device has its own, so that the errors of many average out."""

    def signs(self, index: int, start: int, elements: int) -> Vector:
        """Draw ±1 for entries [start, start + elements) of tensor `index`; `start` is a multiple of CHUNK."""
        compiled = kernel.load()
        if compiled is not None:
            drawn = np.zeros(elements, np.float32)
            compiled(drawn, start, kernel.pack([((self.seed, self.round << 16 | self.number), index, 1.0)]))
            return drawn
        generator = philox(self.seed, self.round, self.number, Stream.SIGNS, index, start // 256)
        return np.asarray(np.take(signs(), read_bits(generator, elements), axis=0).reshape(-1)[:elements])


def rotation_of(device: str) -> int:
    """Find a device's own rotation, 1 to 65534, by its name: in each run of one seed the same."""
    digest = hashlib.sha256(device.encode()).digest()
    return 1 + int.from_bytes(digest[:8], "little") % (MAX_DIRECTION - 1)


@dataclass(frozen=True)
class _Run:
    """Blocks of one length that follow each other, within a tensor."""

    start: int
    """Of the first entry."""
    rows: int
    length: int

    def entries(self, elements: int) -> slice:
        """Those of a tensor with so many elements; the padding is none."""
        return slice(self.start, min(self.start + self.rows * self.length, elements))


def _runs(elements: int) -> Iterator[_Run]:
    """Cut a tensor into blocks."""
    whole = elements // LONGEST_BLOCK
    if whole:
        yield _Run(0, whole, LONGEST_BLOCK)

    start = whole * LONGEST_BLOCK
    while (left := elements - start) > 0:
        if left >= SHORTEST_BLOCK:
            length = 1 << (left.bit_length() - 1)
        else:
            length = max(SHORTEST_PADDED, 1 << (left - 1).bit_length())
        yield _Run(start, 1, length)
        start += length


class GradientLayout:
    """Where the codes and scales of each tensor lie among those of a whole gradient, and how to make and read them.

    At 32 bits the values themselves are the scales, and there are no codes.
    """

    def __init__(self, sizes: Sequence[int], bits: int) -> None:
        """`sizes` are the elements of the trainable tensors, in the manifest's order."""
        self.sizes = tuple(sizes)
        self.bits = bits
        shapes = [_shape(size, bits) for size in self.sizes]
        self._scale_starts = [0, *accumulate(scales for scales, _ in shapes)]
        self._code_starts = [0, *accumulate(codes for _, codes in shapes)]

    @property
    def scales(self) -> int:
        """Numbers of a gradient: a scale for each block."""
        return self._scale_starts[-1]

    @property
    def codes(self) -> int:
        """Bytes of a gradient's codes."""
        return self._code_starts[-1]

    def empty(self) -> tuple[Codes, Vector]:
        """Make codes [C] and scales [P] of a gradient that is zero."""
        return np.zeros(self.codes, np.uint8), np.zeros(self.scales, np.float32)

    def encode(self, values: Vector, index: int, rotation: Rotation, codes: Codes, scales: Vector) -> None:
        """Write tensor `index`, `values` [elements], to its places in `codes` [C] and `scales` [P].

        A block with an entry that is not finite gets a scale that is not.
        """
        if values.shape != (self.sizes[index],):
            raise HoslError(f"gradient of tensor {index} has shape {list(values.shape)}, expected {self.sizes[index]}")
        own_codes, own_scales = self._own(index, codes, scales)
        if self.bits == 32:
            own_scales[:] = values
            return
        for start in range(0, values.size, CHUNK):
            chunk = values[start : start + CHUNK]
            rotated = chunk * rotation.signs(index, start, chunk.size)
            first_code, first_scale = start * self.bits // 8, start // LONGEST_BLOCK
            self._encode_chunk(rotated, own_codes[first_code:], own_scales[first_scale:])

    def _encode_chunk(self, rotated: Vector, codes: Codes, scales: Vector) -> None:
        """Write blocks of `rotated`, which has its signs already, to the front of `codes` and `scales`."""
        code = scale = 0
        for run in _runs(rotated.size):
            y_RB = np.zeros((run.rows, run.length), np.float32)
            part = rotated[run.entries(rotated.size)]
            y_RB.reshape(-1)[: part.size] = part
            hadamard(y_RB)

            levels_RB, scales_R = _quantize(y_RB, self.bits)
            packed = _pack(levels_RB.reshape(-1), self.bits)
            codes[code : code + packed.size] = packed
            scales[scale : scale + run.rows] = scales_R
            code, scale = code + packed.size, scale + run.rows

    def decode(self, codes: Codes, scales: Vector, index: int, rotation: Rotation, start: int, out: Vector) -> None:
        """out ← entries [start, start + out.size) of tensor `index`.

        `start` is a multiple of CHUNK, and `out` ends the tensor or has at most CHUNK entries.
        """
        own_codes, own_scales = self._own(index, codes, scales)
        if self.bits == 32:
            np.add(own_scales[start : start + out.size], np.float32(0.0), out=out)  # -0.0 becomes +0.0
            return

        code, scale = start * self.bits // 8, start // LONGEST_BLOCK
        table = _levels(self.bits)
        for run in _runs(out.size):
            packed = own_codes[code : code + run.rows * run.length * self.bits // 8]
            k_RB = np.take(table, packed, axis=0).reshape(run.rows, run.length)
            hadamard(k_RB)
            # One rounding: whatever is done before is exact.
            k_RB *= own_scales[scale : scale + run.rows, None]
            place = run.entries(out.size)
            out[place] = k_RB.reshape(-1)[: place.stop - place.start]
            code, scale = code + packed.size, scale + run.rows
        out *= rotation.signs(index, start, out.size)
        out += np.float32(0.0)  # -0.0 becomes +0.0

    def largest(self, codes: Codes, scales: Vector, index: int, rotation: Rotation) -> float:
        """Find the largest magnitude among the tensor's entries, without holding more than a chunk of them."""
        scratch, found = np.empty(min(CHUNK, self.sizes[index]), np.float32), 0.0
        for start in range(0, self.sizes[index], CHUNK):
            out = scratch[: min(CHUNK, self.sizes[index] - start)]
            self.decode(codes, scales, index, rotation, start, out)
            found = max(found, float(out.max()), -float(out.min()))
        return found

    def _own(self, index: int, codes: Codes, scales: Vector) -> tuple[Codes, Vector]:
        return (
            codes[self._code_starts[index] : self._code_starts[index + 1]],
            scales[self._scale_starts[index] : self._scale_starts[index + 1]],
        )


def _shape(elements: int, bits: int) -> tuple[int, int]:
    """Count scales and bytes of codes of a tensor."""
    if bits == 32:
        return elements, 0
    runs = list(_runs(elements))
    return sum(run.rows for run in runs), sum(run.rows * run.length for run in runs) * bits // 8


def _quantize(y_RB: Vector, bits: int) -> tuple[Codes, npt.NDArray[np.float32]]:
    """Cut each entry to a level 0 to 2^bits - 1, and find each row's scale [R]."""
    half, length = 1 << (bits - 1), y_RB.shape[1]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        # In float64, whose range holds the squares of all float32 numbers.
        energy_R = np.square(y_RB, dtype=np.float64).sum(axis=1)
        step_R = _STEPS[bits] * np.sqrt(energy_R / length)
        levels_RB = np.floor(y_RB / np.where(step_R > 0.0, step_R, 1.0)[:, None])
        levels_RB = np.clip(np.nan_to_num(levels_RB), -half, half - 1)
        products_R = (y_RB * (2.0 * levels_RB + 1.0)).sum(axis=1)
        scales_R = np.where(energy_R == 0.0, 0.0, energy_R / (length * products_R))
    scales_R = np.where(np.isfinite(energy_R), scales_R, math.nan)
    return (levels_RB + half).astype(np.uint8), scales_R.astype(np.float32)


def _pack(levels: Codes, bits: int) -> Codes:
    """Join levels to bytes, the first in the lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: Codes = np.bitwise_or.reduce(levels.reshape(-1, len(shifts)) << shifts, axis=1)
    return packed


@lru_cache(maxsize=4)
def _levels(bits: int) -> npt.NDArray[np.float32]:
    """Make the table from a byte to its 8 / bits levels, as odd whole numbers c = 2·level + 1 - 2^bits."""
    shifts = np.arange(0, 8, bits)
    levels = np.arange(256)[:, None] >> shifts & (1 << bits) - 1
    table = (2 * levels + 1 - (1 << bits)).astype(np.float32)
    table.flags.writeable = False
    return table


def hadamard(values_RB: Vector) -> None:
    """Multiply each row by the Hadamard matrix of its length, a power of two, in place; not scaled.

    Sums and differences of entries 1 apart, then 2, 4 and so on: the order decides the bits of what is not whole.
    """
    rows, length = values_RB.shape
    compiled = kernel.load_hadamard()
    if compiled is not None:
        compiled(values_RB)
        return
    # What is not finite, or overflows, goes through like any number, as it does in the compiled transform.
    with np.errstate(over="ignore", invalid="ignore"):
        distance = 1
        while distance < length:
            pairs = values_RB.reshape(rows, length // (2 * distance), 2, distance)
            a, b = pairs[:, :, 0], pairs[:, :, 1]
            sums = a + b
            np.subtract(a, b, out=b)
            a[...] = sums
            distance *= 2
