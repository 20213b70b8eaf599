"""Snapshots of the weights on the device: the file beside the journal that the journal's rounds begin at.

The file is the cloud's, so that nothing of it is believed before its digest, and its header not even then.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hosl_edge.exceptions import SnapshotError
from hosl_protocol.exceptions import ProtocolError
from hosl_protocol.run.manifest import Manifest, sha256_of_file
from hosl_protocol.weights.state import FIRST_MOMENT, SECOND_MOMENT, ClientState, Moments, SnapshotHeader
from hosl_protocol.wire.messages import Snapshot

MAX_HEADER_BYTES = 16 * 1024 * 1024


# Made here, on import: threads that use a type for the first time at once crash msgspec.
_HEADER = msgspec.json.Decoder(SnapshotHeader)


def snapshot_path(folder: Path, sha256: str) -> Path:
    """Where the snapshot of this digest is kept."""
    return folder / f"snapshot-{sha256}.safetensors"


def check_size(snapshot: Snapshot, manifest: Manifest) -> None:
    """Raise ProtocolError where a snapshot is larger than the weights and two moments can be."""
    elements = sum(math.prod(entry.shape) for entry in manifest.trainable)
    largest = 12 * elements + MAX_HEADER_BYTES
    if snapshot.size_bytes > largest:
        raise ProtocolError(f"snapshot of {snapshot.size_bytes} bytes, expected at most {largest}")


def drop_others(folder: Path, *kept: Path) -> None:
    """Delete all snapshots, and what is left of downloads, but for `kept`."""
    for path in folder.glob("snapshot-*"):
        if path not in kept:
            path.unlink(missing_ok=True)


def read_snapshot(path: Path, sha256: str, manifest: Manifest) -> tuple[SnapshotHeader, ClientState]:
    """Read what a snapshot says and holds, as views of its file. Raises SnapshotError."""
    try:
        digest = sha256_of_file(path)
    except OSError as error:
        raise SnapshotError(path, error.strerror or "it cannot be read") from error
    if digest != sha256:
        raise SnapshotError(path, f"it is damaged, its digest is {digest}")

    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header, layout, start = _read_header(mapping)
        return header, _view_state(mapping, header, layout, start, manifest)
    except MemoryError:
        raise
    except Exception as error:  # whatever a header of the cloud's may bring about
        raise SnapshotError(path, f"it is no snapshot of this shard: {error!r}"[:300]) from error


def _read_header(mapping: mmap.mmap) -> tuple[SnapshotHeader, dict[str, Any], int]:
    (length,) = struct.unpack_from("<Q", mapping)
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    layout: dict[str, Any] = json.loads(mapping[8 : 8 + length])
    metadata = layout.pop("__metadata__")["hosl"]
    return _HEADER.decode(metadata), layout, 8 + length


def _view_state(
    mapping: mmap.mmap, header: SnapshotHeader, layout: Mapping[str, Any], start: int, manifest: Manifest
) -> ClientState:
    def views(form: str) -> dict[str, Any]:
        found = {}
        for entry in manifest.trainable:
            # Each claim of the header is checked against the manifest before a view of the file is made of it.
            place = layout[form.format(entry.name)]
            if place["dtype"] != "F32" or tuple(place["shape"]) != entry.shape:
                raise ValueError(f"{entry.name} is not float32 of shape {list(entry.shape)}")
            first, end = place["data_offsets"]
            if not (0 <= first <= end and end - first == 4 * math.prod(entry.shape)):
                raise ValueError(f"{entry.name} has wrong offsets")
            found[entry.name] = np.frombuffer(mapping, "<f4", math.prod(entry.shape), start + first)
        return found

    moments = None
    if header.steps is not None:
        moments = Moments(header.steps, views(FIRST_MOMENT), views(SECOND_MOMENT))
    return ClientState(header.round, views("{}"), header.exponents, moments)
