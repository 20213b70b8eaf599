"""AdamW on the client, in float32 with separate multiply and add and its steps rounded to the lattice.

The same bits on every machine; updates replay in order. Specification: protocol/README.md, section "Updates".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hosl_protocol.arithmetic import lattice
from hosl_protocol.arithmetic.directions import CHUNK, Vector
from hosl_protocol.arithmetic.perturbation import LatticeTensor
from hosl_protocol.run.settings import ClientOptimizer
from hosl_protocol.weights.estimates import Estimate
from hosl_protocol.weights.state import Moments

LARGEST_ESTIMATE = 1e15
"""Largest magnitude of an estimate; the square of one much larger would leave float32."""


@dataclass(frozen=True)
class BiasCorrections:
    """What depends on the number of steps alone: the bias corrections of both moments, and the bound's sum."""

    steps: int = 0
    power1: float = 1.0
    """β1^steps."""
    power2: float = 1.0
    """β2^steps."""
    series: float = 0.0
    """1 + a + a² + ... with a = β1²/β2, a term for each step."""

    def advance(self, settings: ClientOptimizer) -> BiasCorrections:
        """Return those of the next step."""
        return BiasCorrections(
            self.steps + 1,
            self.power1 * settings.beta1,
            self.power2 * settings.beta2,
            1.0 + self.series * (settings.beta1 * settings.beta1) / settings.beta2,
        )


class AdamW:
    """The moments of all trainable tensors, and how many steps they have seen."""

    def __init__(self, tensors: Sequence[LatticeTensor], settings: ClientOptimizer) -> None:
        self._settings = settings
        self._corrections = BiasCorrections()
        self._first = [np.zeros_like(tensor.values) for tensor in tensors]
        self._second = [np.zeros_like(tensor.values) for tensor in tensors]
        self._gradient = np.empty(CHUNK, np.float32)
        self._scratch = np.empty(CHUNK, np.float32)

    def growths(self, bounds: Sequence[float], tensors: Sequence[LatticeTensor], rate: float) -> list[float]:
        """Bound how far the next step can move a weight of each tensor, of a magnitude up to its bound.

        |m̂| / √v̂ is at most S by Cauchy and Schwarz: S² = (1-β1)²/(1-β2) · (1-β2^t)/(1-β1^t)² · Σ_{k<t} (β1²/β2)^k.
        Where squares underflow and v̂ says nothing, epsilon keeps the quotient below S (settings.MIN_EPSILON). Every
        machine compares the same bits with the range, so the order of operations counts.
        """
        settings, next_step = self._settings, self._corrections.advance(self._settings)
        first, power1 = 1.0 - settings.beta1, 1.0 - next_step.power1

        corrections = (1.0 - next_step.power2) / (power1 * power1)
        ratio = math.sqrt((first * first) / (1.0 - settings.beta2) * corrections * next_step.series)

        # A thousandth more for float32's roundings on the way.
        return [
            rate * (ratio + settings.weight_decay * bound) * 1.001 + lattice.spacing(tensor.exponent)
            for bound, tensor in zip(bounds, tensors, strict=True)
        ]

    def step(self, tensors: Sequence[LatticeTensor], estimate: Estimate, rate: float) -> None:
        """θ ← θ - rate · (m̂ / (√v̂ + epsilon) + weight_decay · θ). The caller keeps θ inside the exact range."""
        self._corrections = self._corrections.advance(self._settings)
        for tensor in tensors:
            for start in range(0, tensor.values.size, CHUNK):
                stop = min(start + CHUNK, tensor.values.size)
                gradient = self._gradient[: stop - start]
                estimate.fill(tensor, start, gradient)
                self._step_chunk(tensor, slice(start, stop), gradient, rate)

    def _step_chunk(self, tensor: LatticeTensor, chunk: slice, gradient: Vector, rate: float) -> None:
        first, second = self._first[tensor.index][chunk], self._second[tensor.index][chunk]
        step = self._scratch[: gradient.size]
        f32, settings, values = np.float32, self._settings, tensor.values[chunk]
        # One operation at a time, in float32, in this order: fused or reordered, another machine has other bits.
        first *= f32(settings.beta1)
        np.multiply(gradient, f32(1.0 - settings.beta1), out=step)
        first += step
        second *= f32(settings.beta2)
        np.multiply(gradient, gradient, out=step)
        step *= f32(1.0 - settings.beta2)
        second += step

        np.divide(second, f32(1.0 - self._corrections.power2), out=step)
        np.sqrt(step, out=step)
        step += f32(settings.epsilon)
        np.divide(first, f32(1.0 - self._corrections.power1), out=gradient)
        np.divide(gradient, step, out=step)
        if settings.weight_decay:
            np.multiply(values, f32(settings.weight_decay), out=gradient)
            step += gradient
        step *= f32(rate)
        g = f32(lattice.spacing(tensor.exponent))
        np.divide(step, g, out=step)
        np.rint(step, out=step)
        step *= g
        values -= step

    def state(self, tensors: Sequence[LatticeTensor]) -> Moments:
        """Return step count and moments, shared."""
        names = [tensor.name for tensor in tensors]
        first, second = (dict(zip(names, moments, strict=True)) for moments in (self._first, self._second))
        return Moments(self._corrections.steps, first, second)

    def load_state(self, tensors: Sequence[LatticeTensor], state: Moments) -> None:
        """Continue from what `state` gave; the corrections are made anew, by the same products in the same order."""
        self._corrections = BiasCorrections()
        # Step by step, for a power would round otherwise than the products that a device made.
        for _ in range(state.steps):
            self._corrections = self._corrections.advance(self._settings)
        for tensor in tensors:
            self._first[tensor.index][:] = state.first[tensor.name]
            self._second[tensor.index][:] = state.second[tensor.name]
