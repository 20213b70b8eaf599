"""The client half on ONNX Runtime: weights are graph inputs, bound once to memory-mapped numpy arrays.

A zeroth-order step writes that memory in place and the next run sees it. Constants are the graph's own. One
thread at a time is here, of the worker threads (device.py). The memory that an input is bound to must live, and stay
where it is, as long as the binding.
Shapes: B examples, L padded length, T tokens without padding or positions of images, D width of the cut layer.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from hosl_edge.data.datasets import Batch
from hosl_edge.model.graph_check import check_graph
from hosl_protocol.run.manifest import (
    BOUNDARY,
    SHARD_GRAPH,
    SHARD_PREFIX,
    SHARD_WEIGHTS,
    BundleError,
    Manifest,
    TensorEntry,
)

Weights = dict[str, npt.NDArray[np.float32]]
Inputs = dict[str, npt.NDArray[Any]]

MAX_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file that the format allows."""


class MappedWeights:
    """The shard's weights as views of its file: nothing is read until it is used.

    Trainable tensors are copy-on-write and become anonymous memory when a step first writes them; frozen ones are
    read-only and file-backed, so the kernel can drop their pages.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.all: Weights = {}
        self._base: Weights = {}
        with _usable(path):
            layout, start = _read_layout(path)
            # The same file twice: what trains is copied, page by page, when it is first written.
            with path.open("rb") as file:
                self._frozen = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

            for entry in manifest.tensors:
                _check_entry(layout, entry, len(self._frozen) - start)
                first = start + layout[entry.name].data_offsets[0]
                frozen = _view(self._frozen, first, entry.shape)
                self.all[entry.name] = _view(self._private, first, entry.shape) if entry.trainable else frozen
                if entry.trainable:
                    self._base[entry.name] = frozen

    def reset(self) -> None:
        """Put the trainable weights back to what the file holds."""
        for name, base in self._base.items():
            self.all[name][...] = base


class _TensorLocation(msgspec.Struct):
    """Where a tensor lies in a safetensors file, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]
    """From the end of the header."""


def _check_entry(layout: dict[str, _TensorLocation], entry: TensorEntry, data_bytes: int) -> None:
    found = layout.get(entry.name)
    if found is None or found.dtype != "F32" or found.shape != entry.shape:
        raise BundleError(f"it does not hold {entry.name} as float32 of shape {list(entry.shape)}")
    first, end = found.data_offsets
    if not 0 <= first <= end <= data_bytes or end - first != 4 * math.prod(entry.shape):
        raise BundleError(f"it is cut short, or its header is wrong, at {entry.name}")


