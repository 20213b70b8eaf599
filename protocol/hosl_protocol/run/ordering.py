"""Who takes part and which examples come next: pure functions of (seed, round, device)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hosl_protocol.arithmetic.directions import Stream, philox


def batch_indices(seed: int, round_: int, device: str, examples: int, batch_size: int) -> npt.NDArray[np.int64]:
    """Choose the indices [batch_size] of the examples that `device` uses in `round_` (from 1).

    Passes over the data follow each other without a gap; each pass has its own order.
    """
    # No state but the round's number: a device that was away goes on in the middle of a pass.
    first = (round_ - 1) * batch_size
    places = range(first, first + batch_size)
    return np.array([_order(seed, place // examples, device, examples)[place % examples] for place in places])


def sample_devices(seed: int, round_: int, devices: Sequence[str], count: int) -> list[str]:
    """Draw `count` of `devices` (all where 0), in the order of their names.

    A device's place in the draw is its own, so that one that is away changes nothing but its own turn.
    """
    names = sorted(devices)
    if not 0 < count < len(names):
        return names
    turns = dict(zip(names, _turns(seed, round_, names), strict=True))
    return sorted(sorted(names, key=lambda name: (turns[name], name))[:count])


def _turns(seed: int, round_: int, devices: Sequence[str]) -> list[int]:
    """Read the first word of each device's stream; to make a generator of each would take several times as long."""
    generator = philox(seed, round_, 0, Stream.SAMPLING)
    start: Any = generator.state
    turns = []
    for device in devices:
        # The counter's second word is the stream's index (directions.philox).
        start["state"]["counter"][1] = zlib.crc32(device.encode())
        generator.state = start
        turns.append(int(generator.random_raw()))
    return turns


@lru_cache(maxsize=4)
def _order(seed: int, pass_: int, device: str, examples: int) -> npt.NDArray[np.int64]:
    return _shuffled(philox(seed, pass_, 0, Stream.ORDER, zlib.crc32(device.encode())), examples)


def _shuffled(generator: np.random.Philox, count: int) -> npt.NDArray[np.int64]:
    """Order 0..count-1 by `count` random words; needs nothing of numpy but the words."""
    return np.argsort(np.asarray(generator.random_raw(count)), kind="stable")
