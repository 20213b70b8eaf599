"""Snapshots on the cloud: when one is offered, what is in it, how many are kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors import safe_open

from hosl_cloud.runs.run import Run
from hosl_cloud.runs.snapshots import KEPT, MARGIN, Snapshots, is_snapshot_faster
from hosl_cloud.settings import parse_config
from hosl_cloud.storage.store import Store
from hosl_protocol.run.manifest import load_manifest, sha256_of_file
from hosl_protocol.run.updates import UpdateShape
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.weights.state import SnapshotHeader
from hosl_protocol.wire.messages import Hello, Snapshot
from support import ROOT, TASK

MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> MakeRun:
    def make(**client: Any) -> Run:
        bundle = export_bundle(tiny_model, "lora", 2)
        manifest = load_manifest(bundle)
        settings = {**msgspec.toml.decode(TASK), "rounds": 10**6, "max_length": 16, "client": client}
        store = Store(tmp_path / "hosl.sqlite")
        run = Run("r", parse_config(settings, manifest), manifest, bundle, tmp_path / "run", store)
        run.load()
        return run

    return make


def advance(run: Run, rounds: int, size: float = 2.0**-12) -> None:
    for _ in range(rounds):
        run.apply(UpdateRecord(run.round + 1, np.array([size, -size], np.float32), 0.25))
        run.round += 1


async def compute(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


def hello(rounds: float, size_bytes: int) -> Hello:
    """Of a device for which a download pays after more than `rounds` rounds of two coefficients."""
    return Hello(
        software="test",
        device="pi",
        shard_digest="0" * 64,
        data_digest="0" * 64,
        replay_s=1.0,
        link_bytes_per_s=(MARGIN * size_bytes - 8 * rounds) / (2 * rounds),
    )


def size_of(run: Run) -> int:
    return sum(values.nbytes for _, _, values in run.mirror.state().arrays())


def offer(snapshots: Snapshots, applied: int, rounds: float = 10.0) -> Snapshot | None:
    return asyncio.run(snapshots.offer(hello(rounds, size_of(snapshots.run)), applied))


def test_a_download_must_beat_the_replay_by_the_margin() -> None:
    download_s, update = 1000 / 10.0, UpdateShape(coefficients=1)
    assert not is_snapshot_faster(1, update, 1000, MARGIN * download_s - 0.4, 10.0)
    assert is_snapshot_faster(1, update, 1000, MARGIN * download_s - 0.3, 10.0), "its four bytes take 0.4 s"


def test_the_bytes_of_missed_updates_count() -> None:
    update = UpdateShape(coefficients=240, codes=46_080)  # of LoRA at one bit; AdamW's state is 96 of them
    replaying = [is_snapshot_faster(rounds, update, 12 * 368_640, 1e-9, 1e6) for rounds in (140, 150)]
    assert replaying == [False, True]


def test_the_specification_states_the_margin() -> None:
    text = (ROOT / "protocol" / "README.md").read_text(encoding="utf-8")
    assert f"`link_bytes_per_s`) > {MARGIN:g} · size / `link_bytes_per_s`" in text


@pytest.mark.parametrize("figures", [(0.0, 10.0), (1.0, 0.0), (0.0, 0.0)])
def test_without_figures_a_device_replays(figures: tuple[float, float]) -> None:
    assert not is_snapshot_faster(10**9, UpdateShape(coefficients=1, codes=10**6), 1, *figures)


@pytest.mark.parametrize("client", [{}, {"optimizer": "adamw"}])
def test_a_device_within_the_break_even_replays_and_one_beyond_is_offered_a_snapshot(
    make_run: MakeRun, client: dict[str, Any]
) -> None:
    run = make_run(**client)
    advance(run, 12)
    snapshots = Snapshots(run, compute)
    assert offer(snapshots, applied=2) is None
    assert not list(run.folder.glob("*"))
    made = offer(snapshots, applied=1)
    assert made is not None
    path = snapshots.path(12)
    assert path is not None
    assert made == Snapshot(round=12, size_bytes=path.stat().st_size, sha256=sha256_of_file(path))


@pytest.mark.parametrize("client", [{}, {"optimizer": "adamw"}])
def test_a_snapshot_holds_the_state_under_the_manifests_names(make_run: MakeRun, client: dict[str, Any]) -> None:
    run = make_run(**client)
    advance(run, 3)
    snapshots = Snapshots(run, compute)
    assert offer(snapshots, 0, rounds=1.0) is not None
    state = run.mirror.state()
    with safe_open(snapshots.path(3), framework="numpy") as file:
        header = msgspec.json.decode(file.metadata()["hosl"], type=SnapshotHeader)
        names = set(file.keys())
        for name, tensor, values in state.arrays():
            shape = next(entry.shape for entry in run.manifest.trainable if entry.name == tensor)
            got = file.get_tensor(name)
            assert got.shape == shape
            assert got.tobytes() == values.tobytes()
            names.remove(name)
    assert names == set()
    assert (header.run, header.epoch, header.round) == ("r", 0, 3)
    assert header.weights_digest == run.mirror.digest()
    assert header.exponents == {entry.name: entry.exponent for entry in run.manifest.trainable}
    assert header.steps == (3 if client else None)


def test_a_relattice_event_shows_in_the_exponents(make_run: MakeRun) -> None:
    run = make_run(optimizer="adamw")
    while not run.mirror.coarsenings:
        advance(run, 1)
    snapshots = Snapshots(run, compute)
    offer(snapshots, 0, rounds=0.1)
    path = snapshots.path(run.round)
    assert path is not None
    data = path.read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["hosl"]
    event = run.mirror.coarsenings[0]
    assert json.loads(metadata)["exponents"][event.tensor] == event.exponent


def test_one_file_serves_devices_until_a_new_one_would_save_them_enough(make_run: MakeRun) -> None:
    run = make_run()
    snapshots = Snapshots(run, compute)
    advance(run, 20)
    first = offer(snapshots, 0)
    advance(run, 5)
    assert offer(snapshots, 0) == offer(snapshots, 3) == first, "the five rounds since are replayed"
    advance(run, 6)
    newer = offer(snapshots, 0)
    assert newer is not None
    assert newer.round == 31


def test_an_old_snapshot_that_would_not_help_is_not_offered(make_run: MakeRun) -> None:
    run = make_run()
    snapshots = Snapshots(run, compute)
    advance(run, 20)
    offer(snapshots, 0)
    advance(run, 9)
    made = offer(snapshots, applied=15)
    assert made is not None
    assert made.round == 29, "of round 20 it would save 5 rounds and leave 9"


def test_devices_that_come_at_once_share_one(make_run: MakeRun) -> None:
    run = make_run()
    advance(run, 20)
    copies: list[int] = []

    async def counted(work: Callable[[], Any]) -> Any:
        copies.append(run.round)
        return await compute(work)

    snapshots = Snapshots(run, counted)

    async def main() -> list[Snapshot | None]:
        return await asyncio.gather(*(snapshots.offer(hello(10.0, size_of(run)), 0) for _ in range(5)))

    assert len(set(asyncio.run(main()))) == 1
    assert copies == [20]


def test_the_newest_two_are_kept_and_nothing_else(make_run: MakeRun) -> None:
    run = make_run()
    run.folder.mkdir()
    (run.folder / "snapshot-epoch-0000-round-000001.safetensors.part").write_bytes(b"of a crash")
    (run.folder / "epoch-0000-round-000001.json").write_bytes(b"a checkpoint's")
    snapshots = Snapshots(run, compute)
    for _ in range(4):
        advance(run, 20)
        offer(snapshots, 0)
    assert KEPT == 2
    assert [snapshots.path(round_) is not None for round_ in (20, 40, 60, 80)] == [False, False, True, True]
    names = sorted(path.name for path in run.folder.iterdir())
    rounds = [f"snapshot-epoch-0000-round-0000{round_}.safetensors" for round_ in (60, 80)]
    assert names == ["epoch-0000-round-000001.json", *rounds]


def test_a_snapshot_of_another_epoch_is_not_served(make_run: MakeRun) -> None:
    run = make_run()
    snapshots = Snapshots(run, compute)
    advance(run, 20)
    offer(snapshots, 0)
    run.epoch += 1
    assert snapshots.path(20) is None


def test_nobody_is_given_a_round_that_is_not_in_the_store_yet(make_run: MakeRun) -> None:
    run = make_run()
    snapshots = Snapshots(run, compute)
    advance(run, 20)
    run.round = 19  # the mirror has moved; the store has not

    async def main() -> Snapshot | None:
        offered = asyncio.create_task(snapshots.offer(hello(10.0, size_of(run)), 0))
        await asyncio.sleep(0.1)
        assert not offered.done()
        run.round = 20
        return await offered

    made = asyncio.run(main())
    assert made is not None
    assert made.round == 20


def test_a_disk_that_cannot_be_written_means_replay(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    run = make_run()
    advance(run, 20)
    monkeypatch.setattr("hosl_cloud.runs.snapshots.write_snapshot", full)
    assert offer(Snapshots(run, compute), 0) is None
    assert "no snapshot can be made" in caplog.text
