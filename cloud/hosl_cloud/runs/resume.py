"""Going on with a run that was cut off. This is the whole story, and where each part of it is:

1. Which run. `hosl-cloud serve` goes on with the run of its bundle and settings (`find_run`, which service/opening.py
   asks). All other unfinished runs have their turn as the store lists them (RunQueue.work in runs/queue.py).
2. From where. `rewind_to_checkpoint` takes the newest good checkpoint. Rounds after it are marked superseded in the
   store, never deleted, and a new epoch begins (Store.rewind_run).
3. What is loaded. `load_run` makes the Run and its Coordinator, whose `prepare` loads the tail (tail/checkpoint.py) and
   replays the stored updates into the mirror of the devices' weights (Run.load in runs/run.py).
4. The devices. One that comes back says its epoch and round. runs/admission.py tells it to continue, to rewind, to
   rebuild, or to take a snapshot (`_plan` there, and runs/snapshots.py).
5. The next round. Coordinator.train first makes up for an evaluation that was due.

It holds because of an order. A round's step of the tail is in memory alone; then its update is added to the mirror, is
stored, and is sent (Coordinator._commit_round: no device has what the store lacks). Then come an evaluation that is
due, and the checkpoint, which alone keeps the tail (Coordinator.train). So rounds after the last checkpoint, though
stored and sent, lack their tail, and are made again. A checkpoint counts only once its files are whole
(tail/checkpoint.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hosl_cloud.exceptions import CheckpointError
from hosl_cloud.runs.coordinator import Coordinator, MakeTail
from hosl_cloud.runs.current_run import CurrentRun
from hosl_cloud.runs.progress import Listener
from hosl_cloud.runs.run import Run
from hosl_cloud.sentences import advise, counted
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.disk_space import when_there_is_room
from hosl_cloud.storage.records import RunRow
from hosl_cloud.storage.store import Store
from hosl_cloud.tail.checkpoint import Checkpoint, list_checkpoints, quarantine, verify
from hosl_protocol.run.manifest import Manifest, check_files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on."""

    round: int
    """The last round that is kept; 0 is the bundle."""
    epoch: int
    """A new one where rounds were dropped."""
    dropped: int
    """Rounds after that one, which are kept as superseded and will be made again."""
    checkpoint: Checkpoint | None
    """The tail at that round; None for the bundle's own."""


def find_run(store: Store, manifest: Manifest, config: RunConfig) -> RunRow | None:
    """Find the run of this bundle and these settings: the newest unfinished one, or else the newest; no simulation."""
    for row in [*map(store.run, reversed(store.unfinished_runs())), *reversed(store.runs())]:
        is_same = not row.settings.problem and (row.shard_digest, row.config) == (manifest.shard_digest, config)
        if is_same and row.begun_by != "simulate":
            return row
    return None


async def load_run(
    current: CurrentRun,
    store: Store,
    folder: Path,
    say: Callable[[str], None],
    make_tail: MakeTail,
    listeners: list[Listener],
) -> Coordinator:
    """Load a run's newest good state from its `folder`, or the bundle's own. Called on the event loop.

    Waits while the disk is full. Raises BundleError, StoreError, and what loading the tail raises.
    """
    await asyncio.to_thread(check_files, current.bundle, current.manifest)
    row = await asyncio.to_thread(store.run, current.run)

    def notice(is_waiting: bool) -> None:
        current.is_waiting_for_room = is_waiting

    point = await when_there_is_room(
        lambda: asyncio.to_thread(rewind_to_checkpoint, store, row, folder, say), say, notice
    )
    if row.state != "pending" or row.round:
        again = f"; {point.dropped} rounds after it are made again" if point.dropped else ""
        say(f"run {row.id} resumes after round {point.round}{again}")

    run = Run(
        row.id,
        row.config,
        current.manifest,
        current.bundle,
        folder,
        store,
        epoch=point.epoch,
        round=point.round,
        listeners=listeners,
    )
    coordinator = Coordinator(run, say, make_tail=make_tail)
    try:
        await coordinator.prepare(None if point.checkpoint is None else point.checkpoint.path)
    except BaseException:
        coordinator.close()  # a cancelled load must not leave its compute thread behind
        raise
    say(f"run {row.id}: {_course_of(run)}")
    if not run.round and (advice := advise(run.settings, run.manifest)):
        say(advice)
    return coordinator


def rewind_to_checkpoint(store: Store, row: RunRow, folder: Path, say: Callable[[str], None]) -> ResumePoint:
    """Choose the newest good checkpoint of the rounds in force, and drop the rounds after it, in one transaction.

    Slow, off the event loop. Raises StoreError, and OSError on a full disk; to call it again then is safe.
    """
    checkpoint = _newest_good(store, row, folder, say)
    round_ = 0 if checkpoint is None else checkpoint.info.round
    epoch = store.rewind_run(row.id, round_)
    return ResumePoint(round_, epoch, row.round - round_, checkpoint)


def _newest_good(store: Store, row: RunRow, folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    for checkpoint in reversed(list_checkpoints(folder)):
        info = checkpoint.info

        # One of a former epoch is good only up to the lowest round to which the run was rewound since.
        rewound_to = store.lowest_rewind(row.id, info.epoch)
        if info.round > (row.round if rewound_to is None else min(rewound_to, row.round)):
            quarantine(checkpoint.path)
            continue

        try:
            verify(checkpoint.path)
        except CheckpointError as error:
            say(f"{error}; the one before it is used")
            quarantine(checkpoint.path)
            continue
        return checkpoint
    return None


def _course_of(run: Run) -> str:
    """Say what a run does from here on."""
    what, config = f"{run.config.algorithm} on {run.bundle.name}", run.config
    if run.round:
        return f"{what}, rounds {run.round + 1} to {config.rounds}"
    return f"{what}, {counted(config.rounds, 'round')}, begins with {counted(config.devices.start_with, 'device')}"
