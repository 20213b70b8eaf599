"""Snapshots of the devices' weights: made from the mirror when a device is too far behind to replay, kept as files.

Admission offers one in the Welcome, on the event loop; the device fetches the file over HTTP
(service/device_routes.py). The mirror is copied on the compute thread, which owns it, and written on another, so that a
round does not wait for the disk. `_making` lets one be made at a time: of many devices that come at once all but the
first find it there.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path

from hosl_cloud.runs.run import Compute, Run
from hosl_cloud.storage.client_state import copy_state, write_snapshot
from hosl_protocol.run.updates import UpdateShape
from hosl_protocol.weights.state import ClientState
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
        """Choose what a device that stands at `applied` should download instead of replaying; None: let it replay.

        It can only replay what the store still has (Run.pruned_to). Of gradients the bytes decide as well, for a device
        whose figures are unknown.
        """
        if applied >= self.run.pruned_to and not self._saves(hello, self.run.round - applied):
            return None

        async with self._making:
            newest = self._newest()
            if newest is not None and self._is_good_enough(newest, hello, applied):
                return newest
            try:
                return await self._make()
            except OSError as error:
                log.error("no snapshot can be made: %s", error)
                return None

    def path(self, round_: int) -> Path | None:
        """Name the file of a snapshot of the present epoch; None where there is none."""
        key = self.run.epoch, round_
        return self._file(*key) if key in self._kept else None

    def _saves(self, hello: Hello, rounds: int) -> bool:
        """Whether a download beats the replay of so many rounds on this device."""
        run = self.run
        if run.layout is not None and is_snapshot_smaller(rounds, run):
            return True
        return is_snapshot_faster(rounds, run.update_shape, run.state_bytes, hello.replay_s, hello.link_bytes_per_s)

    def _is_good_enough(self, snapshot: Snapshot, hello: Hello, applied: int) -> bool:
        """Whether it brings a device most of the way, and so near that a new one would bring little."""
        ahead, behind = snapshot.round - applied, self.run.round - snapshot.round
        is_needed = applied < self.run.pruned_to <= snapshot.round
        # By bytes, too, for who needs one whatever its figures are.
        is_near = behind * self.run.update_shape.size_bytes <= MARGIN * self.run.state_bytes
        return (is_needed or self._saves(hello, ahead)) and is_near and not self._saves(hello, behind)

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
            self._kept[epoch, state.round] = await asyncio.to_thread(
                write_snapshot, path, run.id, epoch, state, run.shapes
            )
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


def is_snapshot_smaller(rounds: int, run: Run) -> bool:
    """Tell whether so many updates take MARGIN times the bytes of a snapshot."""
    return rounds * run.update_shape.size_bytes > MARGIN * run.state_bytes


def is_snapshot_faster(
    rounds: int, update: UpdateShape, size_bytes: int, replay_s: float, link_bytes_per_s: float
) -> bool:
    """Tell whether fetching and replaying so many updates takes MARGIN times the download of a snapshot.

    No where one of the device's figures is 0, unknown.
    """
    if not (replay_s and link_bytes_per_s):
        return False
    update_s = update.coefficients * replay_s + update.size_bytes / link_bytes_per_s
    return rounds * update_s > MARGIN * size_bytes / link_bytes_per_s
