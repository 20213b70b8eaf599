"""Directions: random vectors from Philox4x64-10, addressable by (seed, round, direction, tensor, place).

Rademacher signs come by table: a byte of random bits indexes 256 x 8 signed steps, so that eight entries cost one
look-up. Gaussian entries stand in for the papers' normals. Specification with golden vectors: protocol/README.md,
section "Directions".
"""

from __future__ import annotations

import enum
import math
import threading
from functools import lru_cache
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hosl_protocol.arithmetic.lattice import spacing
from hosl_protocol.exceptions import SettingsError

RNG_VERSION = 1

Distribution = Literal["rademacher", "gaussian"]

CHUNK = 64 * 1024
"""Elements of AdamW's scratch; passes begin at multiples of it."""

WORK = 256 * 1024
"""Elements that numpy makes and adds at a time: fewer would stay in a core's own cache, but threads would spend their
time handing each other the interpreter's lock."""

SUMS = 8 * 1024
"""Gaussian entries made at a time: what they need on the way stays in a core's cache, and is not fetched anew."""

BITS_PER_BLOCK, WORDS_PER_BLOCK = 256, 4
MAX_SEED = 2**53 - 1
MAX_ROUND = 2**48 - 1
MAX_DIRECTION = 2**16 - 1


class Stream(enum.IntEnum):
    """What random words are used for; streams never share a counter."""

    SIGNS = 0
    ROUNDING = 1
    ORDER = 2
    SAMPLING = 3
    INITIALIZATION = 4
    NORMALS = 5
    AUGMENTATION = 6
    WIRE = 7


