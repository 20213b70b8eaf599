"""Directions: Rademacher signs from Philox4x64-10, addressable by (seed, round, direction, tensor, chunk).

A byte of random bits indexes a 256 x 8 table of signed steps, so that eight entries cost one look-up.
Specification with golden vectors: protocol/README.md, section "Directions".
"""

from __future__ import annotations

import enum
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hosl_protocol.exceptions import SettingsError

RNG_VERSION = 1

CHUNK = 64 * 1024
"""Elements in a chunk: its bits (8 KiB) and its values (256 KiB) stay in a core's cache."""

BITS_PER_BLOCK = 256
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


def philox(seed: int, round_: int, direction: int, stream: Stream, index: int = 0, block: int = 0) -> np.random.Philox:
    """The generator whose first four words are block `block` of (seed, round, direction, stream, index)."""
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
    """`count` numbers in [0, 1), each the top 53 bits of one word."""
    words = philox(seed, round_, direction, stream).random_raw(count)
    return np.asarray((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


@lru_cache(maxsize=1)
def signs() -> npt.NDArray[np.float32]:
    """The 256 x 8 table of signs: row b holds +1 where bit j of b (least significant first) is set, else -1."""
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    table = np.where(bits, 1, -1).astype(np.float32)
    table.flags.writeable = False
    return table


def read_bits(generator: np.random.Philox, elements: int) -> npt.NDArray[np.uint8]:
    """The next ceil(elements / 8) bytes of sign bits; consumes whole words (little-endian)."""
    words = np.asarray(generator.random_raw((elements + 63) // 64)).astype("<u8", copy=False)
    return words.view(np.uint8)[: (elements + 7) // 8]


def direction(seed: int, round_: int, direction_: int, index: int, elements: int) -> npt.NDArray[np.float32]:
    """One tensor's whole direction as ±1 [elements]: the plain reading of the recipe, for tests and tools."""
    generator = philox(seed, round_, direction_, Stream.SIGNS, index)
    return np.asarray(np.take(signs(), read_bits(generator, elements), axis=0).reshape(-1)[:elements])
