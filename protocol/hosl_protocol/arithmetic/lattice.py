"""The lattice: every trainable tensor holds multiples of g = 2^e, so that sums of steps are exact in float32.

Specification: protocol/README.md, section "Lattice".
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hosl_protocol.exceptions import SettingsError

SIGNIFICAND_BITS = 24  # float32 holds every integer up to 2^24
MIN_EXPONENT = -SIGNIFICAND_BITS
"""The exact range always holds ±1."""
MAX_EXPONENT = 127 - SIGNIFICAND_BITS
"""The end of the exact range is a float32 number."""


def exponent_for(largest: float) -> int:
    """Find the smallest e for which 2·`largest`, and at least ±1, is at most 2^24 · 2^e."""
    if not math.isfinite(largest):
        raise SettingsError("weight", largest, "a trainable tensor holds a value that is not finite")
    # frexp gives 0.5 to 1, not 1 inclusive: an exact power of two needs one bit less.
    fraction, power = math.frexp(max(2.0 * largest, 1.0))
    return (power - 1 if fraction == 0.5 else power) - SIGNIFICAND_BITS


def spacing(exponent: int) -> float:
    """Return g = 2^e."""
    return math.ldexp(1.0, exponent)


def limit(exponent: int) -> float:
    """Return the end of the exact range, 2^24 · g: up to it all multiples of g are float32 numbers."""
    return math.ldexp(1.0, exponent + SIGNIFICAND_BITS)


def round_to_lattice(values: npt.NDArray[np.float32], exponent: int) -> npt.NDArray[np.float32]:
    """Round `values` to the nearest multiple of 2^e (ties to even); a new array of the same shape."""
    g = np.float32(spacing(exponent))
    rounded = np.rint(values / g) * g
    rounded += np.float32(0.0)  # -0.0 becomes +0.0: a probe would turn it, and perturb and restore would differ
    return np.asarray(rounded, dtype=np.float32)


def is_on_lattice(values: npt.NDArray[np.float32], exponent: int) -> bool:
    """Tell whether every value is a multiple of 2^e inside the exact range, and every zero +0.0."""
    if not values.size:
        return True
    # Division by a power of two is exact, so that rounding tells a multiple from what is none.
    scaled = values / np.float32(spacing(exponent))
    is_multiple = np.all(np.rint(scaled) == scaled) and np.max(np.abs(values)) <= limit(exponent)
    return bool(is_multiple and not np.any(np.signbit(values) & (values == 0.0)))


def round_probe_step(step: float, exponent: int, tensor: str) -> float:
    """Round the probe step ε to what the tensor takes: ε_t, a multiple of g. Raises SettingsError where that is 0."""
    g = spacing(exponent)
    rounded = round(step / g) * g
    if rounded == 0.0:
        raise SettingsError("probe_step", step, f"it rounds to 0 on the lattice of {tensor}; use at least {g:.3g}")
    return rounded


def round_stochastically(
    steps: npt.ArrayLike, exponents: npt.ArrayLike, uniforms: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Round each step to a multiple of its g, up with probability equal to the remainder; `uniforms` in [0, 1)."""
    scaled = np.ldexp(np.asarray(steps, np.float64), -np.asarray(exponents, np.intc))
    below = np.floor(scaled)
    return np.asarray(np.ldexp(below + (np.asarray(uniforms) < scaled - below), exponents))
