"""The exact range of each trainable tensor: known bounds on its weights, and the move to a coarser lattice.

What must always hold: every weight is a multiple of its tensor's g inside the exact range (`lattice.limit`), at θ and
at any probe. To know it without reading the weights, a bound on each tensor's largest magnitude goes along: before an
update is added, `tighten_to_fit` asks whether bound, update and probe stay inside; where they might not, the bound
becomes the true maximum, and where even that would leave the range `coarsen` moves the tensor to a coarser lattice.
ClientWeights owns one, and calls it from one thread at a time. Specification: protocol/README.md, sections "Lattice"
and "Updates".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hosl_protocol.arithmetic import lattice
from hosl_protocol.arithmetic.directions import CHUNK, Vector
from hosl_protocol.arithmetic.perturbation import LatticeTensor
from hosl_protocol.exceptions import LatticeError, SettingsError

MAX_COARSENING = 8
"""Bits by which a run may make a tensor's lattice coarser; weights that outgrow even that have diverged."""


@dataclass(frozen=True)
class Coarsening:
    """A re-lattice event: the tensor moved to a coarser lattice just before the update of `round`."""

    round: int
    tensor: str
    exponent: int
    """The new one."""

    @property
    def spacing(self) -> float:
        """The new g."""
        return lattice.spacing(self.exponent)


class ExactRange:
    """Trainable tensors on their lattices, bounds on their weights, and the room that a probe needs."""

    def __init__(self, tensors: Sequence[LatticeTensor], probe_step: float | None, largest_entry: float) -> None:
        """`probe_step` is None where the run makes no probes; `largest_entry` is that of a direction.

        Raises SettingsError where a probe cannot be exact.
        """
        self.tensors = list(tensors)
        self.coarsenings: list[Coarsening] = []
        """Re-lattice events so far, in order."""
        self._probe_step = probe_step
        self._largest_entry = largest_entry
        # From here a lattice may become MAX_COARSENING bits coarser.
        self._finest = [tensor.exponent for tensor in self.tensors]

        self.probe_steps = [self._round_probe_step(tensor.exponent, tensor.name) for tensor in self.tensors]
        """ε_t of each tensor; 0 where the run makes no probes."""
        for tensor, step in zip(self.tensors, self.probe_steps, strict=True):
            longest = lattice.limit(tensor.exponent) / 2 / self._largest_entry
            if step > longest:
                remedy = f"weights of {tensor.name} are exact only for steps up to {longest:.3g}"
                raise SettingsError("probe_step", probe_step, remedy)

        # The exporter keeps 2·max|θ| inside the range, so the weights need not be read to know a bound.
        self.bounds = [lattice.limit(tensor.exponent) / 2 for tensor in self.tensors]
        """Of each tensor's magnitudes: none is larger."""

    def _round_probe_step(self, exponent: int, tensor: str) -> float:
        return 0.0 if self._probe_step is None else lattice.round_probe_step(self._probe_step, exponent, tensor)

    def correction(self, index: int) -> float:
        """Return the factor on a coefficient for a probe that moved by ε_t where ε was meant."""
        assert self._probe_step is not None
        return self._probe_step / self.probe_steps[index]

    def allows(self, tensor: LatticeTensor, exponent: int) -> bool:
        """Whether a run may have this tensor on the lattice with this exponent."""
        finest = self._finest[tensor.index]
        return finest <= exponent <= finest + MAX_COARSENING

    def _reach(self, index: int, growth: float) -> float:
        """Bound the largest magnitude that a probe can meet after the tensor has grown."""
        return self.bounds[index] + growth + self._largest_entry * self.probe_steps[index]

    def tighten_to_fit(self, growths: Sequence[float]) -> bool:
        """Tell whether every tensor stays inside its exact range; a bound that is too loose is set to the maximum."""
        is_inside = True
        for tensor, growth in zip(self.tensors, growths, strict=True):
            limit = lattice.limit(tensor.exponent)
            if not self._reach(tensor.index, growth) <= limit:
                self.bounds[tensor.index] = largest(tensor.values)
                is_inside &= self._reach(tensor.index, growth) <= limit
        return is_inside

    def grow(self, growths: Sequence[float]) -> None:
        """Note that the weights have moved by as much at most."""
        self.bounds = [bound + growth for bound, growth in zip(self.bounds, growths, strict=True)]

    def coarsen(self, growths: Sequence[float], round_: int) -> None:
        """Move tensors that would leave their range to a lattice on which they fit: the re-lattice event.

        It depends on the weights and on the update of `round_` alone, so that every machine does the same unasked.
        Raises LatticeError, and changes nothing, where a tensor has diverged.
        """
        # First all that may fail, then all that changes.
        exponents = {}
        for tensor, growth in zip(self.tensors, growths, strict=True):
            reach = self._reach(tensor.index, growth)
            if not reach <= lattice.limit(tensor.exponent):
                last = min(self._finest[tensor.index] + MAX_COARSENING, lattice.MAX_EXPONENT)
                if not reach <= lattice.limit(last) / 2:
                    raise LatticeError(tensor.name, reach, lattice.limit(last) / 2)
                exponents[tensor.index] = lattice.exponent_for(reach)
        steps = {
            index: self._round_probe_step(exponent, self.tensors[index].name) for index, exponent in exponents.items()
        }

        for index, exponent in exponents.items():
            tensor = self.tensors[index]
            # In chunks: a copy of a whole tensor may be more than a device has.
            for start in range(0, tensor.values.size, CHUNK):
                part = tensor.values[start : start + CHUNK]
                part[:] = lattice.round_to_lattice(part, exponent)
            self.tensors[index] = replace(tensor, exponent=exponent)
            self.probe_steps[index] = steps[index]
            # Rounding may have raised the largest by half a step.
            self.bounds[index] = largest(tensor.values)
            self.coarsenings.append(Coarsening(round_, tensor.name, exponent))

    def load(self, exponents: Sequence[int], weights: Sequence[Vector]) -> None:
        """Put other weights on other lattices in the place of these. Raises SettingsError, and changes nothing."""
        tensors = [replace(tensor, exponent=exponent) for tensor, exponent in zip(self.tensors, exponents, strict=True)]
        # The last thing that may fail.
        steps = [self._round_probe_step(tensor.exponent, tensor.name) for tensor in tensors]
        self.tensors, self.probe_steps = tensors, steps
        for tensor, values in zip(tensors, weights, strict=True):
            tensor.values[:] = values
        self.bounds = [largest(tensor.values) for tensor in self.tensors]
        self.coarsenings = []


def largest(values: Vector) -> float:
    """Find max|θ| without a second copy."""
    return max(float(values.max()), -float(values.min())) if values.size else 0.0
