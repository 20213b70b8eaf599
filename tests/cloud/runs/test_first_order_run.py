"""A first-order run on disk: which updates stay, what a checkpoint holds, and who is brought up by what."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import msgspec
import numpy as np
import pytest

from hosl_cloud.exceptions import StoreError
from hosl_cloud.runs import admission, backlog
from hosl_cloud.runs.backlog import Backlog
from hosl_cloud.runs.fleet import Fleet
from hosl_cloud.runs.run import KEPT_STATES, LEAST_KEPT, Run
from hosl_cloud.runs.snapshots import MARGIN, Snapshots
from hosl_cloud.settings import parse_config
from hosl_cloud.storage.mirror import replay_client
from hosl_cloud.storage.store import Store
from hosl_edge.history.snapshot import read_snapshot
from hosl_protocol.run.manifest import load_manifest
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.messages import CatchUp, Hello, Message, Refusal, Snapshot, Update, Welcome
from services import Service, serving
from speaking import client
from support import TASK

SETTINGS = {
    **msgspec.toml.decode(TASK),
    "algorithm": "first-order",
    "rounds": 10**6,
    "max_length": 16,
    "devices": {"start_with": 2},
}


@pytest.fixture
def bundle(export_bundle: Callable[..., Path], tiny_model: Path) -> Path:
    return export_bundle(tiny_model, "lora", 2)


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(bundle: Path, tmp_path: Path) -> MakeRun:
    def make(**settings: Any) -> Run:
        manifest = load_manifest(bundle)
        config = parse_config({**SETTINGS, **settings}, manifest)
        store = Store(tmp_path / "hosl.sqlite")
        if store.find_run("r") is None:
            store.create_run("r", bundle, manifest.shard_digest, config)
        return Run("r", config, manifest, bundle, tmp_path / "run", store)

    return make


def advance(run: Run, rounds: int) -> None:
    """Rounds of random gradients, stored as the Coordinator does."""
    for _ in range(rounds):
        add(run, update_of(run, run.round + 1))


def update_of(run: Run, round_: int) -> UpdateRecord:
    generator, shape = np.random.default_rng(round_), run.update_shape
    codes = generator.integers(0, 256, shape.codes, np.uint8)
    return UpdateRecord(round_, generator.random(shape.coefficients, np.float32) * np.float32(1e-3), 1e-3, codes)


def add(run: Run, update: UpdateRecord, loss: float = 0.0) -> None:
    run.apply(update)
    assert run.kept_updates is not None
    pruned = max(update.round - run.kept_updates, 0)
    run.store.add_round(run.id, run.epoch, update, seconds=0.0, loss=loss, devices=[], pruned=pruned)
    run.round, run.pruned_to = update.round, max(pruned, run.pruned_to)


def reload(run: Run, path: Path | None) -> Run:
    """The run as another service loads it, from a file that `write_state` wrote."""
    again = Run(run.id, run.config, run.manifest, run.bundle, run.folder, run.store, run.epoch, run.round)
    state = None if path is None else read_snapshot(path, run.write_state(path).sha256, run.manifest)[1]
    again.load(state)
    return again


def test_as_many_updates_stay_as_take_the_room_of_three_states(make_run: MakeRun) -> None:
    for settings in ({"gradient_bits": 1}, {"gradient_bits": 1, "client": {"optimizer": "sgd"}}):
        run = make_run(**settings)
        assert run.kept_updates is not None
        kept_bytes = run.kept_updates * run.update_shape.size_bytes
        assert 0 <= kept_bytes - KEPT_STATES * run.state_bytes < run.update_shape.size_bytes
    assert make_run(gradient_bits=32).kept_updates == LEAST_KEPT
    assert make_run(algorithm="ho-sfl").kept_updates is None


def test_a_device_that_may_replay_finds_the_updates_while_rounds_go_on() -> None:
    assert KEPT_STATES >= 2 * MARGIN


@pytest.mark.parametrize("client", [{}, {"optimizer": "sgd"}])
def test_a_run_goes_on_from_its_checkpoints_state_with_the_same_bits(
    make_run: MakeRun, tmp_path: Path, client: dict[str, Any]
) -> None:
    run = make_run(gradient_bits=32, client=client)
    run.load()
    advance(run, LEAST_KEPT + 4)
    again = reload(run, tmp_path / "state.safetensors")
    assert again.mirror.digest() == run.mirror.digest()
    assert (again.mirror.applied_round, again.pruned_to) == (LEAST_KEPT + 4, 4)
    update = update_of(run, run.round + 1)
    for each in (run, again):
        each.apply(update)
    assert again.mirror.digest() == run.mirror.digest()
    with pytest.raises(StoreError, match="the update of round 1 is missing"):
        reload(run, None)


def test_a_merge_begins_at_the_checkpoints_state(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(gradient_bits=32)
    run.load()
    advance(run, LEAST_KEPT + 2)
    path = tmp_path / "state.safetensors"
    state = read_snapshot(path, run.write_state(path).sha256, run.manifest)[1]
    merged = replay_client(run.store, run.store.run("r"), run.bundle, run.manifest, run.round, state)
    for tensor in run.mirror.tensors:
        assert merged[tensor.name].tobytes() == tensor.values.tobytes()
    assert merged.keys() > {tensor.name for tensor in run.mirror.tensors}


async def compute(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


def hello(**figures: float) -> Hello:
    return Hello(software="t", device="pi", shard_digest="0" * 64, data_digest="0" * 64, **figures)  # type: ignore[arg-type]


def test_a_device_that_lacks_what_is_kept_no_more_is_offered_a_snapshot_whatever_its_figures(
    make_run: MakeRun,
) -> None:
    run = make_run(gradient_bits=32)
    run.load()
    advance(run, LEAST_KEPT + 5)
    snapshots = Snapshots(run, compute)

    def offer(applied: int) -> Snapshot | None:
        return asyncio.run(snapshots.offer(hello(), applied))

    assert run.pruned_to == 5
    assert offer(run.round - int(MARGIN * run.state_bytes / run.update_shape.size_bytes)) is None
    made = offer(4)
    assert made is not None
    assert made.round == LEAST_KEPT + 5
    advance(run, 3)
    assert offer(4) == made, "its three rounds behind are kept"
    advance(run, LEAST_KEPT)
    newer = offer(4)
    assert newer is not None
    assert newer.round == run.round, "of the old one's round the updates are gone"


def test_a_device_of_unknown_figures_gets_a_snapshot_that_leaves_it_little_to_fetch(make_run: MakeRun) -> None:
    run = make_run(gradient_bits=8)
    run.load()
    assert run.kept_updates is not None
    advance(run, run.kept_updates + 1)
    snapshots, near = Snapshots(run, compute), int(MARGIN * run.state_bytes / run.update_shape.size_bytes)
    first = asyncio.run(snapshots.offer(hello(), 0))
    advance(run, near)
    assert asyncio.run(snapshots.offer(hello(), 0)) == first
    advance(run, 1)
    newer = asyncio.run(snapshots.offer(hello(), 0))
    assert newer is not None
    assert newer.round == run.round, "the updates since the first are more than a snapshot, and all are kept"
    assert first is not None
    assert first.round >= run.pruned_to


def test_bytes_of_missed_updates_make_a_download_worth_while(make_run: MakeRun) -> None:
    run = make_run(gradient_bits=8)
    run.load()
    break_even = int(MARGIN * run.state_bytes / run.update_shape.size_bytes)
    advance(run, break_even + 1)
    for figures in ({"replay_s": 1e-12, "link_bytes_per_s": 1e6}, {}):
        assert asyncio.run(Snapshots(run, compute).offer(hello(**figures), 1)) is None
        assert asyncio.run(Snapshots(run, compute).offer(hello(**figures), 0)) is not None


@pytest.fixture
def serve(bundle: Path, tmp_path: Path) -> Callable[..., None]:
    """Run a test against a service of a first-order run."""

    def serve(test: Callable[[Service], Awaitable[None]], **settings: Any) -> None:
        async def main() -> None:
            async with serving(bundle, tmp_path / "cloud", {**SETTINGS, **settings}) as service:
                await asyncio.wait_for(test(service), 30.0)

        asyncio.run(main())

    return serve


def test_who_cannot_replay_joins_by_a_snapshot_and_rebuilds_by_another(serve: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        run = service.coordinator.run
        await asyncio.to_thread(advance, run, LEAST_KEPT + 2)
        async with client(service) as device:
            await device.send(device.hello())
            for _ in range(2):
                welcome, catch_up = await device.receive(), await device.receive()
                assert isinstance(welcome, Welcome)
                assert isinstance(catch_up, CatchUp)
                assert welcome.snapshot is not None
                assert (welcome.plan, welcome.snapshot.round) == ("snapshot", run.round)
                assert (catch_up.first_round, catch_up.last) == (run.round + 1, True)
                await device.send(msgspec.structs.replace(device.ready("0" * 64), applied_round=run.round))
            assert (await device.refusal()).code == "weights"

    serve(test, gradient_bits=32)


def test_without_room_for_a_snapshot_who_cannot_replay_comes_back_later(
    serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hosl_cloud.runs.snapshots.write_snapshot", full)

    async def test(service: Service) -> None:
        await asyncio.to_thread(advance, service.coordinator.run, LEAST_KEPT + 2)
        async with client(service) as device:
            await device.send(device.hello())
            refusal = await device.refusal()
            assert (refusal.code, refusal.retry) == ("run", True)
            assert "kept no more" in refusal.reason

    serve(test, gradient_bits=32)


def test_a_device_is_sent_no_gap_where_a_round_drops_an_update_while_it_joins(serve: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        run = service.coordinator.run
        await asyncio.to_thread(advance, run, 4)
        # As far as a round has come that is stored, and that the run does not know of yet.
        update = update_of(run, 5)
        await asyncio.to_thread(
            lambda: run.store.add_round(run.id, 0, update, seconds=0.0, loss=0.0, devices=[], pruned=1)
        )
        assert (run.round, run.pruned_to) == (4, 0)
        async with client(service) as device:
            await device.send(device.hello())
            assert isinstance(await device.receive(), Welcome)
            refusal = await device.receive()
            assert isinstance(refusal, Refusal)
            assert (refusal.code, refusal.retry) == ("run", True)

    serve(test, gradient_bits=32)


def test_large_updates_are_caught_up_with_a_few_at_a_time(
    serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(service: Service) -> None:
        run = service.coordinator.run
        await asyncio.to_thread(advance, run, 7)
        monkeypatch.setattr(admission, "CATCH_UP_BYTES", 3 * run.update_shape.size_bytes + 1)
        async with client(service) as device:
            await device.send(device.hello())
            assert isinstance(await device.receive(), Welcome)
            firsts = []
            for last in (False, False, True):
                catch_up = await device.receive()
                assert isinstance(catch_up, CatchUp)
                assert catch_up.last == last
                firsts.append(catch_up.first_round)
            assert firsts == [1, 4, 7]

    serve(test)


class Taker:
    """A participant that takes whatever it is told; of a Peer it has what a backlog asks."""

    def __init__(self, sent_round: int, eval_examples: int = 0) -> None:
        self.name, self.is_ready, self.sent_round, self.eval_examples = "pi", True, sent_round, eval_examples
        self.told: list[Message] = []
        self.losses: list[float] = []

    def tell(self, message: Message, tensors: Mapping[str, Any] | None = None) -> None:
        self.told.append(message)
        if tensors:
            self.losses.append(float(tensors["loss"]))

    end = tell

    async def emptied(self, timeout_s: float) -> None: ...


def cleared(run: Run, peer: Taker, **how: bool) -> set[str] | None:
    """Who was sent for a snapshot; None where all was sent."""
    fleet = Fleet(compute, AsyncMock())
    fleet.peers["pi"] = peer  # type: ignore[assignment]
    backlog = Backlog(run, fleet)
    return None if asyncio.run(backlog.clear(["pi", "away"], **how)) else backlog.awaited


def test_who_took_no_part_gets_what_it_missed_in_order_a_few_at_a_time(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(gradient_bits=8)
    run.load()
    monkeypatch.setattr(admission, "CATCH_UP_BYTES", 2 * run.update_shape.size_bytes)
    for number in range(7):
        add(run, update_of(run, run.round + 1), loss=number / 2)
    peer = Taker(sent_round=2)
    assert cleared(run, peer) is None
    assert [message.round for message in peer.told if isinstance(message, Update)] == [3, 4, 5, 6, 7]
    assert peer.losses == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert peer.sent_round == 7
    assert cleared(run, peer) is None
    assert len(peer.told) == 5, "it is up to date"


def test_who_missed_more_than_a_snapshot_takes_is_to_come_back_for_one_but_for_an_evaluator(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(gradient_bits=8)
    run.load()
    break_even = int(MARGIN * run.state_bytes / run.update_shape.size_bytes)
    advance(run, break_even + 1)
    assert cleared(run, Taker(0)) is None, "to connect again costs bytes, too"
    monkeypatch.setattr(backlog, "RECONNECT_BYTES", 0)

    assert cleared(run, Taker(1)) is None
    assert cleared(run, Taker(0, eval_examples=5)) is None
    leaving = Taker(0)
    assert cleared(run, leaving, may_leave=False) is None
    assert (leaving.told, leaving.is_ready) == ([], True)
    assert cleared(run, leaving) == {"pi"}
    (refusal,) = leaving.told
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.retry, leaving.is_ready) == ("run", True, False)


def test_an_evaluator_gets_updates_before_they_are_dropped(make_run: MakeRun) -> None:
    run = make_run(gradient_bits=32)
    run.load()
    advance(run, LEAST_KEPT)
    for peer, expected in ((Taker(0, eval_examples=5), LEAST_KEPT), (Taker(0), 0), (Taker(1, eval_examples=5), 1)):
        fleet = Fleet(compute, AsyncMock())
        fleet.peers["pi"] = peer  # type: ignore[assignment]
        asyncio.run(Backlog(run, fleet).rescue(pruned_to=1))
        assert peer.sent_round == expected
