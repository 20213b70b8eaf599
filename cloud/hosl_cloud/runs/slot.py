"""A bundle's place in the service, which one run takes at a time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from hosl_cloud.runs.coordinator import Coordinator
from hosl_cloud.runs.run import Ending, Paused, Run
from hosl_cloud.sentences import counted
from hosl_protocol.run.manifest import Manifest


@dataclass(eq=False)
class Slot:
    """The run that a bundle's devices take part in: from before it is loaded until another takes its place."""

    run: str
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
        """Whether it waits for room on the disk."""
        return self.is_waiting_for_room or (
            self.coordinator is not None and self.coordinator.keeper.is_waiting_for_room
        )


def course_of(run: Run) -> str:
    """What a run does from here on."""
    what, config = f"{run.config.algorithm} on {run.bundle.name}", run.config
    if run.round:
        return f"{what}, rounds {run.round + 1} to {config.rounds}"
    return f"{what}, {counted(config.rounds, 'round')}, begins with {counted(config.devices.start_with, 'device')}"
