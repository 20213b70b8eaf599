"""The run that each bundle's devices take part in now, and the table of them by the shard's digest.

One bundle has one current run: a second Coordinator of the same shard would be a second owner of the same devices.
Changed on the event loop alone, by the queue; read there by the HTTP API and the devices' routes. `all` and `under_way`
may be called from any thread, for the log asks from them: they look at a copy.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from hosl_cloud.runs.coordinator import Coordinator
from hosl_cloud.runs.run import Ending, Paused
from hosl_protocol.run.manifest import Manifest


@dataclass(eq=False)
class CurrentRun:
    """A run from before it is loaded until another one of its bundle takes its place; it may be over by then."""

    run: str
    """The run's id."""
    bundle: Path
    manifest: Manifest
    coordinator: Coordinator | None = None
    """None while the run is loaded."""
    task: asyncio.Task[Ending | Paused] | None = None
    """None until the service has begun."""
    is_waiting_for_room: bool = False
    """Whether it cannot be loaded before the disk has room."""

    @property
    def is_over(self) -> bool:
        """Whether another run may take its place."""
        return self.task is not None and self.task.done()

    @property
    def is_without_room(self) -> bool:
        """Whether it waits for room on the disk, as it is loaded or as it trains."""
        return self.is_waiting_for_room or (
            self.coordinator is not None and self.coordinator.checkpointer.is_waiting_for_room
        )


class CurrentRuns:
    """The current run of each bundle, in the order in which they began."""

    def __init__(self) -> None:
        self._by_shard: dict[str, CurrentRun] = {}

    def put(self, shard_digest: str, current: CurrentRun) -> None:
        """Let a run take its bundle's place, where that is free or its run is over."""
        self._by_shard[shard_digest] = current

    def remove(self, current: CurrentRun) -> None:
        """Free its place, unless another has taken it."""
        self._by_shard = {shard: each for shard, each in self._by_shard.items() if each is not current}

    def all(self) -> list[CurrentRun]:
        """All of them, those that are over too."""
        return list(self._by_shard.values())

    def under_way(self) -> list[CurrentRun]:
        """Those that are not over."""
        return [current for current in self.all() if not current.is_over]

    def by_shard(self) -> dict[str, str]:
        """The ids of those that are not over, by the digest of their shard."""
        return {shard: current.run for shard, current in self._by_shard.items() if not current.is_over}

    def of_run(self, run: str) -> CurrentRun | None:
        """Find a run by its id; None for one that waits in line, or is history."""
        return next((current for current in self._by_shard.values() if current.run == run), None)

    def of_shard(self, digest: str) -> CurrentRun | None:
        """Find the run of the bundle whose shard has this digest."""
        return self._by_shard.get(digest)

    def for_device(self, bundle: str = "") -> CurrentRun | None:
        """Choose whose shard a device is given: that of the oldest run under way, or else of the last one.

        A device that is kept to a bundle's runs is given no other.
        """
        fitting = [current for current in self._by_shard.values() if bundle in ("", current.bundle.name)]
        return next((current for current in fitting if not current.is_over), fitting[-1] if fitting else None)
