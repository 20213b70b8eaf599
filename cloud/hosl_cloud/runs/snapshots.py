"""Snapshots of the devices' weights: made from the mirror when a device is too far behind to replay, kept as files.

Admission offers one in the Welcome, on the event loop; the device fetches the file over HTTP
(service/device_routes.py). The mirror is copied on the compute thread, which owns it, and written on another, so that a
round does not wait for the disk. `_making` lets one be made at a time: of many devices that come at once all but the
first find it there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hosl_cloud.runs.run import Compute, Run
from hosl_protocol.run.manifest import sha256_of_file
from hosl_protocol.weights.state import ClientState, Moments, SnapshotHeader
from hosl_protocol.wire.messages import Hello, Snapshot

log = logging.getLogger(__name__)

MARGIN = 1.5
"""A snapshot is offered where replay would take this many times the download: both figures are estimates, and a
snapshot also costs the cloud a pass over the mirror and the device a file."""

KEPT = 2
"""Newest snapshots that stay."""


@dataclass
class Snapshots:
    """Makes and keeps a run's snapshots."""

    run: Run
    compute: Compute
    """Runs work on the thread that owns the mirror."""
    _kept: dict[tuple[int, int], Snapshot] = field(default_factory=dict)
    """By epoch and round, oldest first."""
    _making: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def offer(self, hello: Hello, applied: int) -> Snapshot | None:
        """Choose what a device that stands at `applied` should download instead of replaying; None: let it replay."""
        if not self._saves(hello, self.run.round - applied):
            return None

        async with self._making:
            newest = self._newest()
            if newest is not None and self._is_good_enough(newest, hello, applied):
                return newest
            try:
                return await self._make()
            except OSError as error:
                log.error("no snapshot can be made, devices replay instead: %s", error)
                return None

    def path(self, round_: int) -> Path | None:
        """Name the file of a snapshot of the present epoch; None where there is none."""
        key = self.run.epoch, round_
        return self._file(*key) if key in self._kept else None

    def _saves(self, hello: Hello, rounds: int) -> bool:
        """Whether a download beats the replay of so many rounds on this device."""
        coefficients = rounds * self.run.update_shape.coefficients
        return is_snapshot_faster(coefficients, self._size_bytes, hello.replay_s, hello.link_bytes_per_s)

    def _is_good_enough(self, snapshot: Snapshot, hello: Hello, applied: int) -> bool:
        """Whether it brings a device most of the way, and so near that a new one would bring little."""
        ahead, behind = snapshot.round - applied, self.run.round - snapshot.round
        return self._saves(hello, ahead) and not self._saves(hello, behind)

    @property
    def _size_bytes(self) -> int:
        """The size of a snapshot, but for its header."""
        elements = sum(math.prod(entry.shape) for entry in self.run.manifest.trainable)
        return 4 * elements * (3 if self.run.settings.client.optimizer == "adamw" else 1)

    def _newest(self) -> Snapshot | None:
        epoch, round_ = max(self._kept, default=(-1, 0))
        return self._kept[epoch, round_] if epoch == self.run.epoch else None

    async def _make(self) -> Snapshot:
        run, epoch = self.run, self.run.epoch
        state: ClientState = await self.compute(lambda: copy_state(run.mirror.state()))
        while run.round < state.round and run.ending is None:
            # The mirror moves first: nobody may have an update that is not in the store yet.
            await asyncio.sleep(0.01)

        # The epoch as it was before the first await: a run that is loaded anew has other Snapshots, and another epoch.
        if (epoch, state.round) not in self._kept:
            path = self._file(epoch, state.round)
            shapes = {entry.name: entry.shape for entry in run.manifest.trainable}
            self._kept[epoch, state.round] = await asyncio.to_thread(write_snapshot, path, run.id, epoch, state, shapes)
            # More than one stays: a device may be about to fetch the one that it was offered.
            for key in sorted(self._kept)[:-KEPT]:
                del self._kept[key]
            await asyncio.to_thread(self._prune, {self._file(*key) for key in self._kept})
        return self._kept[epoch, state.round]

    def _prune(self, kept: set[Path]) -> None:
        """Delete older snapshots, and what a crash left."""
        for path in self.run.folder.glob("snapshot-*"):
            if path not in kept:
                path.unlink(missing_ok=True)

    def _file(self, epoch: int, round_: int) -> Path:
        return self.run.folder / f"snapshot-epoch-{epoch:04}-round-{round_:06}.safetensors"


def is_snapshot_faster(coefficients: int, size_bytes: int, replay_s: float, link_bytes_per_s: float) -> bool:
    """Tell whether replaying so many coefficients takes MARGIN times the download; no where a figure is unknown."""
    if not (replay_s and link_bytes_per_s):
        return False
    return coefficients * replay_s > MARGIN * size_bytes / link_bytes_per_s


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
