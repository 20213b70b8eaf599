"""Devices that fall behind, start late or lose what they had: whichever way they catch up, all hold the same bits.

The cloud and the agents are whole, on a real port. Figures that make a snapshot worth it are put in the state folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hosl_cloud.runs.run import LEAST_KEPT
from hosl_edge import EdgeSettings, Summary, run_agent
from hosl_edge.connection.fetch import OnProgress, OnRate
from hosl_edge.history.journal import open_journal
from hosl_protocol.run.manifest import SHARD_WEIGHTS
from hosl_protocol.wire.messages import Snapshot
from services import Service, serving
from support import TASK, write_reviews

MakeBundle = Callable[[str, int], Path]

DEADLINE_S = 120.0
ADAMW = {"optimizer": "adamw", "learning_rate": 1e-3}
EVENTFUL = {"optimizer": "adamw", "learning_rate": 0.1}
"""Steps so long that weights which began below ±1 pass it after some ten rounds."""


class Site:
    """A service whose run goes on until a test has seen enough, and its devices."""

    def __init__(self, service: Service) -> None:
        self.service, self.folder = service, service.folder.parent
        self.agents: dict[str, asyncio.Task[Summary]] = {}

    def state(self, name: str) -> Path:
        return self.folder / "state" / name

    def start(self, name: str) -> None:
        data = self.folder / f"{name}.jsonl"
        settings = EdgeSettings(
            server=self.service.address,
            token_file=str(self.service.token_file),
            data=str(data if data.exists() else write_reviews(data, 20)),
            name=name,
            threads=1,
            state_dir=str(self.folder / "state"),
            cache_dir=str(self.folder / "cache" / name),
        )
        self.agents[name] = asyncio.create_task(run_agent(settings))

    async def stop(self, name: str) -> None:
        """End an agent as a signal does."""
        agent = self.agents.pop(name)
        agent.cancel()
        await asyncio.wait({agent})
        await self.until(lambda: name not in self.service.coordinator.fleet.peers)

    async def until(self, is_true: Callable[[], object]) -> None:
        while not is_true():
            assert not any(agent.done() for agent in self.agents.values()), self.service.said
            await asyncio.sleep(0.01)

    async def rounds(self, count: int) -> None:
        """Wait for so many more."""
        target = self.service.coordinator.run.round + count
        await self.until(lambda: self.service.coordinator.run.round >= target)

    async def is_back(self, name: str) -> None:
        await self.until(lambda: name in self.service.coordinator.fleet.ready_names())

    def let_snapshots_pay(self, name: str) -> None:
        """Say that the last download was faster than any."""
        self.state(name).mkdir(parents=True, exist_ok=True)
        (self.state(name) / "pace.json").write_text(json.dumps({"link_bytes_per_s": 1e12}))

    def base_round(self, name: str) -> int:
        """Where the device's journal begins."""
        found = open_journal(self.state(name))
        assert found is not None
        found.close()
        return found.header.base_round

    def snapshots_taken(self) -> int:
        return sum("takes a snapshot" in line for line in self.service.said)


def run_site(
    bundle: Path,
    folder: Path,
    test: Callable[[Site], Awaitable[None]],
    client: dict[str, Any] | None = None,
    **more: Any,
) -> None:
    """Run a test beside a device that stays; in the end all devices must hold the weights of the cloud's mirror."""
    settings = {
        **msgspec.toml.decode(TASK),
        "rounds": 10**6,
        "batch_size": 4,
        "max_length": 16,
        "report_every": 5,
        "client": client or {"learning_rate": 1e-4},
        "tail": {"device": "cpu", "learning_rate": 1e-6},
        "evaluation": {"every": 0},
        "devices": {"start_with": 1},
        **more,
    }

    async def main() -> None:
        async with serving(bundle, folder / "cloud", settings) as service:
            site = Site(service)
            site.start("stays")
            await asyncio.wait_for(test(site), DEADLINE_S)
            await service.coordinator.request_stop(pause=False)
            summaries = await asyncio.wait_for(asyncio.gather(*site.agents.values()), DEADLINE_S)
            with contextlib.suppress(asyncio.CancelledError):
                await service.serving
            assert len(summaries) > 1
            assert {summary.weights_digest for summary in summaries} == {service.coordinator.run.mirror.digest()}

    asyncio.run(main())


