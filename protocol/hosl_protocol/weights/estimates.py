"""What an update says of the gradient, tensor by tensor: a sum of directions, or the compressed gradient itself.

An optimizer asks for one chunk of a tensor after the other, so that no whole gradient is ever in memory.
Specification: protocol/README.md, sections "Updates" and "Gradients".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hosl_protocol.arithmetic import lattice
from hosl_protocol.arithmetic.directions import CHUNK, Stream, Vector, philox, read_bits
from hosl_protocol.arithmetic.perturbation import LatticeTensor, Recipe, Term, estimate
from hosl_protocol.arithmetic.rotation import Codes, GradientLayout, Rotation

UPDATE_ROTATION = 0
"""The rotation of the cloud's updates; a device's own is from 1 on."""


@dataclass(frozen=True)
class UpdateRecord:
    """What one round does to the client's weights."""

    round: int
    coefficients: npt.NDArray[np.float32]
    """[P], of each direction: with SGD θ ← θ + Σ coefficient·z; with AdamW the gradient estimate is Σ coefficient·z.
    First-order: the scale of each block of the gradient, with SGD times minus the rate."""
    learning_rate: float
    """AdamW's rate this round; SGD's is already in the coefficients."""
    codes: Codes = field(default_factory=lambda: np.empty(0, np.uint8))
    """[C], first-order: the levels of the gradient's blocks; else empty."""


class Estimate(Protocol):
    """An estimate of the gradient that is made a chunk at a time."""

    def fill(self, tensor: LatticeTensor, start: int, out: Vector) -> None:
        """out ← its elements [start, start + out.size) of a tensor; `start` is a multiple of CHUNK, `out` no longer."""
        ...


@dataclass(frozen=True)
class DirectionEstimate:
    """Σ step · z, summed in the order of the terms."""

    terms: Sequence[Term]
    recipe: Recipe

    def fill(self, tensor: LatticeTensor, start: int, out: Vector) -> None:
        """Sum the directions."""
        estimate(tensor, start, start + out.size, self.terms, self.recipe, out)


@dataclass(frozen=True)
class GradientEstimate:
    """The gradient that an update of first-order training carries."""

    update: UpdateRecord
    layout: GradientLayout
    seed: int

    @property
    def rotation(self) -> Rotation:
        """That of the round's update."""
        return Rotation(self.seed, self.update.round, UPDATE_ROTATION)

    def fill(self, tensor: LatticeTensor, start: int, out: Vector) -> None:
        """Decode."""
        update = self.update
        self.layout.decode(update.codes, update.coefficients, tensor.index, self.rotation, start, out)

    def largest(self, tensors: Sequence[LatticeTensor]) -> list[float]:
        """Find the largest magnitude in each tensor."""
        update = self.update
        return [self.layout.largest(update.codes, update.coefficients, t.index, self.rotation) for t in tensors]

    def add_to(self, tensor: LatticeTensor, sign: int) -> None:
        """θ ← θ + sign · what the update holds, each step rounded to the lattice: SGD, and its way back.

        A step between two multiples of g goes up with a probability of its remainder, by a byte of the seed's: so a
        rate at which steps are smaller than g still moves the weights, on average.
        """
        g = np.float32(lattice.spacing(tensor.exponent))
        scratch = np.empty(min(CHUNK, tensor.values.size), np.float32)
        for start in range(0, tensor.values.size, CHUNK):
            values = tensor.values[start : start + CHUNK]
            step = scratch[: values.size]
            self.fill(tensor, start, step)
            # Division by a power of two is exact, and so is the sum: the sign may be put on a rounded step.
            np.divide(step, g, out=step)
            step += self._chances(tensor.index, start, step.size)
            np.floor(step, out=step)
            step *= np.float32(sign) * g
            values += step

    def _chances(self, index: int, start: int, elements: int) -> Vector:
        """Draw the chances of the elements to be rounded up, (byte + 1/2) / 256 in the order of the words' bytes."""
        generator = philox(self.seed, self.update.round, UPDATE_ROTATION, Stream.ROUNDING, index + 1, start // 32)
        drawn = read_bits(generator, 8 * elements).astype(np.float32)
        drawn += np.float32(0.5)
        drawn *= np.float32(1 / 256)
        return drawn
