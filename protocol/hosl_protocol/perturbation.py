"""Adding directions to weights in place: one pass over memory, whatever the number of directions.

Perturbing, restoring, moving from one probe to the next, updating, catching up and taking back are all the same
operation: θ ← θ + Σ step · z. On the lattice the sum is exact, so order, chunks and threads do not matter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from hosl_protocol.directions import BITS_PER_BLOCK, CHUNK, Stream, philox, read_bits, signs

SEGMENT = 16 * CHUNK
"""Elements that one job walks, chunk by chunk; long enough to make its generators worth their set-up."""

TERMS_PER_PASS = 64
"""Directions that one pass adds; more take further passes, so that a long catch-up needs no more memory."""

Vector = npt.NDArray[np.float32]


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


def add_directions(
    tensors: Sequence[LatticeTensor], terms: Sequence[Term], seed: int, executor: Executor | None = None
) -> None:
    """θ ← θ + Σ_terms step · z, in place. The caller keeps every partial sum inside the exact range."""
    for first in range(0, len(terms), TERMS_PER_PASS):
        group = terms[first : first + TERMS_PER_PASS]
        jobs = list(_jobs(tensors, group))
        if executor is None:
            for job in jobs:
                _add_job(job, group, seed)
        else:
            for _ in executor.map(partial(_add_job, terms=group, seed=seed), jobs):
                pass


def estimate(tensor: LatticeTensor, start: int, stop: int, terms: Sequence[Term], seed: int, out: Vector) -> None:
    """out ← Σ_terms step · z over elements [start, stop) of one tensor, summed in the order of `terms`.

    `start` is a multiple of CHUNK and stop - start at most CHUNK.
    """
    out[:] = 0.0
    for generator, table in _open(tensor, start, terms, seed):
        out += _signed_steps(generator, table, stop - start)


def _jobs(tensors: Sequence[LatticeTensor], terms: Sequence[Term]) -> Iterator[tuple[LatticeTensor, int, int]]:
    for tensor in tensors:
        if any(term.steps[tensor.index] for term in terms):
            for start in range(0, tensor.values.size, SEGMENT):
                yield tensor, start, min(start + SEGMENT, tensor.values.size)


def _add_job(job: tuple[LatticeTensor, int, int], terms: Sequence[Term], seed: int) -> None:
    tensor, start, stop = job
    opened = _open(tensor, start, terms, seed)
    for chunk_start in range(start, stop, CHUNK):
        chunk = tensor.values[chunk_start : min(chunk_start + CHUNK, stop)]
        for generator, table in opened:
            np.add(chunk, _signed_steps(generator, table, chunk.size), out=chunk)


def _open(
    tensor: LatticeTensor, start: int, terms: Sequence[Term], seed: int
) -> list[tuple[np.random.Philox, npt.NDArray[Any]]]:
    block = start // BITS_PER_BLOCK
    return [
        (
            philox(seed, term.round, term.direction, Stream.SIGNS, tensor.index, block),
            # One 32-byte item per row: numpy then copies a row at once.
            (signs() * np.float32(term.steps[tensor.index])).view("V32").reshape(-1),
        )
        for term in terms
        if term.steps[tensor.index]
    ]


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.values = np.empty(CHUNK, np.float32)


_scratch = _Scratch()


def _signed_steps(generator: np.random.Philox, table: npt.NDArray[Any], elements: int) -> Vector:
    """The next `elements` entries of step · z; the result lives in this thread's scratch until the next call."""
    bits = read_bits(generator, elements)
    rows = _scratch.values[: bits.size * 8].view("V32")
    # Every byte is a valid row; any mode but "raise" lets numpy write into `out` without a buffer.
    np.take(table, bits, out=rows, mode="clip")
    return _scratch.values[:elements]
