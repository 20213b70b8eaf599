"""Adding directions to weights in place: one pass over memory, whatever the number of directions.

Perturbing, restoring, moving from one probe to the next, updating, catching up and taking back are all the same
operation: θ ← θ + Σ step · z. On the lattice the sum is exact, so order, chunks and threads do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np

from hosl_protocol.arithmetic import kernel
from hosl_protocol.arithmetic.directions import CHUNK, WORK, Distribution, Vector, open_steps

SEGMENT = 16 * CHUNK
"""Elements of one job: long enough to make its set-up cheap, short enough to share tensors between threads."""

TERMS_PER_PASS = kernel.MAX_TERMS
"""Directions that one pass adds; more take further passes over a job's elements, so that many need no more memory."""


@dataclass(frozen=True)
class LatticeTensor:
    """A trainable tensor as the probes see it."""

    name: str
    index: int
    """Place among the trainable tensors: its own range of the random counter."""
    values: Vector
    """Flat, writable view [elements] of the memory that the graph reads."""
    exponent: int
    """Lattice exponent e."""


@dataclass(frozen=True)
class Term:
    """One direction and how far each tensor moves along it."""

    round: int
    direction: int
    steps: Sequence[float]
    """Per tensor, a multiple of its lattice's g; 0 leaves the tensor alone."""


@dataclass(frozen=True)
class Recipe:
    """Where directions come from."""

    seed: int
    distribution: Distribution = "rademacher"

    def add(
        self, values: Vector, tensor: LatticeTensor, start: int, terms: Sequence[Term], *, is_rounded: bool = True
    ) -> None:
        """values ← values + Σ_terms step · z over elements [start, start + n) of a tensor; n is values.size.

        Terms are added one by one, in their order: however they are grouped, the bits are the same. `start` is a
        multiple of CHUNK. Entries are on the tensor's lattice where `is_rounded`.
        """
        # A step that rounded to 0 moves nothing: its direction need not be made.
        present = [term for term in terms if term.steps[tensor.index]]
        compiled = kernel.load() if self.distribution == "rademacher" else None

        for first in range(0, len(present), TERMS_PER_PASS):
            group = present[first : first + TERMS_PER_PASS]
            if compiled is None:
                self._add_with_numpy(values, tensor, start, group, is_rounded)
            else:
                rows = [((self.seed, t.round << 16 | t.direction), tensor.index, t.steps[tensor.index]) for t in group]
                compiled(values, start, kernel.pack(rows))

    def _add_with_numpy(
        self, values: Vector, tensor: LatticeTensor, start: int, terms: Sequence[Term], is_rounded: bool
    ) -> None:
        exponent = tensor.exponent if is_rounded else None
        opened = [
            open_steps(
                self.distribution, self.seed, t.round, t.direction, tensor.index, t.steps[tensor.index], start, exponent
            )
            for t in terms
        ]

        # All terms for a part that stays in the cache, then the next part.
        for first in range(0, values.size, WORK):
            part = values[first : first + WORK]
            for steps in opened:
                np.add(part, steps.next(part.size), out=part)


def add_directions(
    tensors: Sequence[LatticeTensor], terms: Sequence[Term], recipe: Recipe, executor: Executor | None = None
) -> None:
    """θ ← θ + Σ_terms step · z, in place. The caller keeps every partial sum inside the exact range."""
    jobs = list(_jobs(tensors, terms))
    if executor is None:
        for job in jobs:
            _add_job(job, terms, recipe)
    else:
        for _ in executor.map(partial(_add_job, terms=terms, recipe=recipe), jobs):
            pass


def estimate(tensor: LatticeTensor, start: int, stop: int, terms: Sequence[Term], recipe: Recipe, out: Vector) -> None:
    """out ← Σ_terms step · z over elements [start, stop) of one tensor, summed in the order of `terms`.

    `start` is a multiple of CHUNK and stop - start at most CHUNK.
    """
    out[:] = 0.0
    recipe.add(out, tensor, start, terms, is_rounded=False)


def _jobs(tensors: Sequence[LatticeTensor], terms: Sequence[Term]) -> Iterator[tuple[LatticeTensor, int, int]]:
    for tensor in tensors:
        if any(term.steps[tensor.index] for term in terms):
            # Segments begin at multiples of CHUNK, where every generator can begin, too.
            for start in range(0, tensor.values.size, SEGMENT):
                yield tensor, start, min(start + SEGMENT, tensor.values.size)


def _add_job(job: tuple[LatticeTensor, int, int], terms: Sequence[Term], recipe: Recipe) -> None:
    tensor, start, stop = job
    recipe.add(tensor.values[start:stop], tensor, start, terms)