def philox(seed: int, round_: int, direction: int, stream: Stream, index: int = 0, block: int = 0) -> np.random.Philox:
    """Make the generator whose first four words are block `block` of (seed, round, direction, stream, index)."""
    for name, value, largest in (
        ("seed", seed, MAX_SEED),
        ("round", round_, MAX_ROUND),
        ("direction", direction, MAX_DIRECTION),
    ):
        if not 0 <= value <= largest:
            raise SettingsError(name, value, f"use a whole number from 0 to {largest}")

    # numpy's Philox increments its counter before it makes a block, so block b is that of counter word b + 1.
    key = np.array([seed, round_ << 16 | direction], dtype=np.uint64)
    counter = np.array([block, index, int(stream), 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def uniforms(seed: int, round_: int, direction: int, stream: Stream, count: int) -> npt.NDArray[np.float64]:
    """Draw `count` numbers in [0, 1) [count], each the top 53 bits of one word."""
    words = philox(seed, round_, direction, stream).random_raw(count)
    return np.asarray((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


@lru_cache(maxsize=1)
def signs() -> npt.NDArray[np.float32]:
    """Make the 256 x 8 table of signs: row b holds +1 where bit j of b (least significant first) is set, else -1."""
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    table = np.where(bits, 1, -1).astype(np.float32)
    table.flags.writeable = False
    return table


@lru_cache(maxsize=1)
def ones() -> npt.NDArray[np.int32]:
    """Count for every number of 16 bits how many of them are set, times 2^16 [65536]."""
    bits = np.unpackbits(np.arange(2**16, dtype="<u2").view(np.uint8)).reshape(-1, 16)
    table: npt.NDArray[np.int32] = bits.sum(axis=1, dtype=np.int32) << np.int32(16)
    table.flags.writeable = False
    return table


def read_bits(generator: np.random.Philox, elements: int) -> npt.NDArray[np.uint8]:
    """Read the next ceil(elements / 8) bytes of sign bits; consumes whole words (little-endian)."""
    words = np.asarray(generator.random_raw((elements + 63) // 64)).astype("<u8", copy=False)
    return words.view(np.uint8)[: (elements + 7) // 8]


def direction(seed: int, round_: int, direction_: int, index: int, elements: int) -> npt.NDArray[np.float32]:
    """Make one tensor's Rademacher direction, ±1 [elements]: the plain reading of the recipe, for tests and tools."""
    generator = philox(seed, round_, direction_, Stream.SIGNS, index)
    return np.asarray(np.take(signs(), read_bits(generator, elements), axis=0).reshape(-1)[:elements])


Vector: TypeAlias = npt.NDArray[np.float32]


class Steps(Protocol):
    """step · z of one tensor and direction, from a given place on."""

    def next(self, elements: int) -> Vector:
        """The next `elements` entries, at most WORK; scratch of this thread until the next call."""
        ...


class RademacherSteps:
    """±step, eight entries for each byte of random bits."""

    largest = 1.0
    """Largest |z|."""

    def __init__(self, seed: int, round_: int, direction_: int, index: int, step: float, start: int) -> None:
        self._generator = philox(seed, round_, direction_, Stream.SIGNS, index, start // BITS_PER_BLOCK)
        # One 32-byte item per row: numpy then copies a row at once.
        self._table: npt.NDArray[Any] = (signs() * np.float32(step)).view("V32").reshape(-1)

    def next(self, elements: int) -> Vector:
        bits = read_bits(self._generator, elements)
        # Every byte is a valid row; any mode but "raise" lets numpy write into `out` without a buffer.
        np.take(self._table, bits, out=_scratch.values[: bits.size * 8].view("V32"), mode="clip")
        return _scratch.values[:elements]


class GaussianSteps:
    """step · z with z nearly N(0, 1), rounded to the lattice; for AdamW, which rounds later, not rounded.

    Each entry is made of one word: the sum of 48 fair bits, and of 16 more as a uniform number that fills the gaps
    between whole sums. Integers and one product, so that it is the same everywhere, which no normal with a logarithm
    or a cosine in it would be. Its distribution function is the normal's to 0.002.
    """

    largest = 8.0
    """|z| stays below."""

    _SCALE = np.float32(1.0 / (2**17 * math.sqrt(12.0 + 1.0 / 12.0)))
    """Scale of the sums, which are in units of 2^-17, to variance 1."""

    def __init__(
        self, seed: int, round_: int, direction_: int, index: int, step: float, start: int, g: float | None
    ) -> None:
        self._generator = philox(seed, round_, direction_, Stream.NORMALS, index, start // WORDS_PER_BLOCK)
        self._step, self._g = np.float32(step if g is None else step / g), None if g is None else np.float32(g)

    def next(self, elements: int) -> Vector:
        z = _scratch.values[:elements]
        for start in range(0, elements, SUMS):
            part = z[start : start + SUMS]
            np.multiply(self._sums(part.size), self._SCALE, out=part, casting="same_kind")
        z *= self._step
        if self._g is not None:
            np.rint(z, out=z)
            z *= self._g
        return z

    def _sums(self, elements: int) -> npt.NDArray[np.int32]:
        words = np.asarray(self._generator.random_raw(elements)).astype("<u8", copy=False)
        low, *high = words.view("<u2").reshape(-1, 4).T
        sums: npt.NDArray[np.int32] = low.astype(np.int32)
        for quarter in high:
            sums += np.take(ones(), quarter, mode="clip")
        sums <<= 1
        sums += 1 - (49 << 16)
        return sums


LARGEST_ENTRY: dict[Distribution, float] = {
    "rademacher": RademacherSteps.largest,
    "gaussian": GaussianSteps.largest,
}


def open_steps(
    distribution: Distribution,
    seed: int,
    round_: int,
    direction_: int,
    index: int,
    step: float,
    start: int,
    exponent: int | None,
) -> Steps:
    """Begin step · z of tensor `index` at element `start`, a multiple of CHUNK; on the lattice 2^exponent if given.

    Rademacher entries are on the lattice because their step is.
    """
    if distribution == "rademacher":
        return RademacherSteps(seed, round_, direction_, index, step, start)
    g = None if exponent is None else spacing(exponent)
    return GaussianSteps(seed, round_, direction_, index, step, start, g)


class _Scratch(threading.local):
    """Memory of each thread's own for the entries under way: threads share the passes over the weights."""

    def __init__(self) -> None:
        self.values = np.empty(WORK, np.float32)


_scratch = _Scratch()
