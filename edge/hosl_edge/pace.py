"""How fast this device catches up: by replaying coefficients, and by downloading. The cloud weighs the two."""

from __future__ import annotations

import math
import time
from pathlib import Path

import msgspec
import numpy as np

from hosl_protocol import ClientOptimizer, ClientWeights, LatticeTensor, Manifest, RunSettings, UpdateRecord
from hosl_protocol.perturbation import SEGMENT, TERMS_PER_PASS

FILE = "pace.json"

RATED_COEFFICIENTS = TERMS_PER_PASS
"""A replay of fewer takes no whole pass, and says little about a long one."""


class Pace(msgspec.Struct):
    """What the device tells in its Hello; 0 where it does not know."""

    replay_s: float = 0.0
    """Seconds for one coefficient of an update."""
    link_bytes_per_s: float = 0.0


def load_link(folder: Path) -> float:
    """The speed of the last download, as `save_link` kept it; 0 where it did not."""
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Pace).link_bytes_per_s
    except (OSError, msgspec.DecodeError):
        return 0.0


def save_link(folder: Path, link_bytes_per_s: float) -> None:
    """Keep it across restarts."""
    new = (folder / FILE).with_suffix(".new")
    new.write_bytes(msgspec.json.encode({"link_bytes_per_s": link_bytes_per_s}))
    new.replace(folder / FILE)


def measure_replay_s(manifest: Manifest, settings: RunSettings | None, threads: int) -> float:
    """Seconds for one coefficient, by timing one pass over zeros of the shard's proportions; 0 where none trains.

    Before the first Welcome the run is unknown: plain SGD with signs stands in for it.
    """
    optimizer = settings.client if settings is not None else ClientOptimizer()
    directions = settings.coefficients if settings is not None else 2
    sizes = [math.prod(entry.shape) for entry in manifest.trainable]
    elements = sum(sizes)
    if not elements or not directions:
        return 0.0
    share = min(1.0, SEGMENT * threads / elements)
    weights = ClientWeights(
        [
            LatticeTensor(f"scratch{index}", index, np.zeros(math.ceil(size * share) + 1, np.float32), -24)
            for index, size in enumerate(sizes)
        ],
        seed=1,
        probe_step=1e-3,
        optimizer=optimizer,
        distribution=settings.distribution if settings is not None else "rademacher",
        threads=threads,
    )
    # AdamW's rounds share no pass, so that a few tell as much.
    rounds = max(1, RATED_COEFFICIENTS // directions) if optimizer.optimizer == "sgd" else 4
    coefficients = np.full(directions, 2.0**-20, np.float32)
    updates = [UpdateRecord(round_, coefficients, 2.0**-20) for round_ in range(1, rounds + 1)]
    began = time.monotonic()
    weights.apply(updates)
    elapsed = time.monotonic() - began
    weights.close()
    return elapsed / (rounds * directions) / share
