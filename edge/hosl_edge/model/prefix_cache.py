"""What the frozen blocks before the first trained one compute of each example, kept on the device's disk.

A file with a place for each example. Each place has a checksum of its own, so that what a kill or a power cut has torn
is computed again, in whatever order the pages came to the disk. One thread at a time is here, that of the shard; other
processes are kept out by the lock on the state folder.

It is read with `preadv`: a disk that fails then raises an error, where a memory map would end the process, and pages
of a map would count as resident memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from hosl_edge.data.datasets import Dataset
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.settings import RunSettings

log = logging.getLogger(__name__)

FILE = "prefix.cache"

_MAGIC = b"hosl prefix 1\n\0\0"
_TAG = struct.Struct("<II")
"""Before the values of each example: `_WRITTEN`, and the CRC-32 of its number and its values. A hole is zeros."""
_WRITTEN = 0x50534F48


class PrefixCache:
    """Activations of examples 0, 1, ... by their number, float32, in the bits in which they were written.

    Of examples that have no room in the budget, and of those whose bytes are damaged, it knows nothing.
    """

    def __init__(self, path: Path, key: bytes, sizes: npt.NDArray[np.int64], budget_bytes: int) -> None:
        """`key` is a SHA-256 of what the values depend on, `sizes` are the bytes of each example.

        A file of another key, or that is damaged at its beginning, is made again. No OSError is raised: without a file
        nothing is kept.
        """
        self.written_bytes = 0
        """By this object, headers and damaged places included."""
        head = len(_MAGIC) + len(key)
        starts = head + np.concatenate([[0], np.cumsum(sizes + _TAG.size)]).astype(np.int64)
        self.room = int(np.searchsorted(starts, budget_bytes, "right")) - 1 if len(sizes) else 0
        """How many examples have a place: the first ones."""
        self.room = max(0, self.room)
        self.size_bytes = int(starts[self.room])
        """Of the file, once it is full."""
        self.whole_bytes = int(starts[-1])
        """What all examples would take."""

        self._path, self._starts, self._sizes = path, starts, sizes
        self._descriptor = -1
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._may_write = True
        self._has_told_damage = False
        try:
            self._open(_MAGIC + key)
        except OSError as error:
            self._stop_writing(error)

    def _open(self, head: bytes) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._path, flags, 0o600)  # as private as the data
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        size = os.fstat(self._descriptor).st_size
        if os.pread(self._descriptor, len(head), 0) != head:
            if size:
                log.warning("%s is damaged, or of another run's shard, data or task: it is made again", self._path)
            # First empty, so that no place of the old file is ever below the new head.
            os.ftruncate(self._descriptor, 0)
            self._write([memoryview(head)], 0)
        elif size > self.size_bytes:  # of a larger budget
            os.ftruncate(self._descriptor, self.size_bytes)

    def describe(self) -> str:
        """Tell people how much there is room for."""
        examples = len(self._sizes)
        if self.room == examples:
            return f"all {examples} examples, {self.whole_bytes / 1e6:.1f} MB"
        need = f"all would take {self.whole_bytes / 1e6:.1f} MB"
        return f"{self.room} of {examples} examples, {self.size_bytes / 1e6:.1f} MB; {need}"

    def close(self) -> None:
        """Let go of the file; nothing is read or written any more."""
        if self._finalizer is not None:
            self._finalizer()
        self._descriptor, self._may_write = -1, False

    def read(self, example: int, out: npt.NDArray[np.float32]) -> bool:
        """Read an example's values into `out`, whose size is the example's; False where they are not here, whole."""
        if example >= self.room or self._descriptor < 0:
            return False
        tag = bytearray(_TAG.size)
        values = out.reshape(-1).data.cast("B")
        try:
            found = os.preadv(self._descriptor, [tag, values], int(self._starts[example]))
        except OSError as error:
            self._tell_damage(example, error.strerror or str(error))
            return False
        mark, checksum = _TAG.unpack(tag)
        if mark == checksum == 0:
            return False
        if found < _TAG.size + values.nbytes or mark != _WRITTEN or checksum != _checksum(example, values):
            self._tell_damage(example, "its checksum is wrong")
            return False
        return True

    def write(self, example: int, values: npt.NDArray[np.float32]) -> None:
        """Keep an example's values, where it has a place and the disk takes them."""
        if example >= self.room or not self._may_write:
            return
        data = values.reshape(-1).data.cast("B")
        assert data.nbytes == self._sizes[example], "the place is the example's"
        tag = _TAG.pack(_WRITTEN, _checksum(example, data))
        try:
            self._write([memoryview(tag), data], int(self._starts[example]))
        except OSError as error:
            self._stop_writing(error)

    def _write(self, parts: list[memoryview], start: int) -> None:
        """Write all of `parts`; a disk that is almost full takes a piece, and says so at the next."""
        while parts:
            done = os.pwritev(self._descriptor, parts, start)
            self.written_bytes += done
            start += done
            while parts and done >= parts[0].nbytes:
                done -= parts.pop(0).nbytes
            if parts:
                parts[0] = parts[0][done:]

    def _stop_writing(self, error: OSError) -> None:
        self._may_write = False
        log.warning("%s cannot be written (%s): the run goes on, and computes what is not there", self._path, error)

    def _tell_damage(self, example: int, problem: str) -> None:
        if not self._has_told_damage:
            self._has_told_damage = True
            log.warning("%s is damaged at example %d (%s): such are computed again", self._path, example, problem)


