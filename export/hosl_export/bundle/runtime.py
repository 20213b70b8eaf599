"""A bundle's graphs in ONNX Runtime, as a device runs them: the forward, and the gradient block by block."""

from __future__ import annotations

from collections.abc import Iterator
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

    def run(self, given: dict[str, Tensor]) -> Tensor:
        """Run a batch through all graphs, in order. Returns activations [B, T, D]."""
        return torch.from_numpy(self._forward(given)[self._manifest.output])

    def _forward(self, given: dict[str, Tensor]) -> Feed:
        """Run a batch through all graphs. Returns it, with what the last one was given and gave."""
        feed: Feed = {name: tensor.numpy() for name, tensor in given.items()}
        *before, last = self._sessions
        for session in before:
            # The second graph goes on from what the first one computed, under this name.
            feed[BOUNDARY] = _run(session, feed | self._weights)[self._manifest.output]
        return feed | _run(last, feed | self._weights)

    def gradients(self, given: dict[str, Tensor], cotangent_BTD: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Go through the blocks from the last to the first. Yields each trained tensor's name and gradient."""
        feed, sessions = self._forward(given), dict[str, ort.InferenceSession]()
        feed[COTANGENT] = cotangent_BTD.numpy()
        for entry in reversed(self._manifest.gradients):
            if entry.graph not in sessions:
                sessions[entry.graph] = self._open(entry.graph)
            weights = {name: self._weights[tensor] for name, tensor in entry.parameters.items()}
            given_block = input_output(entry.block)  # else what the shard is given
            boundary = {BOUNDARY: feed[given_block]} if given_block in feed else {}
            outputs = _run(sessions[entry.graph], {**feed, **weights, **boundary})
            for name, tensor in entry.gradients.items():
                yield tensor, torch.from_numpy(outputs[name])
            feed[COTANGENT] = outputs.get(INPUT_GRADIENT, feed[COTANGENT])


def _run(session: ort.InferenceSession, given: Feed) -> Feed:
    """Run a graph on those of the arrays that it has inputs for. Returns all its outputs by name."""
    outputs = [value.name for value in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, {v.name: given[v.name] for v in session.get_inputs()}), strict=True))
