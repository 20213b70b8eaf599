"""A file of kept activations: what one device has sent of one of its data sets, example by example.

A line of JSON says what it holds (KeptData), and records follow. A record is appended whole and never changed; its head
and its body have a checksum each, so that what a crash or a disk has damaged is found, dropped and asked for again.
Each file belongs to the compute thread of one run.

Shapes: T tokens of an example, D width of the cut layer, N labels.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

Example: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]
"""Activations [T, D], labels [N]."""

FORMAT = 1
SUFFIX = ".kept"
_HEAD = struct.Struct("<QIII")
"""Place, T, N, and the body's CRC-32."""
_SUM = struct.Struct("<I")
"""CRC-32 of the head."""
_HEAD_BYTES = _HEAD.size + _SUM.size
_LONGEST_LINE = 1 << 16


class KeptData(msgspec.Struct, kw_only=True, frozen=True):
    """What a file holds."""

    format: int = FORMAT
    key: str
    """Digest of what else the activations depend on: shard, task, length, type on the wire."""
    bundle: str
    """Its name, for people."""
    task: str
    device: str
    data_digest: str
    part: str
    """`train` or `held-out`."""
    examples: int
    """In the whole data set."""
    width: int
    dtype: str
    """float32, float16 or bfloat16: how activations are stored, exactly as they came."""


def read_kept(path: Path) -> KeptData | None:
    """Read what a file holds; None where it is none of ours, or damaged there. Raises OSError."""
    with path.open("rb") as file:
        line = file.readline(_LONGEST_LINE)
    try:
        data = msgspec.json.decode(line, type=KeptData)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return data if data.format == FORMAT and line.endswith(b"\n") else None


class KeptFile:
    """The examples of a file, by their places in the data set."""

    def __init__(self, path: Path, data: KeptData) -> None:
        """Open the file, or make it; one that is foreign or damaged at its head is made anew. Raises OSError."""
        self.path, self.data = path, data
        if not path.exists() or read_kept(path) != data:
            part = path.with_suffix(".part")
            part.write_bytes(msgspec.json.encode(data) + b"\n")
            part.replace(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._places: dict[int, tuple[int, int, int, int]] = {}
        """Where the body of an example begins, its T, N and CRC-32."""
        self._end = self._scan()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, place: int) -> bool:
        return place in self._places

    @property
    def is_whole(self) -> bool:
        """Whether every example is here."""
        return len(self._places) == self.data.examples

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self._end

    @property
    def is_removed(self) -> bool:
        """Whether somebody has deleted the file; then all of it is forgotten."""
        if os.fstat(self._descriptor).st_nlink:
            return False
        self._places.clear()
        return True

    def _scan(self) -> int:
        """Find the records; where the last good one ends. What follows it was cut off in the middle, and goes."""
        size = os.fstat(self._descriptor).st_size
        end = len(msgspec.json.encode(self.data)) + 1
        while end + _HEAD_BYTES <= size:
            head = os.pread(self._descriptor, _HEAD_BYTES, end)
            place, tokens, labels, checksum = _HEAD.unpack_from(head)
            body = end + _HEAD_BYTES
            after = body + self._body_bytes(tokens, labels)
            if _SUM.unpack_from(head, _HEAD.size)[0] != zlib.crc32(head[: _HEAD.size]) or after > size:
                break
            self._places[place] = body, tokens, labels, checksum
            end = after
        if end < size:
            os.ftruncate(self._descriptor, end)
        return end

    def _body_bytes(self, tokens: int, labels: int) -> int:
        return 4 * labels + tokens * self.data.width * (4 if self.data.dtype == "float32" else 2)

    def get(self, place: int) -> Example | None:
        """Read an example; None where it is not here, or damaged, which is then forgotten. Raises OSError."""
        if place not in self._places:
            return None
        start, tokens, labels, checksum = self._places[place]
        body = os.pread(self._descriptor, self._body_bytes(tokens, labels), start)
        if len(body) != self._body_bytes(tokens, labels) or zlib.crc32(body) != checksum:
            del self._places[place]
            return None
        activations = _unpacked(body[4 * labels :], self.data.dtype).reshape(tokens, self.data.width)
        return activations, np.frombuffer(body, "<i4", labels)

    def record_bytes(self, example: Example) -> int:
        """Bytes that an example takes here."""
        return _HEAD_BYTES + self._body_bytes(len(example[0]), len(example[1]))

    def add(self, examples: Iterable[tuple[int, Example]]) -> None:
        """Append examples. Raises OSError, and leaves the file as it was."""
        records, places, end = [], {}, self._end
        for place, (activations_TD, labels_N) in examples:
            body = labels_N.astype("<i4").tobytes() + _packed(activations_TD, self.data.dtype)
            head = _HEAD.pack(place, len(activations_TD), len(labels_N), zlib.crc32(body))
            places[place] = end + _HEAD_BYTES, len(activations_TD), len(labels_N), zlib.crc32(body)
            records += [head, _SUM.pack(zlib.crc32(head)), body]
            end += _HEAD_BYTES + len(body)
        try:
            content = memoryview(b"".join(records))
            while content:
                content = content[os.pwrite(self._descriptor, content, end - len(content)) :]
        except OSError:
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end = end
        self._places.update(places)

    def close(self) -> None:
        """Let the file go."""
        os.close(self._descriptor)


def _packed(activations_TD: npt.NDArray[np.float32], dtype: str) -> bytes:
    """Store numbers that came in this type, so that nothing of them is lost."""
    if dtype == "bfloat16":
        return (activations_TD.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return activations_TD.astype("<f2" if dtype == "float16" else "<f4").tobytes()


def _unpacked(body: bytes, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (np.frombuffer(body, "<u2").astype("<u4") << 16).view("<f4").astype(np.float32, copy=False)
    return np.frombuffer(body, "<f2" if dtype == "float16" else "<f4").astype(np.float32)
