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
from hosl_protocol.arithmetic.rotation import GradientLayout
from hosl_protocol.run.settings import ClientOptimizer, RunSettings
from hosl_protocol.run.updates import UpdateShape
from hosl_protocol.weights.client_weights import ClientWeights
from hosl_protocol.weights.estimates import UpdateRecord

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
    sample = list(_first_of(sizes, SEGMENT * threads))
    if not sample or (settings is not None and not settings.traits.trains_client):
        return 0.0

    tensors = [LatticeTensor(f"t{index}", index, np.zeros(size, np.float32), -24) for index, size in enumerate(sample)]
    bits = settings.gradient_bits if settings is not None and settings.traits.sends_gradient else None
    weights = ClientWeights(
        tensors,
        seed=1,
        probe_step=1e-3 if bits is None else None,
        optimizer=optimizer,
        distribution=settings.distribution if settings is not None else "rademacher",
        gradient_bits=bits,
        threads=threads,
    )
    if bits is None:
        shape = UpdateShape(coefficients=settings.directions if settings is not None else 2)
        # A direction goes through all tensors, of which the sample is a part.
        share = sum(sizes) / sum(sample)
    else:
        layout = GradientLayout(sample, bits)
        shape = UpdateShape(coefficients=layout.scales, codes=layout.codes)
        share = 1.0

    # Where rounds share no pass a few tell as much.
    shares_passes = optimizer.optimizer == "sgd" and bits is None
    rounds = max(1, RATED_COEFFICIENTS // shape.coefficients) if shares_passes else 4
    seconds = min(_time(weights, rounds, shape) for _ in range(2))
    weights.close()
    return seconds / (rounds * shape.coefficients) * share


def _time(weights: ClientWeights, rounds: int, shape: UpdateShape) -> float:
    first, coefficients = weights.applied_round + 1, np.full(shape.coefficients, 2.0**-20, np.float32)
    codes = np.zeros(shape.codes, np.uint8)
    updates = [UpdateRecord(round_, coefficients, 2.0**-20, codes) for round_ in range(first, first + rounds)]
    began = time.monotonic()
    weights.apply(updates)
    return time.monotonic() - began


def _first_of(sizes: Sequence[int], limit: int) -> Iterator[int]:
    """Yield sizes from the start, `limit` elements at most in all."""
    for size in sizes:
        if size and limit:
            yield min(size, limit)
            limit -= min(size, limit)