def _checksum(example: int, values: memoryview) -> int:
    # With the number: what lies at another example's place is no better than noise.
    return zlib.crc32(values, example & 0xFFFFFFFF)


NO_FROZEN_BLOCKS = "the bundle has no frozen blocks of their own before the first that trains"
"""Why a shard has nothing to keep."""


@dataclass(frozen=True)
class Opened:
    """A cache, and the data whose batches name its places."""

    cache: PrefixCache
    train: Dataset
    held_out: Dataset | None
    sentence: str
    """For people: the file, and what it has room for."""


def open_cache(
    folder: Path,
    budget_bytes: int,
    manifest: Manifest,
    settings: RunSettings,
    data_digests: Sequence[str],
    computer: str,
    train: Dataset,
    held_out: Dataset | None,
) -> Opened:
    """Open the cache of a run's examples in `folder`: the training data first, then the held-out data.

    Augmented images have no places, for they are others in each round. The manifest has a prefix. `computer` names what
    computes: bits of activations are those of one runtime on one kind of processor.
    """
    prefix = manifest.prefix
    assert prefix is not None
    is_augmented = manifest.image is not None and settings.augmentation.is_on
    parts = [np.zeros(0, np.int64) if is_augmented else train.lengths]
    parts += [held_out.lengths] if held_out is not None else []
    lengths = np.concatenate(parts)
    positions = np.full(len(lengths), prefix.positions, np.int64) if prefix.positions else lengths

    facts = [manifest.shard_digest, *data_digests, settings.task, settings.max_length, prefix.blocks, is_augmented]
    facts += [computer, hashlib.sha256(lengths.tobytes()).hexdigest()]
    key = hashlib.sha256(msgspec.json.encode(facts)).digest()

    cache = PrefixCache(folder / FILE, key, 4 * prefix.width * positions, budget_bytes)
    sentence = f"keeps what {prefix.blocks} frozen blocks compute in {folder / FILE}: {cache.describe()}"
    return Opened(
        cache,
        train if is_augmented else train.numbered(0),
        None if held_out is None else held_out.numbered(len(parts[0])),
        sentence,
    )


def remove_cache(folder: Path) -> None:
    """Remove the file, where there is one."""
    try:
        (folder / FILE).unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", folder / FILE, error.strerror)
