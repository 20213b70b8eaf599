"""The client half on ONNX Runtime: weights are graph inputs, bound once to memory-mapped numpy arrays.

A zeroth-order step writes that memory in place and the next run sees it.
Shapes: B examples, L padded length, T tokens without padding, D width of the cut layer.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from hosl_edge.data import Batch
from hosl_protocol import BundleError, Manifest
from hosl_protocol.manifest import SHARD_GRAPH, SHARD_WEIGHTS

Weights = dict[str, npt.NDArray[np.float32]]


def map_weights(path: Path, manifest: Manifest) -> tuple[Weights, Weights]:
    """All weights, and the trainable ones as the file has them; both views of the file, nothing is read yet.

    In the first, trainable tensors are copy-on-write and frozen ones read-only and file-backed.
    """
    layout, start = _read_layout(path)
    frozen = np.memmap(path, np.uint8, mode="r")
    private = np.memmap(path, np.uint8, mode="c") if manifest.trainable else frozen
    weights, base = {}, {}
    for entry in manifest.tensors:
        if entry.name not in layout or tuple(layout[entry.name]["shape"]) != entry.shape:
            raise BundleError(f"{path} does not hold {entry.name} of shape {list(entry.shape)}")
        first, last = (start + offset for offset in layout[entry.name]["data_offsets"])
        source = private if entry.trainable else frozen
        weights[entry.name] = np.asarray(source[first:last].view(np.float32).reshape(entry.shape))
        if entry.trainable:
            base[entry.name] = np.asarray(frozen[first:last].view(np.float32).reshape(entry.shape))
    return weights, base


def _read_layout(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        layout: dict[str, Any] = json.loads(file.read(length))
    layout.pop("__metadata__", None)
    return layout, 8 + length


class Shard:
    """Weights, and the forward that reads them."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        self.manifest = manifest
        self.weights, self._base = map_weights(folder / SHARD_WEIGHTS, manifest)
        self.rows = 1
        """Rows of a micro-batch at full length."""
        self.max_length = manifest.max_length
        self._graph = folder / SHARD_GRAPH
        self._threads = threads
        self._session: ort.InferenceSession | None = None
        self._binding: Any = None
        self._output = np.empty(0, np.float32)

    def open(self) -> None:
        """Build the session and bind the weights; separate, because a tokenizer may still fill memory before."""
        if self._session is not None:
            return
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        # From bytes, so that a graph can't name files to read.
        self._session = ort.InferenceSession(self._graph.read_bytes(), options, ["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        for name, array in self.weights.items():
            self._binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    def reset(self) -> None:
        """Put the trainable weights back to the base shard."""
        for name, base in self._base.items():
            self.weights[name][...] = base

    def forward(self, batch: Batch) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
        """Run micro-batches: places in the packed batch [T], and activations [t, D] without padding.

        The activations are scratch, valid until the next one is asked for.
        """
        place = 0
        for rows in self._micro_batches(batch):
            lengths = batch.lengths_B[rows]
            out_BLD = self._run(batch.ids_BL[rows, : int(lengths.max())], lengths)
            for length, out_LD in zip(lengths.tolist(), out_BLD, strict=True):
                yield slice(place, place + length), out_LD[:length]
                place += length

    def activations(self, batch: Batch, out_TD: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The whole batch's activations, packed into `out_TD` [T, D]."""
        for place, part_TD in self.forward(batch):
            out_TD[place] = part_TD
        return out_TD

    def _micro_batches(self, batch: Batch) -> Iterator[slice]:
        """Neighbouring rows whose padded tokens fit; the rows are sorted by length."""
        limit = self.rows * self.max_length
        start = 0
        for stop in range(1, len(batch.lengths_B) + 1):
            is_full = stop == len(batch.lengths_B) or int(batch.lengths_B[stop]) * (stop + 1 - start) > limit
            if is_full:
                yield slice(start, stop)
                start = stop

    def _run(self, ids_BL: npt.NDArray[np.int64], lengths_B: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        assert self._session is not None
        shape = (*ids_BL.shape, self.manifest.width)
        if self._output.size < np.prod(shape):
            self._output = np.empty(int(np.prod(shape)), np.float32)
        inputs = {"input_ids": np.ascontiguousarray(ids_BL)}
        if "attention_mask" in self.manifest.inputs:
            inputs["attention_mask"] = (np.arange(ids_BL.shape[1]) < lengths_B[:, None]).astype(np.int64)
        for name, array in inputs.items():
            self._binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        self._binding.bind_output(self.manifest.output, "cpu", 0, np.float32, shape, self._output.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        return self._output[: int(np.prod(shape))].reshape(shape)
