"""The client half on ONNX Runtime: weights are graph inputs, bound once to memory-mapped numpy arrays.

A zeroth-order step writes that memory in place and the next run sees it. Constants are the graph's own. One
thread at a time is here, of the worker threads (device.py).
Shapes: B examples, L padded length, T tokens without padding or positions of images, D width of the cut layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from hosl_edge.data.datasets import Batch
from hosl_edge.model.gradients import Backward, Floats, Kept, input_name
from hosl_edge.model.graph import Graph, Inputs, new_shared_arena
from hosl_edge.model.prefix_cache import PrefixCache
from hosl_edge.model.weights import MappedWeights, TokenTable, check_tokens
from hosl_protocol.run.manifest import (
    BOUNDARY,
    SHARD_GRAPH,
    SHARD_PREFIX,
    SHARD_WEIGHTS,
    BlockGradient,
    Manifest,
    PrefixEntry,
)

MASK = "attention_mask"


class Shard:
    """Weights, and the forward that reads them.

    Where the manifest has a prefix, a forward is two: of the blocks before the first that trains, and of the others.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        self.manifest = manifest
        self._mapped = MappedWeights(folder / SHARD_WEIGHTS, manifest)
        self.weights = self._mapped.all
        frozen_tables = [entry for entry in manifest.tensors if entry.lookup and not entry.trainable]
        self._table = TokenTable(folder / SHARD_WEIGHTS, frozen_tables[0]) if frozen_tables else None
        self.rows = 1
        """Rows of a micro-batch at full length."""
        self.max_length = manifest.max_length
        self.cache: PrefixCache | None = None
        """What the prefix has computed of examples, on the disk; examples are then computed one by one."""
        self._folder = folder
        self._threads = threads

        self._graph: Graph | None = None
        self._prefix: Graph | None = None
        self._backward: Backward | None = None
        self._output = np.empty(0, np.float32)
        self._held: dict[int, list[Inputs]] = {}
        """By batch, what `shard.onnx` is given of each micro-batch, once the prefix has computed it."""

    def open(self, *, with_gradients: bool = False) -> None:
        """Build the sessions, with nothing in their arenas yet, and bind the weights.

        Separate, because a tokenizer may still fill memory before.
        """
        # All arenas go before new ones are made, or the memory would hold the former run's, too.
        had_shared = self._backward is not None
        self._graph = self._prefix = self._backward = None
        if with_gradients or had_shared:
            new_shared_arena()

        self._graph = self._open(SHARD_GRAPH, shares_arena=with_gradients)
        self._graph.bind(self.weights)
        if self.manifest.prefix is not None:
            self._prefix = self._open(SHARD_PREFIX, shares_arena=with_gradients)
            self._prefix.bind(self.weights)
        if with_gradients:
            open_graph = partial(self._open, shares_arena=True)
            self._backward = Backward(self.manifest, self.weights, self._graph, open_graph)

    def _open(self, name: str, *, shares_arena: bool) -> Graph:
        return Graph(self._folder / name, self._threads, shares_arena=shares_arena)

    def reset(self) -> None:
        """Put the trainable weights back to the base shard."""
        self._mapped.reset()

    def forward(self, batch: Batch, kept: Kept | None = None) -> Iterator[tuple[slice, Floats]]:
        """Run micro-batches: places in the packed batch [T], and activations [t, D] without padding.

        The activations are scratch, valid until the next one is asked for. What the blocks of `kept` are given is
        added to it.
        """
        assert self._graph is not None, "the shard is open"
        place = 0

        for number, rows in enumerate(self._micro_batches(batch)):
            lengths = batch.lengths_B[rows]
            out_BLD = self._output_BLD(len(lengths), int(lengths.max()))
            wanted = {self.manifest.output: out_BLD}
            for block, inputs in (kept or {}).items():
                inputs.append(self._empty_input(block, *out_BLD.shape[:2]))
                wanted[input_name(block)] = inputs[-1]
            self._graph.compute(self._inputs_of(batch, rows, number), wanted)
            for length, out_LD in zip(lengths.tolist(), out_BLD, strict=True):
                yield slice(place, place + length), out_LD[:length]
                place += length

    @contextlib.contextmanager
    def holding(self, batch: Batch) -> Iterator[None]:
        """Run the blocks before the first that trains once for all forwards of `batch` within.

        What they compute stays in memory till the end: `PrefixEntry.set_bytes` of it, and nothing without a prefix.
        """
        self._held[id(batch)] = []
        try:
            yield
        finally:
            del self._held[id(batch)]

    def activations(self, batch: Batch, out_TD: Floats, kept: Kept | None = None) -> Floats:
        """Compute the whole batch's activations, packed into `out_TD` [T, D]; returns it. `kept` as of `forward`."""
        for place, part_TD in self.forward(batch, kept):
            out_TD[place] = part_TD
        return out_TD

    def rehearse(self, batch: Batch) -> None:
        """Compute what a round does of a batch, so that the arena has grown to it."""
        kept = self.last_inputs(len(self._backward.kept)) if self._backward is not None else None
        for _ in self.forward(batch, kept):
            pass
        if kept is not None:
            for _ in self.gradients(batch, np.zeros((batch.tokens, self.manifest.width), np.float32), kept):
                pass

    def kept_bytes(self, rows: int, length: int) -> list[int]:
        """Tell how much memory takes what is kept of a batch for the way back, a size for each block that needs it."""
        if self._backward is None:
            return []
        return [4 * math.prod(self._backward.kept_shape(block, rows, length)) for block in self._backward.kept]

    def last_inputs(self, sets: int) -> Kept:
        """Make what a forward shall keep: the inputs of the last blocks, `sets` of them at most."""
        assert self._backward is not None, "the shard is open, with gradients"
        return next(self._backward.groups(sets), {})

    def gradients(self, batch: Batch, lambda_TD: Floats, kept: Kept) -> Iterator[tuple[str, Floats]]:
        """Compute the gradient of ⟨λ, f(θ)⟩ for what trains, by name, one block's at a time, from the last block on.

        `kept` is what a forward kept of `last_inputs`; it is used up. Of the blocks before, forwards keep as many at a
        time. A tensor that does not come has gradient zero.
        """
        assert self._backward is not None, "the shard is open, with gradients"
        groups = self._backward.groups(len(kept))
        next(groups, None)
        cotangents: Iterable[Floats] = self._padded(batch, lambda_TD)
        for entry in reversed(self._backward.entries):
            if entry.block in self._backward.kept and entry.block not in kept:
                kept = next(groups)
                for _ in self.forward(batch, kept):
                    pass

            inputs = kept.pop(entry.block, None)
            yield from self._backward.run_block(entry, self._parts(entry, batch, inputs, cotangents)).items()
            # Each input has become the cotangent of the block before.
            cotangents = inputs or []

    def _parts(
        self,
        entry: BlockGradient,
        batch: Batch,
        inputs: list[Floats] | None,
        cotangents: Iterable[Floats],
    ) -> Iterator[tuple[Inputs, Floats]]:
        """Yield what a block's graph takes of each micro-batch, and the cotangent of what the block gave.

        Where none of its `inputs` was kept it takes what `shard.onnx` does.
        """
        assert self._backward is not None
        graph = self._backward.graph(entry)
        for number, (rows, cotangent) in enumerate(zip(self._micro_batches(batch), cotangents, strict=True)):
            if inputs is None:
                own = self._inputs_of(batch, rows, number)
                # Among them the rows of a frozen token table, which the graph may call by another name.
                given = own | {name: own[tensor] for name, tensor in entry.parameters.items() if tensor in own}
            else:
                given = {BOUNDARY: inputs[number]}
                if MASK in graph.inputs:
                    given[MASK] = batch.inputs(rows)[MASK]
            yield given, cotangent

    def _padded(self, batch: Batch, lambda_TD: Floats) -> Iterator[Floats]:
        """λ of each micro-batch [B, L, D], zero where there is padding; scratch until the next one is asked for."""
        place = 0
        for rows in self._micro_batches(batch):
            lengths = batch.lengths_B[rows]
            padded_BLD = self._output_BLD(len(lengths), int(lengths.max()))
            for length, row_LD in zip(lengths.tolist(), padded_BLD, strict=True):
                row_LD[:length] = lambda_TD[place : place + length]
                row_LD[length:] = 0.0
                place += length
            yield padded_BLD

    def _empty_input(self, block: int, rows: int, length: int) -> Floats:
        assert self._backward is not None, "the shard is open, with gradients"
        return np.empty(self._backward.kept_shape(block, rows, length), np.float32)

    def _micro_batches(self, batch: Batch) -> Iterator[slice]:
        """Cut a batch into neighbouring rows whose padded tokens fit; the rows are sorted by length."""
        limit = self.rows * self.max_length
        start = 0
        for stop in range(1, len(batch.lengths_B) + 1):
            is_full = stop == len(batch.lengths_B) or int(batch.lengths_B[stop]) * (stop + 1 - start) > limit
            if is_full:
                yield slice(start, stop)
                start = stop

    def _inputs_of(self, batch: Batch, rows: slice, number: int) -> Inputs:
        """Make what `shard.onnx` is given of a micro-batch; with a prefix what that computes, or has computed."""
        held = self._held.get(id(batch), [])
        if number < len(held):
            return held[number]

        # Not computed yet, or outside of `holding`.
        if self.manifest.prefix is None:
            return self._look_up(batch.inputs(rows))

        assert self._graph is not None
        given: Inputs = {BOUNDARY: self._boundary(batch, rows, self.manifest.prefix)}
        # What only the prefix takes, the pixels above all, need not be held till the round's end.
        if MASK in self._graph.inputs:
            given[MASK] = batch.inputs(rows)[MASK]
        held.append(given)
        return given

    def _boundary(self, batch: Batch, rows: slice, prefix: PrefixEntry) -> Floats:
        """What the prefix computes of a micro-batch: float32 [b, L, width], of images [b, positions, width]."""
        length = prefix.positions or int(batch.lengths_B[rows].max())
        shape = rows.stop - rows.start, length, prefix.width
        if self.cache is None or batch.places_B is None:
            boundary = np.empty(shape, np.float32)
            self._run_prefix(batch, rows, boundary)
            return boundary

        # One by one, whether it is kept or not: no example's bits may depend on its neighbours in a batch. No real
        # token sees what stands in the padding, and its cotangent is zero.
        boundary = np.zeros(shape, np.float32)
        for row, place in enumerate(range(rows.start, rows.stop)):
            values = boundary[row, : prefix.positions or int(batch.lengths_B[place])]
            number = int(batch.places_B[place])
            if not self.cache.read(number, values):
                self._run_prefix(batch, slice(place, place + 1), values[None])
                self.cache.write(number, values)
        return boundary

    def _run_prefix(self, batch: Batch, rows: slice, out: Floats) -> None:
        assert self._prefix is not None, "the shard is open"
        self._prefix.compute(self._look_up(batch.inputs(rows)), {self.manifest.output: out})

    def _look_up(self, given: Inputs) -> Inputs:
        """Add the rows of a frozen token table that the inputs name, and number their tokens anew.

        Raises BundleError for a token that the table has no row for: behind it lie other tensors' bytes.
        """
        tokens = self.manifest.tokens
        if tokens is not None:
            check_tokens(given["input_ids"], tokens)
        if self._table is None:
            return given
        ids, rows = self._table.read(given["input_ids"])
        return {**given, "input_ids": ids, self._table.name: rows}

    def _output_BLD(self, rows: int, length: int) -> Floats:
        """Memory for a micro-batch's activations [B, L, D]: the same for each, as large as the largest so far."""
        size = rows * length * self.manifest.width
        # One buffer that grows: fresh pages for each micro-batch would cost as much time as memory.
        if self._output.size < size:
            self._output = np.empty(size, np.float32)
        return self._output[:size].reshape(rows, length, self.manifest.width)
