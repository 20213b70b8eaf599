"""Which run a restarted service goes on with, and from which checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hosl_cloud.runs.admission import _plan
from hosl_cloud.runs.coordinator import Coordinator
from hosl_cloud.runs.queue import RunQueue
from hosl_cloud.runs.resume import ResumePoint, find_run, rewind_to_checkpoint
from hosl_cloud.runs.run import Run
from hosl_cloud.runs.selection import DeviceSelection
from hosl_cloud.service.opening import ahead_of, choose_first
from hosl_cloud.storage.records import Evaluation
from hosl_cloud.storage.store import Store
from hosl_cloud.tail.checkpoint import list_checkpoints, save_checkpoint
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.messages import Hello


class Site:
    """A store with one run that was cut off, and its checkpoints."""

    def __init__(self, bundle: Any, folder: Path) -> None:
        self.bundle, self.folder = bundle, folder / "run-1"
        self.trainer = bundle.trainer()
        self.config = self.trainer.config
        self.store = Store(folder / "hosl.sqlite")
        self.store.create_run("run-1", bundle.path, bundle.manifest.shard_digest, self.config)
        self.store.set_state("run-1", "running")
        self.said: list[str] = []

    def make_rounds(self, last: int, epoch: int = 0, checkpoints: tuple[int, ...] = ()) -> None:
        for round_ in range(self.store.run("run-1").round + 1, last + 1):
            update = UpdateRecord(round_, np.ones(2, np.float32), 0.0)
            self.store.add_round("run-1", epoch, update, seconds=1.0, loss=1.0, devices=["a"])
            if round_ in checkpoints:
                save_checkpoint(self.folder, round_, epoch, self.trainer, self.config)

    def rewind(self) -> ResumePoint:
        return rewind_to_checkpoint(self.store, self.store.run("run-1"), self.folder, self.said.append)

    def in_force(self) -> list[int]:
        return [update.round for update in self.store.updates("run-1", 1, 1000)]


@pytest.fixture
def site(bundle: Any, tmp_path: Path) -> Site:
    return Site(bundle, tmp_path)


def test_the_newest_checkpoint_decides(site: Site) -> None:
    site.make_rounds(11, checkpoints=(4, 8))
    found = site.rewind()
    assert found.checkpoint is not None
    assert (found.round, found.epoch, found.dropped) == (8, 1, 3)
    assert found.checkpoint.info.round == 8
    assert site.in_force() == list(range(1, 9))


def test_without_a_checkpoint_the_run_begins_again_at_the_bundle(site: Site) -> None:
    site.make_rounds(5)
    assert site.rewind() == ResumePoint(0, 1, 5, None)
    assert site.in_force() == []


def test_a_checkpoint_at_the_last_round_drops_nothing(site: Site) -> None:
    site.make_rounds(4, checkpoints=(4,))
    found = site.rewind()
    assert (found.round, found.epoch, found.dropped) == (4, 0, 0)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(site: Site, damage: str) -> None:
    site.make_rounds(11, checkpoints=(4, 8))
    path = site.folder / "epoch-0000-round-000008.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-7])
    elif damage == "gone":
        path.unlink()
    else:
        path.with_suffix(".json").write_text("{", encoding="ascii")
    found = site.rewind()
    assert (found.round, found.dropped) == (4, 7)
    if damage != "json":
        assert "epoch-0000-round-000008" in site.said[0]
        assert [each.info.round for each in list_checkpoints(site.folder)] == [4]


def test_a_checkpoint_of_rounds_that_were_dropped_is_not_used_again(site: Site) -> None:
    site.make_rounds(11, checkpoints=(4, 8))
    later = site.folder / "epoch-0000-round-000008.safetensors"
    good = later.read_bytes()
    later.write_bytes(good[:-1])
    assert site.rewind().round == 4
    for path in site.folder.glob("*.aside"):  # somebody puts the old files back
        path.replace(path.with_name(path.name.removesuffix(".aside")))
    later.write_bytes(good)
    site.make_rounds(6, epoch=1)
    found = site.rewind()
    assert (found.round, found.epoch, found.dropped) == (4, 2, 2)


def test_a_run_of_other_settings_or_another_bundle_is_not_gone_on_with(site: Site) -> None:
    manifest = site.bundle.manifest
    found = find_run(site.store, manifest, site.config)
    assert found is not None
    assert found.id == "run-1"
    assert find_run(site.store, manifest, msgspec.structs.replace(site.config, seed=99)) is None
    other = msgspec.structs.replace(manifest, tensors=(), split=2, files=())
    assert (find_run(site.store, other, site.config) is None) == (other.shard_digest != manifest.shard_digest)


def test_an_unfinished_run_goes_before_a_newer_one_that_is_over_and_a_simulation_counts_as_none(site: Site) -> None:
    def found() -> str | None:
        row = find_run(site.store, site.bundle.manifest, site.config)
        return None if row is None else row.id

    for name, begun_by in (("run-2", "serve"), ("run-3", "simulate")):
        site.store.create_run(name, site.bundle.path, site.bundle.manifest.shard_digest, site.config, begun_by)
        site.store.set_state(name, "completed")
    assert found() == "run-1"
    site.store.set_state("run-1", "stopped")
    assert found() == "run-2"


def serve(site: Site, seed: int = 5, *, new: bool = False) -> str | None:
    """What `serve --config` chooses, with settings of this seed."""
    config = msgspec.structs.replace(site.config, seed=seed)
    runs = RunQueue(site.store, site.folder.parent, site.said.append)
    return choose_first(runs, site.bundle.path, site.bundle.manifest, config, begins_anew=new)


def test_serve_with_a_config_typed_again_goes_on_with_its_run_and_begins_no_second_one(site: Site) -> None:
    first = serve(site, seed=6)
    assert first is not None
    assert (serve(site, seed=6), site.store.run_ids()) == (first, ["run-1", first])
    site.store.set_state(first, "completed")
    assert serve(site, seed=6) is None
    assert site.said == [f"run {first} of these settings is completed; --new begins another"]
    assert site.store.run_ids() == ["run-1", first]
    site.store.set_state(first, "failed")
    assert serve(site, seed=6) not in (None, first)


def test_a_run_that_somebody_started_is_never_stopped_and_goes_first(site: Site) -> None:
    run = serve(site, seed=6)
    assert run is not None
    assert site.store.run("run-1").state == "running"
    assert ahead_of(site.store, run) == ["run-1"]
    assert (ahead_of(site.store, "run-1"), site.said) == ([], [])


def test_edited_settings_stop_the_run_that_an_earlier_serve_began_and_say_how_it_goes_on(site: Site) -> None:
    first, second = serve(site, seed=6), serve(site, seed=7)
    assert first is not None
    assert site.store.run(first).state == "stopped"
    command = f"hosl-cloud run resume {first} --data-dir {site.folder.parent}"
    assert site.said == [f"run {first} (other settings) is stopped; {command} goes on with it"]
    assert serve(site, seed=7, new=True) not in (None, first, second)
    assert site.said[1].startswith(f"run {second} (--new was given) is stopped; ")


def hello(**more: Any) -> Hello:
    return Hello(software="t", device="a", shard_digest="0" * 64, data_digest="0" * 64, **more)


@pytest.mark.parametrize(
    ("journal", "cut_round", "expected"),
    [
        ({}, None, ("continue", 0)),
        ({"run": "run-1", "epoch": 2, "applied_round": 7}, None, ("continue", 7)),
        ({"run": "run-1", "epoch": 2, "applied_round": 11}, None, ("rebuild", 0)),  # ahead, with no cut to explain it
        ({"run": "run-1", "epoch": 3, "applied_round": 1}, None, ("rebuild", 0)),
        ({"run": "other", "epoch": 2, "applied_round": 1}, None, ("rebuild", 0)),
        ({"run": "run-1", "epoch": 1, "applied_round": 5}, 5, ("continue", 5)),
        ({"run": "run-1", "epoch": 1, "applied_round": 9}, 5, ("rewind", 5)),
        ({"run": "run-1", "epoch": 0, "applied_round": 99}, 3, ("rewind", 3)),
        ({"run": "run-1", "epoch": 0, "applied_round": 99, "base_round": 3}, 3, ("rewind", 3)),
        ({"run": "run-1", "epoch": 0, "applied_round": 99, "base_round": 4}, 3, ("rebuild", 0)),
    ],
)
def test_a_device_goes_back_to_the_lowest_cut_since_its_epoch(
    make_bundle: Callable[..., Any], tmp_path: Path, journal: dict[str, Any], cut_round: int | None, expected: Any
) -> None:
    bundle = make_bundle()
    store = Store(tmp_path / "hosl.sqlite")
    run = Run("run-1", bundle.config(), bundle.manifest, bundle.path, tmp_path, store, epoch=2, round=10)
    assert _plan(run, hello(**journal), cut_round) == expected


def test_an_evaluation_that_a_stop_left_out_is_made_up_for_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    last = site.config.rounds
    scored: list[int] = []

    async def score(self: Coordinator) -> Evaluation:
        scored.append(self.run.round)
        return Evaluation(self.run.round, 0.5, 3, 4)

    async def resume() -> None:
        run = Run("run-1", site.config, site.bundle.manifest, site.bundle.path, site.folder, site.store, round=last)
        coordinator = Coordinator(run, site.said.append)
        await coordinator.prepare(list_checkpoints(site.folder)[-1].path)
        assert await coordinator.train() == "completed"
        coordinator.close()

    monkeypatch.setattr(Coordinator, "_score", score)
    monkeypatch.setattr(Run, "load", lambda self, state: None)
    monkeypatch.setattr(DeviceSelection, "wait_for_quorum", lambda self: asyncio.sleep(0))
    site.make_rounds(last, checkpoints=(last,))
    for _ in range(2):
        asyncio.run(resume())
    assert scored == [last]
    metrics = list_checkpoints(site.folder)[-1].info.metrics
    assert metrics is not None
    assert (metrics.correct, metrics.scored) == (3, 4)
