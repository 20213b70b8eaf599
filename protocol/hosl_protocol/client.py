"""The client's trainable weights: probes in place, updates from scalars, and the digest that proves them equal.

The device holds one over its memory-mapped shard; the cloud holds a mirror; merge replays one from the base.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hosl_protocol import lattice
from hosl_protocol.directions import CHUNK, Stream, uniforms
from hosl_protocol.exceptions import HoslError, LatticeError, SettingsError
from hosl_protocol.manifest import Manifest
from hosl_protocol.perturbation import LatticeTensor, Term, Vector, add_directions, estimate
from hosl_protocol.settings import ClientOptimizer, RunSettings

THREADED_ABOVE = 1 << 20
"""Elements from which threads pay."""


@dataclass(frozen=True)
class UpdateRecord:
    """What one round does to the client's weights."""

    round: int
    coefficients: npt.NDArray[np.float32]
    """[P]; SGD: θ ← θ + Σ coefficient·z; AdamW: the gradient estimate is Σ coefficient·z."""
    learning_rate: float
    """AdamW's rate this round; SGD's is already in the coefficients."""


@dataclass(frozen=True)
class ProbePoint:
    """Where a probe stands: θ + sign·ε·z(round, direction)."""

    round: int
    direction: int
    sign: int


class ClientWeights:
    """Trainable tensors with their optimizer state at `applied_round`."""

    def __init__(
        self,
        tensors: Sequence[LatticeTensor],
        *,
        seed: int,
        probe_step: float,
        optimizer: ClientOptimizer,
        threads: int = 1,
    ) -> None:
        self.tensors = tuple(tensors)
        self.seed = seed
        self.optimizer = optimizer
        self.applied_round = 0
        self._probe_steps = [lattice.round_probe_step(probe_step, t.exponent, t.name) for t in self.tensors]
        for tensor, step in zip(self.tensors, self._probe_steps, strict=True):
            if step > lattice.limit(tensor.exponent) / 2:
                remedy = (
                    f"weights of {tensor.name} are exact only for steps up to {lattice.limit(tensor.exponent) / 2:.3g}"
                )
                raise SettingsError("probe_step", probe_step, remedy)
        self._corrections = [probe_step / step for step in self._probe_steps]
        # The exporter keeps 2·max|θ| inside the range, so the weights need not be read to know a bound.
        self._bounds = [lattice.limit(t.exponent) / 2 for t in self.tensors]
        self._point: ProbePoint | None = None
        self._adamw = _AdamW(self.tensors, optimizer, self._probe_steps) if optimizer.optimizer == "adamw" else None
        is_large = self.elements > THREADED_ABOVE and threads > 1
        self._executor = ThreadPoolExecutor(threads, "directions") if is_large else None

    @property
    def elements(self) -> int:
        """d_c, the number of trainable parameters."""
        return sum(tensor.values.size for tensor in self.tensors)

    def close(self) -> None:
        """Stop the threads."""
        if self._executor is not None:
            self._executor.shutdown()

    def probe(self, point: ProbePoint | None) -> None:
        """Move the weights to a probe point, or back to θ (None); one pass, whatever point they stand at."""
        terms = []
        if self._point is not None:
            terms.append(self._probe_term(self._point, -1))
        if point is not None:
            terms.append(self._probe_term(point, +1))
        if self._point != point:
            add_directions(self.tensors, terms, self.seed, self._executor)
        self._point = point

    def _probe_term(self, point: ProbePoint, factor: int) -> Term:
        steps = [factor * point.sign * step for step in self._probe_steps]
        return Term(point.round, point.direction, steps)

    def apply(self, updates: Sequence[UpdateRecord]) -> None:
        """Apply the updates of consecutive rounds; SGD adds as many in one pass as the exact range surely holds.

        Raises LatticeError: with SGD the weights then stand at `applied_round`, with AdamW between two rounds.
        """
        self.probe(None)
        for expected, update in enumerate(updates, self.applied_round + 1):
            if update.round != expected:
                raise HoslError(f"update of round {update.round}, expected round {expected}")
            if not (np.isfinite(update.coefficients).all() and math.isfinite(update.learning_rate)):
                raise HoslError(f"update of round {update.round} holds a number that is not finite")
        if self._adamw is None:
            self._add(updates, +1)
            return
        for update in updates:
            self._adamw.step(self._estimate_terms(update), self.seed, update.learning_rate)
            self.applied_round = update.round

    def revert(self, updates: Sequence[UpdateRecord]) -> None:
        """Take back the newest updates (SGD), given in ascending order: the same bits as before them."""
        if self._adamw is not None:
            raise HoslError("AdamW's updates cannot be taken back: replay from the base shard")
        self.probe(None)
        for expected, update in zip(range(self.applied_round, -1, -1), reversed(updates), strict=False):
            if update.round != expected:
                raise HoslError(f"take back of round {update.round}, expected round {expected}")
        self._add(updates[::-1], -1)

    def _add(self, updates: Sequence[UpdateRecord], sign: int) -> None:
        """θ ← θ + sign · updates. What one pass might not hold exactly goes in halves, down to single rounds."""
        terms = [term for update in updates for term in self._sgd_terms(update, sign)]
        try:
            self._guard(terms)
        except LatticeError:
            if len(updates) > 1:
                self._add(updates[: len(updates) // 2], sign)
                self._add(updates[len(updates) // 2 :], sign)
                return
            if sign > 0:
                raise
            # Taking one round back passes only sums that were inside the range when it was applied.
            self._bounds = [lattice.limit(tensor.exponent) for tensor in self.tensors]
        add_directions(self.tensors, terms, self.seed, self._executor)
        self.applied_round += sign * len(updates)

    def _guard(self, terms: Sequence[Term]) -> None:
        """Extend each tensor's bound on |θ|; where it would leave the exact range take the true maximum first."""
        growths = [sum(abs(term.steps[tensor.index]) for term in terms) for tensor in self.tensors]
        for tensor, growth, step in zip(self.tensors, growths, self._probe_steps, strict=True):
            limit = lattice.limit(tensor.exponent)
            if self._bounds[tensor.index] + growth + step > limit:
                self._bounds[tensor.index] = largest(tensor.values)
                if self._bounds[tensor.index] + growth + step > limit:
                    raise LatticeError(tensor.name, self._bounds[tensor.index] + growth + step, limit)
        self._bounds = [bound + growth for bound, growth in zip(self._bounds, growths, strict=True)]

    def _sgd_terms(self, update: UpdateRecord, sign: int = +1) -> list[Term]:
        terms = []
        for direction, coefficient in enumerate(update.coefficients.tolist()):
            chance = uniforms(self.seed, update.round, direction, Stream.ROUNDING, len(self.tensors))
            steps = [
                sign
                * lattice.round_stochastically(coefficient * correction, tensor.exponent, float(chance[tensor.index]))
                for tensor, correction in zip(self.tensors, self._corrections, strict=True)
            ]
            terms.append(Term(update.round, direction, steps))
        return terms

    def _estimate_terms(self, update: UpdateRecord) -> list[Term]:
        return [
            Term(update.round, direction, [coefficient * correction for correction in self._corrections])
            for direction, coefficient in enumerate(update.coefficients.tolist())
        ]

    def resolution(self, update: UpdateRecord) -> float:
        """The smallest |c|/g of an SGD update; below 1 a step survives rounding only in expectation."""
        coefficients = [abs(value) for value in update.coefficients.tolist() if value]
        if self._adamw is not None or not coefficients or not self.tensors:
            return math.inf
        coarsest = max(
            lattice.spacing(tensor.exponent) / correction
            for tensor, correction in zip(self.tensors, self._corrections, strict=True)
        )
        return float(min(coefficients) / coarsest)

    def digest(self) -> str:
        """SHA-256 of the trainable tensors in order, little-endian, then AdamW's step count and moments."""
        self.probe(None)
        digest = hashlib.sha256()
        for tensor in self.tensors:
            digest.update(tensor.values.data.cast("B"))
        if self._adamw is not None:
            self._adamw.update_digest(digest)
        return digest.hexdigest()


class _AdamW:
    """AdamW in float32 with separate multiply and add, its steps rounded to the lattice; the same bits everywhere."""

    def __init__(
        self, tensors: Sequence[LatticeTensor], settings: ClientOptimizer, probe_steps: Sequence[float]
    ) -> None:
        self._tensors, self._settings, self._probe_steps = tensors, settings, probe_steps
        self._steps = 0
        self._power1 = self._power2 = 1.0
        self._first = [np.zeros_like(tensor.values) for tensor in tensors]
        self._second = [np.zeros_like(tensor.values) for tensor in tensors]
        self._gradient = np.empty(CHUNK, np.float32)
        self._scratch = np.empty(CHUNK, np.float32)

    def step(self, terms: Sequence[Term], seed: int, rate: float) -> None:
        self._steps += 1
        self._power1 *= self._settings.beta1
        self._power2 *= self._settings.beta2
        for tensor in self._tensors:
            for start in range(0, tensor.values.size, CHUNK):
                stop = min(start + CHUNK, tensor.values.size)
                gradient = self._gradient[: stop - start]
                estimate(tensor, start, stop, terms, seed, gradient)
                self._step_chunk(tensor, slice(start, stop), gradient, rate)

    def _step_chunk(self, tensor: LatticeTensor, chunk: slice, gradient: Vector, rate: float) -> None:
        first, second = self._first[tensor.index][chunk], self._second[tensor.index][chunk]
        step = self._scratch[: gradient.size]
        f32, settings, values = np.float32, self._settings, tensor.values[chunk]
        first *= f32(settings.beta1)
        np.multiply(gradient, f32(1.0 - settings.beta1), out=step)
        first += step
        second *= f32(settings.beta2)
        np.multiply(gradient, gradient, out=step)
        step *= f32(1.0 - settings.beta2)
        second += step

        np.divide(second, f32(1.0 - self._power2), out=step)
        np.sqrt(step, out=step)
        step += f32(settings.epsilon)
        np.divide(first, f32(1.0 - self._power1), out=gradient)
        np.divide(gradient, step, out=step)
        if settings.weight_decay:
            np.multiply(values, f32(settings.weight_decay), out=gradient)
            step += gradient
        step *= f32(rate)
        g = f32(lattice.spacing(tensor.exponent))
        np.divide(step, g, out=step)
        np.rint(step, out=step)
        step *= g
        reach = largest(values) + largest(step) + self._probe_steps[tensor.index]
        if not reach <= lattice.limit(tensor.exponent):
            raise LatticeError(tensor.name, reach, lattice.limit(tensor.exponent))
        values -= step

    def update_digest(self, digest: Any) -> None:
        digest.update(self._steps.to_bytes(8, "little"))
        for moment in (*self._first, *self._second):
            digest.update(moment.data.cast("B"))


def largest(values: Vector) -> float:
    """max|θ| without a second copy."""
    return max(float(values.max()), -float(values.min())) if values.size else 0.0


def make_client_weights(
    manifest: Manifest, tensors: dict[str, npt.NDArray[np.float32]], settings: RunSettings, threads: int = 1
) -> ClientWeights:
    """The client's weights over `tensors` (by name, changed in place); empty where the run freezes the client."""
    entries = () if settings.algorithm == "frozen" else manifest.trainable
    flat = []
    for index, entry in enumerate(entries):
        view = tensors[entry.name].reshape(-1)
        assert entry.exponent is not None
        assert np.shares_memory(view, tensors[entry.name])
        flat.append(LatticeTensor(entry.name, index, view, entry.exponent))
    return ClientWeights(
        flat,
        seed=settings.seed,
        probe_step=settings.probe_step,
        optimizer=settings.client,
        threads=threads,
    )
