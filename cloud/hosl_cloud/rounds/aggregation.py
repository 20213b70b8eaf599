"""Averages over devices: weighted mean, trimmed mean or median of the scalars that a round's devices sent.

Shapes: K devices, P directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hosl_cloud.settings import Aggregation

Doubles: TypeAlias = npt.NDArray[np.float64]


def aggregate(
    values: Mapping[str, Doubles],
    weights: Mapping[str, float],
    kind: Aggregation,
    *,
    trim: float = 0.0,
    clip: float = 0.0,
) -> Doubles:
    """Average the devices' v [P] to v̄ [P], each number by itself; one that a device lacks is NaN, zero where all do.

    `clip` above 0 first limits a number to `clip` times the median magnitude of its direction; `trim` is the share of
    devices that a trimmed mean drops at either end. The order of `values` does not matter for the result's bits.
    """
    names = sorted(values)  # and fsum below: the sum's bits depend on neither order nor rounding on the way

    v_KP = np.stack([values[name] for name in names])
    w_K = np.array([weights[name] for name in names])
    return np.array([_aggregate_one(v_K, w_K, kind, trim, clip) for v_K in v_KP.T])


def _aggregate_one(v_K: Doubles, w_K: Doubles, kind: Aggregation, trim: float, clip: float) -> float:
    is_there = np.isfinite(v_K)
    v_K, w_K = v_K[is_there], w_K[is_there]
    if not v_K.size:
        return 0.0

    if clip > 0.0:
        limit = clip * float(np.median(np.abs(v_K)))
        v_K = np.clip(v_K, -limit, limit)

    order = np.argsort(v_K, kind="stable")
    if kind == "median":
        return _weighted_median(v_K[order], w_K[order])
    if kind == "trimmed-mean":
        drop = math.floor(trim * v_K.size)
        order = order[drop : v_K.size - drop]
    return math.fsum(v_K[order] * w_K[order]) / math.fsum(w_K[order])


def _weighted_median(v_K: Doubles, w_K: Doubles) -> float:
    """Find where half of the weight is reached: half way between two numbers where exactly between them."""
    share_K = np.cumsum(w_K) / w_K.sum()
    low = int(np.searchsorted(share_K, 0.5 - 1e-12))
    is_between = abs(float(share_K[low]) - 0.5) < 1e-12 and low + 1 < v_K.size
    return float(v_K[low] + v_K[low + 1]) / 2.0 if is_between else float(v_K[low])
