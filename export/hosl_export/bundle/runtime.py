"""A bundle's graphs in ONNX Runtime, as a device runs them: the forward, and the gradient block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor

from hosl_export.tensor_files import read_tensors
from hosl_protocol.run.manifest import (
    BOUNDARY,
    COTANGENT,
    INPUT_GRADIENT,
    SHARD_GRAPH,
    SHARD_PREFIX,
    SHARD_WEIGHTS,
    Manifest,
    input_output,
)

Feed = dict[str, npt.NDArray[Any]]


class ShardRuntime:
    """The shard's graphs, their weights given as inputs from a memory map of the file."""

    def __init__(self, bundle: Path, manifest: Manifest, weights: dict[str, Tensor] | None = None) -> None:
        self._bundle, self._manifest = bundle, manifest
        graphs = (SHARD_GRAPH,) if manifest.prefix is None else (SHARD_PREFIX, SHARD_GRAPH)
        self._sessions = [self._open(graph) for graph in graphs]
        weights = read_tensors(bundle / SHARD_WEIGHTS) if weights is None else weights
        self._weights = {name: tensor.numpy() for name, tensor in weights.items()}

    def _open(self, graph: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        # An arena would keep what the longest batch took, while the tail needs memory.
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        return ort.InferenceSession(str(self._bundle / graph), options, providers=["CPUExecutionProvider"])

    @cached_property
    def _gradients(self) -> dict[str, ort.InferenceSession]:
        return {graph: self._open(graph) for graph in {entry.graph for entry in self._manifest.gradients}}

    def run(self, given: dict[str, Tensor]) -> Tensor:
        """Run a batch through all graphs, in order. Returns activations [B, T, D]."""
        output = self._manifest.output
        return torch.from_numpy(self._forward(given, [output])[output])

    def _forward(self, given: dict[str, Tensor], outputs: Sequence[str]) -> Feed:
        """Run a batch through all graphs. Returns it, with what the last one was given, and these outputs of that."""
        feed: Feed = {name: tensor.numpy() for name, tensor in given.items()}
        *before, last = self._sessions
        for session in before:
            # The second graph goes on from what the first one computed, under this name.
            feed[BOUNDARY] = _run(session, feed | self._weights, [self._manifest.output])[self._manifest.output]
        # Asked for no output, ONNX Runtime gives all of them.
        return feed | _run(last, feed | self._weights, outputs) if outputs else feed

    def gradients(self, given: dict[str, Tensor], cotangent_BTD: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Go through the blocks from the last to the first. Yields each trained tensor's name and gradient."""
        known = {value.name for value in self._sessions[-1].get_outputs()}
        blocks = [input_output(entry.block) for entry in self._manifest.gradients]
        feed = self._forward(given, [name for name in blocks if name in known])
        cotangent = cotangent_BTD.numpy()

        for entry, block in reversed(list(zip(self._manifest.gradients, blocks, strict=True))):
            weights = {name: self._weights[tensor] for name, tensor in entry.parameters.items()}
            # The first block's input may be the shard's own.
            boundary = {BOUNDARY: feed[block]} if block in known else {}
            session = self._gradients[entry.graph]
            names = [value.name for value in session.get_outputs()]
            outputs = _run(session, {**feed, **weights, **boundary, COTANGENT: cotangent}, names)
            for name, tensor in entry.gradients.items():
                yield tensor, torch.from_numpy(outputs[name])
            cotangent = outputs.get(INPUT_GRADIENT, cotangent)


def _run(session: ort.InferenceSession, given: Feed, outputs: Sequence[str]) -> Feed:
    """Run a graph on those of the arrays that it has inputs for. Returns these of its outputs by name."""
    inputs = {value.name: given[value.name] for value in session.get_inputs()}
    return dict(zip(outputs, session.run(outputs, inputs), strict=True))