def flip(path: Path) -> None:
    """Change a bit; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("client", [None, ADAMW], ids=["sgd", "adamw"])
def test_devices_there_from_the_start_late_and_away_hold_the_same_weights_by_replay(
    make_bundle: MakeBundle, tmp_path: Path, client: dict[str, Any] | None
) -> None:
    async def test(site: Site) -> None:
        site.start("leaves")
        await site.is_back("leaves")
        await site.rounds(3)
        await site.stop("leaves")
        await site.rounds(40)
        for name in ("late", "leaves"):
            site.start(name)
        for name in ("late", "leaves"):
            await site.is_back(name)
        assert site.snapshots_taken() == 0, "the link's speed is not known"
        await site.rounds(5)

    run_site(make_bundle("lora", 2), tmp_path, test, client)


@pytest.mark.parametrize("client", [None, ADAMW, EVENTFUL], ids=["sgd", "adamw", "after an event"])
def test_devices_for_which_a_download_pays_go_on_from_a_snapshot(
    make_bundle: MakeBundle, tmp_path: Path, client: dict[str, Any] | None
) -> None:
    async def test(site: Site) -> None:
        site.start("leaves")
        await site.is_back("leaves")
        await site.rounds(3)
        await site.stop("leaves")
        await site.rounds(40)
        if client is EVENTFUL:
            await site.until(lambda: site.service.coordinator.run.mirror.coarsenings)
        for name in ("late", "leaves"):
            site.let_snapshots_pay(name)
            site.start(name)
        for name in ("late", "leaves"):
            await site.is_back(name)
            assert site.base_round(name) > 40
        assert site.snapshots_taken() == 2
        # Started once more: snapshot + journal, and what was missed meanwhile.
        await site.rounds(3)
        await site.stop("late")
        (site.state("late") / "pace.json").unlink()
        site.start("late")
        await site.is_back("late")
        assert site.snapshots_taken() == 2
        await site.rounds(3)

    run_site(make_bundle("lora", 2), tmp_path, test, client)


@pytest.mark.parametrize("bits", [1, 32])
def test_gradients_are_replayed_as_long_as_they_are_kept_and_then_a_snapshot_takes_their_place(
    make_bundle: MakeBundle, tmp_path: Path, bits: int
) -> None:
    async def test(site: Site) -> None:
        site.start("leaves")
        await site.is_back("leaves")
        await site.rounds(3)
        await site.stop("leaves")
        await site.rounds(LEAST_KEPT + 1)
        for name in ("leaves", "late"):
            site.start(name)
            await site.is_back(name)
        # Of few bits many more are kept, for they are small beside the weights.
        assert site.snapshots_taken() == (2 if bits == 32 else 0)
        await site.rounds(2)

    run_site(make_bundle("lora", 2), tmp_path, test, ADAMW, algorithm="first-order", gradient_bits=bits)


@pytest.mark.parametrize("bits", [1, 32])
def test_devices_that_take_turns_get_the_gradients_that_they_missed_or_a_snapshot(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    monkeypatch.setattr("hosl_cloud.runs.backlog.RECONNECT_BYTES", 0)
    monkeypatch.setattr("hosl_edge.agent.LONGEST_PAUSE_S", 0.2)  # 20
    devices = {"start_with": 4, "per_round": 1}

    async def test(site: Site) -> None:
        for name in ("first", "second", "third"):
            site.start(name)
        run = site.service.coordinator.run
        await site.until(lambda: run.round >= 1)
        assert min(peer.sent_round for peer in site.service.coordinator.fleet.peers.values()) < run.round, "it can wait"
        summaries = await asyncio.wait_for(asyncio.gather(*site.agents.values()), DEADLINE_S)
        assert {summary.weights_digest for summary in summaries} == {run.mirror.digest()}
        # Five rounds of 32 bits are more than a snapshot of the weights and AdamW's moments; of one bit, 145.
        assert bool(site.snapshots_taken()) == (bits == 32)

    run_site(
        make_bundle("lora", 2),
        tmp_path,
        test,
        ADAMW,
        algorithm="first-order",
        gradient_bits=bits,
        rounds=40,
        devices=devices,
    )


def damage_shard(site: Site) -> None:
    (cached,) = (site.folder / "cache" / "falls").rglob(SHARD_WEIGHTS.rpartition("/")[2])
    flip(cached)


def damage_snapshot(site: Site) -> None:
    (kept,) = site.state("falls").glob("snapshot-*")
    flip(kept)


def lose_disk(site: Site) -> None:
    shutil.rmtree(site.state("falls"))
    shutil.rmtree(site.folder / "cache" / "falls")


@pytest.mark.parametrize("damage", [damage_shard, damage_snapshot, lose_disk])
def test_a_device_whose_files_were_damaged_or_lost_gets_them_again(
    make_bundle: MakeBundle, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Site], None]
) -> None:
    async def test(site: Site) -> None:
        await site.rounds(20)
        site.let_snapshots_pay("falls")
        site.start("falls")
        await site.is_back("falls")
        assert site.base_round("falls") > 0
        await site.stop("falls")
        (site.state("falls") / "pace.json").unlink()
        damage(site)
        await site.rounds(10)
        site.start("falls")
        await site.is_back("falls")
        assert (site.base_round("falls") > 0) == (damage is damage_shard), "with its snapshot it needs no rebuild"
        await site.rounds(5)

    run_site(make_bundle("lora", 2), tmp_path, test)
    assert ("is damaged; it is fetched again" in caplog.text) == (damage is damage_shard)
    assert ("starting at the base shard" in caplog.text) == (damage is damage_snapshot)


def test_a_snapshot_that_is_gone_is_offered_anew_when_the_device_connects_again(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    async def test(site: Site) -> None:
        await site.rounds(20)
        snapshots = site.service.coordinator.snapshots
        find = snapshots.path
        answers = [None]
        snapshots.path = lambda round_: answers.pop() if answers else find(round_)  # type: ignore[method-assign]
        site.let_snapshots_pay("late")
        site.start("late")
        await site.is_back("late")
        assert answers == []
        assert site.base_round("late") > 0
        assert site.snapshots_taken() == 2

    run_site(make_bundle("lora", 2), tmp_path, test)


@pytest.fixture
def downloading(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Downloads of snapshots never end by themselves; set once one is under way."""
    began = threading.Event()

    def fetch(
        server: str, token: str, snapshot: Snapshot, path: Path, on_progress: OnProgress, on_rate: OnRate
    ) -> None:
        began.set()
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            on_progress(1, snapshot.size_bytes)
            time.sleep(0.01)

    monkeypatch.setattr("hosl_edge.session.fetch_snapshot", fetch)
    return began


def test_a_download_is_given_up_when_the_agent_is_stopped(
    make_bundle: MakeBundle, tmp_path: Path, downloading: threading.Event
) -> None:
    async def test(site: Site) -> None:
        site.start("also")
        await site.is_back("also")
        await site.rounds(20)
        site.let_snapshots_pay("late")
        site.start("late")
        await site.until(downloading.is_set)
        await asyncio.wait_for(site.stop("late"), 20.0)
        assert "late" not in site.service.coordinator.fleet.ready_names(), "it left while it joined"

    run_site(make_bundle("lora", 2), tmp_path, test)
