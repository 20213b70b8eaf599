"""The exact gradient of what trains on the device: that of ⟨λ, f(θ)⟩, block by block, from the last to the first.

A block's graph takes what the block was given, the gradient of what it gave (the cotangent) and its weights, and gives
the gradient of what trains in it and of what it was given: the cotangent of the block before. The block's own forward
is inside, so that nothing of it outlives a micro-batch. What blocks were given is kept by a forward, or by several
where the memory holds it of some blocks at a time only. `Shard.gradients` leads the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hosl_edge.model.graph import Graph, Inputs
from hosl_edge.model.weights import Weights
from hosl_protocol.run.manifest import (
    BOUNDARY,
    COTANGENT,
    INPUT_GRADIENT,
    SHARD_GRAPH,
    BlockGradient,
    BundleError,
    Manifest,
)

Floats: TypeAlias = npt.NDArray[np.float32]
Kept: TypeAlias = dict[int, list[Floats]]
"""What blocks were given, by their numbers: of each micro-batch, padding included."""


def input_name(block: int) -> str:
    """The output of `shard.onnx` that is what a block was given."""
    return f"input.{block}"


class Backward:
    """The graphs of the blocks in which something trains. Equal blocks share one, which they are bound to in turn."""

    def __init__(
        self, manifest: Manifest, weights: Weights, forward: Graph, open_graph: Callable[[str], Graph]
    ) -> None:
        self.entries = manifest.gradients
        self._weights = weights
        self._graphs = {name: open_graph(name) for name in dict.fromkeys(entry.graph for entry in self.entries)}
        self._shapes = {entry.name: entry.shape for entry in manifest.trainable}

        takers = [entry.block for entry in self.entries if BOUNDARY in self.graph(entry).inputs]
        if manifest.prefix is not None:
            takers = takers[1:]  # what the first is given the prefix has computed
        absent = next((block for block in takers if input_name(block) not in forward.outputs), None)
        if absent is not None:
            raise BundleError(f"{SHARD_GRAPH} has no output {input_name(absent)}: export the bundle again")
        self.kept = {block: forward.outputs[input_name(block)] for block in takers}
        """The blocks whose input a forward must keep, in its order, and the shape of that; a free dimension is none."""

    def graph(self, entry: BlockGradient) -> Graph:
        """The graph of a block."""
        return self._graphs[entry.graph]

    def kept_shape(self, block: int, rows: int, length: int) -> tuple[int, ...]:
        """Tell what `rows` examples of at most `length` tokens are when the block gets them."""
        return rows, *(size if isinstance(size, int) else length for size in self.kept[block][1:])

    def groups(self, sets: int) -> Iterator[Kept]:
        """Cut the kept blocks into groups of at most `sets`, the last blocks first; nothing is in them yet."""
        blocks, sets = list(self.kept), max(1, sets)
        for stop in range(len(blocks), 0, -sets):
            yield {block: [] for block in blocks[max(0, stop - sets) : stop]}

    def run_block(self, entry: BlockGradient, parts: Iterable[tuple[Inputs, Floats]]) -> dict[str, Floats]:
        """Compute the gradients of what trains in a block, by name, from its micro-batches: inputs and cotangent.

        They are added in the order of the micro-batches. The gradient of what the block was given takes its place.
        """
        graph = self.graph(entry)
        graph.bind({name: self._weights[tensor] for name, tensor in entry.parameters.items()})
        sums: dict[str, Floats] = {}
        summands: dict[str, Floats] = {}
        scratch = np.empty(0, np.float32)

        for given, cotangent in parts:
            if not sums:  # the first micro-batch's gradients are computed to where the sums will be
                sums = out = self._empty(entry)
            else:
                summands = out = summands or self._empty(entry)

            results = dict(out)
            if INPUT_GRADIENT in graph.outputs:
                h = given[BOUNDARY]
                if scratch.size < h.size:
                    scratch = np.empty(h.size, np.float32)
                results[INPUT_GRADIENT] = scratch[: h.size].reshape(h.shape)
            graph.compute({**given, COTANGENT: cotangent}, results)

            if INPUT_GRADIENT in graph.outputs:
                h[...] = results[INPUT_GRADIENT]
            if out is summands:
                for name, total in sums.items():
                    total += summands[name]
        return {tensor: sums[name] for name, tensor in entry.gradients.items()}

    def _empty(self, entry: BlockGradient) -> dict[str, Floats]:
        """Memory for a block's gradients, by the names of the graph's outputs."""
        return {name: np.empty(self._shapes[tensor], np.float32) for name, tensor in entry.gradients.items()}
