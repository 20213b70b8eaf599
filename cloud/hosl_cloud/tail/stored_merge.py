"""Merging a run as the data folder holds it: the devices' half replayed, the tail of a checkpoint, one model folder.

What writes the folder is tail/merge.py. Slow, off the event loop; a service may train the run meanwhile.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hosl_cloud.storage.evaluations import ClassFigures, show_evaluation
from hosl_cloud.storage.mirror import replay_client
from hosl_cloud.storage.records import Evaluation
from hosl_cloud.storage.store import Store
from hosl_cloud.tail.checkpoint import CheckpointInfo, find_checkpoint, read_client
from hosl_cloud.tail.merge import PROMPT_FOLDER, Merged, Targets, merge_run
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import BundleError, check_files, load_manifest

log = logging.getLogger(__name__)

Which = Literal["best", "last"]


@dataclass(frozen=True)
class MergedRun:
    """What a run was merged to."""

    run: str
    merged: Merged
    prompt: Path | None
    """The folder of its soft prompt, where it has one."""
    before: Evaluation | None
    """The score before the first round, where there was one."""


def merge_stored(
    store: Store, id_: str, folder: Path, targets: Targets, *, which: Which, bundle: Path | None = None
) -> MergedRun:
    """Write the Hugging Face folder of a stored run, and what else of `targets` is asked for.

    `folder` is the run's, with its checkpoints; `bundle` stands for one that has moved since. Raises RunNotFound,
    ForeignSettings, BundleError, and what `merge_run` raises.
    """
    stored = store.run(id_)
    run = dataclasses.replace(stored, settings=stored.settings.for_merge(stored.id))
    if stored.settings.problem:
        log.warning("run %s: %s; it is merged without", run.id, stored.settings.problem)
    if run.config.baseline == "first-order":
        raise SettingsError("RUN", run.id, "its client half was trained first-order, and is gone with the simulation")

    bundle = bundle or run.bundle
    manifest = load_manifest(bundle)
    if manifest.shard_digest != run.shard_digest:
        raise BundleError(f"{bundle} is not the bundle of run {run.id}: name the right one with --bundle")
    check_files(bundle, manifest)

    checkpoint = find_checkpoint(folder, which)
    state = read_client(checkpoint.path, manifest)
    client = replay_client(store, run, bundle, manifest, checkpoint.info.round, state)
    before = next((each for each in store.evaluations(run.id) if each.round == 0), None)

    classes = _classes_of(store, run.id, checkpoint.info)
    merged = merge_run(bundle, manifest, client, checkpoint.path, targets, run.id, classes)
    prompt = targets.out / PROMPT_FOLDER if manifest.prompt_tokens else None
    return MergedRun(run.id, merged, prompt, before)


def _classes_of(store: Store, run: str, info: CheckpointInfo) -> list[ClassFigures]:
    """Find how each class fared at a checkpoint; none where its round was scored again since."""
    found, metrics = show_evaluation(store, run, info.round), info.metrics
    if found is None or metrics is None or (found.loss, found.right) != (metrics.loss, metrics.correct):
        return []
    return found.classes
