"""Going on with a run that was cut off: which run, from which checkpoint, and what of its rounds is dropped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hosl_cloud.exceptions import CheckpointError
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.records import RunRow
from hosl_cloud.storage.store import Store
from hosl_cloud.tail.checkpoint import Checkpoint, list_checkpoints, set_aside, verify
from hosl_protocol.run.manifest import Manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cut:
    """Where a run goes on."""

    round: int
    """The last round that is kept; 0 is the bundle."""
    epoch: int
    """A new one where rounds were dropped."""
    dropped: int
    """Rounds after the cut, which are kept as superseded and will be made again."""
    checkpoint: Checkpoint | None
    """The tail at that round; None for the bundle's own."""


def find_run(store: Store, manifest: Manifest, config: RunConfig) -> RunRow | None:
    """The run of this bundle and these settings: the newest unfinished one, or else the newest; no simulation."""
    for row in [*map(store.run, reversed(store.unfinished_runs())), *reversed(store.runs())]:
        is_same = not row.settings.problem and (row.shard_digest, row.config) == (manifest.shard_digest, config)
        if is_same and row.begun_by != "simulate":
            return row
    return None


def cut(store: Store, row: RunRow, folder: Path, say: Callable[[str], None]) -> Cut:
    """Choose the newest good checkpoint of the rounds in force, and drop the rounds after it, in one transaction."""
    checkpoint = _newest_good(store, row, folder, say)
    round_ = 0 if checkpoint is None else checkpoint.info.round
    epoch = store.cut_run(row.id, round_)
    return Cut(round_, epoch, row.round - round_, checkpoint)


def _newest_good(store: Store, row: RunRow, folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    for checkpoint in reversed(list_checkpoints(folder)):
        info = checkpoint.info
        latest = store.lowest_cut(row.id, info.epoch)
        if info.round > (row.round if latest is None else min(latest, row.round)):
            set_aside(checkpoint.path)  # of rounds that were dropped
            continue
        try:
            verify(checkpoint.path)
        except CheckpointError as error:
            say(f"{error}; the one before it is used")
            set_aside(checkpoint.path)
            continue
        return checkpoint
    return None
