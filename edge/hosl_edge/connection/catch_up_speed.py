"""How fast this device catches up: by replaying coefficients, and by downloading a snapshot. The cloud weighs the two.

The link's speed survives restarts in `pace.json` of the state folder; that of replays is measured anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from hosl_protocol.arithmetic.perturbation import SEGMENT, TERMS_PER_PASS, LatticeTensor
from hosl_protocol.run.settings import ClientOptimizer, RunSettings
from hosl_protocol.weights.client_weights import ClientWeights, UpdateRecord

FILE = "pace.json"

RATED_COEFFICIENTS = TERMS_PER_PASS
"""A replay of fewer takes no whole pass, and says little about a long one."""


class CatchUpSpeed(msgspec.Struct):
    """What the device tells of itself in its Hello; 0 where it does not know."""

    replay_s: float = 0.0
    """Seconds for one coefficient of an update."""
    link_bytes_per_s: float = 0.0


# Made here, on import: threads that use a type for the first time at once crash msgspec.
_DECODER = msgspec.json.Decoder(CatchUpSpeed)


def load_link(folder: Path) -> float:
    """Read the speed of the last download, bytes a second, as `save_link` kept it; 0 where it did not."""
    try:
        return _DECODER.decode((folder / FILE).read_bytes()).link_bytes_per_s
    except (OSError, msgspec.DecodeError):
        return 0.0


def save_link(folder: Path, link_bytes_per_s: float) -> None:
    """Keep the speed of a download across restarts."""
    new = (folder / FILE).with_suffix(".new")
    new.write_bytes(msgspec.json.encode({"link_bytes_per_s": link_bytes_per_s}))
    new.replace(folder / FILE)


def measure_replay_s(sizes: Sequence[int], settings: RunSettings | None, threads: int) -> float:
    """Measure the seconds for one coefficient of tensors of these sizes: it times a pass over zeros like the first.

    Returns 0 where nothing trains. Before the first Welcome the run is unknown: plain SGD with signs stands in for it.
    """
    optimizer = settings.client if settings is not None else ClientOptimizer()
    directions = settings.coefficients if settings is not None else 2
    sample = list(_first_of(sizes, SEGMENT * threads))
    if not sample or not directions:
        return 0.0

    tensors = [LatticeTensor(f"t{index}", index, np.zeros(size, np.float32), -24) for index, size in enumerate(sample)]
    distribution = settings.distribution if settings is not None else "rademacher"
    weights = ClientWeights(
        tensors, seed=1, probe_step=1e-3, optimizer=optimizer, distribution=distribution, threads=threads
    )

    # AdamW's rounds share no pass, so that a few tell as much.
    rounds = max(1, RATED_COEFFICIENTS // directions) if optimizer.optimizer == "sgd" else 4
    seconds = min(_time(weights, rounds, directions) for _ in range(2))
    weights.close()
    return seconds / (rounds * directions) * sum(sizes) / sum(sample)


def _time(weights: ClientWeights, rounds: int, directions: int) -> float:
    first, coefficients = weights.applied_round + 1, np.full(directions, 2.0**-20, np.float32)
    updates = [UpdateRecord(round_, coefficients, 2.0**-20) for round_ in range(first, first + rounds)]
    began = time.monotonic()
    weights.apply(updates)
    return time.monotonic() - began


def _first_of(sizes: Sequence[int], limit: int) -> Iterator[int]:
    """Yield sizes from the start, `limit` elements at most in all."""
    for size in sizes:
        if size and limit:
            yield min(size, limit)
            limit -= min(size, limit)
