"""Files with the client's state after a round: what devices download as a snapshot, and part of some checkpoints.

Specification: protocol/README.md, section "Snapshots".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hosl_protocol.run.manifest import sha256_of_file
from hosl_protocol.weights.state import ClientState, Moments, SnapshotHeader
from hosl_protocol.wire.messages import Snapshot


def copy_state(state: ClientState) -> ClientState:
    """Copy a state, which then stays as it is while the mirror moves on."""
    moments = state.moments
    if moments is not None:
        moments = Moments(moments.steps, _copy(moments.first), _copy(moments.second))
    return ClientState(state.round, _copy(state.weights), dict(state.exponents), moments)


def _copy(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.array(values) for name, values in arrays.items()}


def write_snapshot(
    path: Path, run: str, epoch: int, state: ClientState, shapes: Mapping[str, tuple[int, ...]]
) -> Snapshot:
    """Write a state as a safetensors file, without a second copy in memory; durable once it has its name."""
    header = SnapshotHeader(
        run=run,
        epoch=epoch,
        round=state.round,
        weights_digest=state.digest(),
        exponents=dict(state.exponents),
        steps=state.moments.steps if state.moments is not None else None,
    )

    # safetensors: the length of a JSON header, the header, and the tensors one after the other.
    layout: dict[str, Any] = {"__metadata__": {"hosl": msgspec.json.encode(header).decode()}}
    end = 0
    for name, tensor, values in state.arrays():
        begin, end = end, end + values.nbytes
        layout[name] = {"dtype": "F32", "shape": list(shapes[tensor]), "data_offsets": [begin, end]}
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for _, _, values in state.arrays():
                file.write(values.astype("<f4", copy=False).data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        part.unlink(missing_ok=True)  # on a full disk half a file would take the room that the database needs
        raise

    made = Snapshot(round=state.round, size_bytes=part.stat().st_size, sha256=sha256_of_file(part))
    part.replace(path)
    return made
