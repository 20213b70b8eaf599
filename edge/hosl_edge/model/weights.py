"""The shard's weights in memory that graphs are bound to: views of their file, and rows of a frozen token table.

What is bound must live, and stay where it is, as long as the binding.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from hosl_protocol.run.manifest import BundleError, Manifest, TensorEntry

Weights = dict[str, npt.NDArray[np.float32]]

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
        with usable(path):
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
        with usable(path):
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
def usable(path: Path) -> Iterator[None]:
    """Turn what a damaged file makes its reader raise into a BundleError that names it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # ONNX Runtime's have no common root
        problem = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        sentence = f"{path} cannot be used ({problem or type(error).__name__})"
        raise BundleError(f"{sentence}: delete it and start again to fetch it, or export the bundle again") from error
