"""Averages over devices: weighted mean, trimmed mean or median of the numbers that a round's devices sent.

`aggregate` is for a few numbers, of which some may be missing; `average_rows` for whole chunks of gradients.

Shapes: K devices, P directions, N entries of a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hosl_cloud.settings import Aggregation

Doubles: TypeAlias = npt.NDArray[np.float64]
Floats: TypeAlias = npt.NDArray[np.float32]


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


def average_rows(v_KN: Floats, w_K: Doubles, kind: Aggregation, trim: float) -> Doubles:
    """Average the rows v_KN, one device each, to [N], each entry by itself; `v_KN` is sorted on the way.

    The same numbers as `aggregate` gives, but for the last bits of its sums.
    """
    devices = len(v_KN)
    is_equal = bool(np.all(w_K == w_K[0]))
    if is_equal:
        v_KN.sort(axis=0)
        if kind == "median":
            middle_N: Doubles = (v_KN[(devices - 1) // 2].astype(np.float64) + v_KN[devices // 2]) / 2.0
            return middle_N
    else:
        order_KN = np.argsort(v_KN, axis=0, kind="stable")
        v_KN[:] = np.take_along_axis(v_KN, order_KN, axis=0)
        if kind == "median":
            return _weighted_medians(v_KN, w_K[order_KN])

    drop = math.floor(trim * devices) if kind == "trimmed-mean" else 0
    total_N, weight_N = np.zeros(v_KN.shape[1]), np.zeros(v_KN.shape[1])
    # Row by row: the order in which float64 rounds is the values' own.
    for row in range(drop, devices - drop):
        w_N = w_K[row] if is_equal else w_K[order_KN[row]]
        total_N += w_N * v_KN[row]
        weight_N += w_N
    return total_N / weight_N


def _weighted_medians(v_KN: Floats, w_KN: Doubles) -> Doubles:
    """As `_weighted_median`, of every column of sorted values and their weights."""
    share_KN = np.cumsum(w_KN, axis=0)
    share_KN /= share_KN[-1]
    low_N = np.argmax(share_KN >= 0.5 - 1e-12, axis=0)[None]
    high_N = np.minimum(low_N + 1, len(v_KN) - 1)
    is_between_N = np.abs(np.take_along_axis(share_KN, low_N, axis=0) - 0.5) < 1e-12
    low, high = (np.take_along_axis(v_KN, place_N, axis=0).astype(np.float64) for place_N in (low_N, high_N))
    medians: Doubles = np.where(is_between_N, (low + high) / 2.0, low)[0]
    return medians