def _view(mapping: mmap.mmap, first: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.frombuffer(mapping, np.float32, math.prod(shape), first).reshape(shape)


def check_tokens(ids: npt.NDArray[np.int64], tokens: int) -> None:
    """Raise BundleError where one of `ids` is not below `tokens`."""
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= tokens:
        wrong = lowest if lowest < 0 else highest
        raise BundleError(f"a text has token {wrong}, and the model's token table has {tokens} rows: export it again")


class TokenTable:
    """A frozen token embedding that stays in its file: a batch reads the rows of its tokens and no more.

    Through a memory map each row would make its neighbours resident too, up to the whole table over time.
    """

    def __init__(self, path: Path, entry: TensorEntry) -> None:
        self.name = entry.name
        with _usable(path):
            layout, start = _read_layout(path)
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._first = start + layout[entry.name].data_offsets[0]
        self._width = math.prod(entry.shape[1:])
        self._rows = np.empty((0, self._width), np.float32)

    def read(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """`ids` numbered anew, and the rows [distinct ids, D] that they now name; scratch until the next call."""
        # Each row once: a text repeats its words, and the graph gathers from what it is given.
        distinct, renumbered = np.unique(ids, return_inverse=True)
        if len(self._rows) < distinct.size:
            self._rows = np.empty((distinct.size, self._width), np.float32)
        row_bytes = 4 * self._width
        for row, token in zip(self._rows, distinct.tolist(), strict=False):
            os.preadv(self._descriptor, [row.data], self._first + token * row_bytes)
        return renumbered.reshape(ids.shape).astype(np.int64, copy=False), self._rows[: distinct.size]


# Made here, on import: threads that use a type for the first time at once crash msgspec.
_LOCATION = msgspec.json.Decoder(_TensorLocation)


def _read_layout(path: Path) -> tuple[dict[str, _TensorLocation], int]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = msgspec.json.decode(file.read(min(length, MAX_HEADER_BYTES)), type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        return {name: _LOCATION.decode(raw) for name, raw in entries.items()}, 8 + length


@contextlib.contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Turn what a damaged file makes its reader raise into a BundleError that names it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # ONNX Runtime's have no common root
        problem = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        sentence = f"{path} cannot be used ({problem or type(error).__name__})"
        raise BundleError(f"{sentence}: delete it and start again to fetch it, or export the bundle again") from error


def _session_options(threads: int) -> ort.SessionOptions:
    """Make the options that tests/benchmarks/session_options.py chose."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1

    # The arena keeps what a forward took; without it each value is fresh pages of the kernel's: 6 MB more at the peak
    # and 5 to 20 % more time. It packs values best if they are not planned into each other's buffers.
    options.enable_cpu_mem_arena = True
    options.enable_mem_reuse = False
    options.enable_mem_pattern = False
    # Threads that spin take processors from other work, or from the battery, and gained a tenth of time at most.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


class _Graph:
    """A session, and what is bound to its inputs."""

    def __init__(self, path: Path, threads: int) -> None:
        self._path = path
        with _usable(path):
            # The bytes that are checked are those that ONNX Runtime gets; by its path it would read the file again.
            data = path.read_bytes()
            check_graph(data)
            self._session = ort.InferenceSession(data, _session_options(threads), ["CPUExecutionProvider"])
            self._binding = self._session.io_binding()
            self.inputs = {value.name for value in self._session.get_inputs()}

    def bind(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Let the inputs of these names read this memory, as often as it changes."""
        with _usable(self._path):
            for name, array in arrays.items():
                if name in self.inputs:
                    self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def compute(self, given: Inputs, output: str, out: npt.NDArray[np.float32]) -> None:
        """Let ONNX Runtime compute `output` into `out`, from `given` and what was bound before."""
        self.bind(given)
        with _usable(self._path):
            self._binding.bind_output(output, "cpu", 0, np.float32, out.shape, out.ctypes.data)
            self._session.run_with_iobinding(self._binding)


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
        self._folder = folder
        self._threads = threads

        self._graph: _Graph | None = None
        self._prefix: _Graph | None = None
        self._output = np.empty(0, np.float32)
        self._held: dict[int, list[Inputs]] = {}
        """By batch, what `shard.onnx` is given of each micro-batch, once the prefix has computed it."""

    def open(self) -> None:
        """Build the sessions, with nothing in their arenas yet, and bind the weights.

        Separate, because a tokenizer may still fill memory before.
        """
        # Both arenas go before new ones are made, or the memory would hold the former run's, too.
        self._graph = self._prefix = None
        self._graph = self._open(SHARD_GRAPH)
        if self.manifest.prefix is not None:
            self._prefix = self._open(SHARD_PREFIX)

    def _open(self, name: str) -> _Graph:
        graph = _Graph(self._folder / name, self._threads)
        graph.bind(self.weights)
        return graph

    def reset(self) -> None:
        """Put the trainable weights back to the base shard."""
        self._mapped.reset()

    def forward(self, batch: Batch) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
        """Run micro-batches: places in the packed batch [T], and activations [t, D] without padding.

        The activations are scratch, valid until the next one is asked for.
        """
        assert self._graph is not None, "the shard is open"
        place = 0

        for number, rows in enumerate(self._micro_batches(batch)):
            lengths = batch.lengths_B[rows]
            out_BLD = self._output_BLD(len(lengths), int(lengths.max()))
            self._graph.compute(self._inputs_of(batch, rows, number), self.manifest.output, out_BLD)
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

    def activations(self, batch: Batch, out_TD: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Compute the whole batch's activations, packed into `out_TD` [T, D]; returns it."""
        for place, part_TD in self.forward(batch):
            out_TD[place] = part_TD
        return out_TD

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
        given = self._look_up(batch.inputs(rows))
        if self._prefix is None or self.manifest.prefix is None:
            return given

        assert self._graph is not None
        prefix, length = self.manifest.prefix, int(batch.lengths_B[rows].max())
        boundary = np.empty((rows.stop - rows.start, prefix.positions or length, prefix.width), np.float32)
        self._prefix.compute(given, self.manifest.output, boundary)
        # What only the prefix takes, the pixels above all, need not be held till the round's end.
        given = {name: array for name, array in {**given, BOUNDARY: boundary}.items() if name in self._graph.inputs}
        held.append(given)
        return given

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

    def _output_BLD(self, rows: int, length: int) -> npt.NDArray[np.float32]:
        """Memory for a micro-batch's activations [B, L, D]: the same for each, as large as the largest so far."""
        size = rows * length * self.manifest.width
        # One buffer that grows: fresh pages for each micro-batch would cost as much time as memory.
        if self._output.size < size:
            self._output = np.empty(size, np.float32)
        return self._output[:size].reshape(rows, length, self.manifest.width)
