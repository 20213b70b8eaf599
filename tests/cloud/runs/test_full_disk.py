"""A full disk, as SQLite and the system say it: what is written waits for room, says so, and is written then."""

from __future__ import annotations

import asyncio
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hosl_cloud.exceptions import StoreFull, is_disk_full
from hosl_cloud.runs import queue as runs
from hosl_cloud.service.authority import make_authority, renew_certificate
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage import disk_space as room
from hosl_cloud.storage.event_log import EventLog
from hosl_cloud.storage.records import NewEvent
from hosl_cloud.storage.store import Store
from hosl_cloud.tail.checkpoint import save_checkpoint
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.tasks import Task
from hosl_protocol.weights.estimates import UpdateRecord
from services import Service, serving
from support import TASK, Crew, write_reviews

CONFIG = RunConfig(task=Task(name="text", kind="lm", template="{text}"))


def fill(store: Store) -> None:
    """The database's file may not grow any more: SQLite then says what it says on a full disk."""
    (pages,) = store._query("PRAGMA page_count")[0]
    store._query(f"PRAGMA max_page_count = {pages}")


def make_room(store: Store) -> None:
    store._query("PRAGMA max_page_count = 1000000")


def add_rounds(store: Store, first: int, count: int = 10_000) -> int:
    """Add rounds as long as they are taken; the one that was not."""
    for round_ in range(first, first + count):
        update = UpdateRecord(round_, np.zeros(64, np.float32), 1e-3)
        try:
            store.add_round("run-1", 0, update, seconds=1.0, loss=1.0, devices=["a"] * 20)
        except StoreFull:
            return round_
    raise AssertionError("everything was taken")


def test_a_full_disk_is_told_apart_and_the_store_goes_on_once_there_is_room(tmp_path: Path) -> None:
    store = Store(tmp_path / "hosl.sqlite")
    store.create_run("run-1", tmp_path, "5" * 64, CONFIG)
    fill(store)
    refused = add_rounds(store, 1)
    for _ in range(2):
        with pytest.raises(StoreFull, match="disk is full: make room on its disk") as caught:
            store.add_round(
                "run-1", 0, UpdateRecord(refused, np.zeros(9000, np.float32), 0.0), seconds=1, loss=1, devices=[]
            )
        assert caught.value.exit_code == ExitCode.RESOURCES
    assert store.run("run-1").round == refused - 1
    make_room(store)
    store.add_round("run-1", 0, UpdateRecord(refused, np.zeros(64, np.float32), 0.0), seconds=1, loss=1, devices=[])
    assert [update.round for update in store.updates("run-1", 1, refused)] == list(range(1, refused + 1))
    store.close()


class Limit:
    """No file of this process may be larger, as on a disk that is full: Python's writes fail, too."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __enter__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, resource.RLIM_INFINITY))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="sqlite3 names its errors from Python 3.11 on")
def test_a_limit_of_the_system_counts_as_a_full_disk(tmp_path: Path) -> None:
    store = Store(tmp_path / "hosl.sqlite")
    store.create_run("run-1", tmp_path, "5" * 64, CONFIG)
    with Limit(200_000):
        refused = add_rounds(store, 1)
        assert add_rounds(store, refused) == refused
    fill(store)
    assert add_rounds(store, refused) > refused, "it went on"
    store.close()


def test_sentences_that_a_full_disk_does_not_take_are_written_later_in_their_order(tmp_path: Path) -> None:
    store = Store(tmp_path / "hosl.sqlite")
    store.create_run("run-1", tmp_path, "5" * 64, CONFIG)
    log = EventLog(store)
    fill(store)
    sentences = [f"{number} " + 500 * "x" for number in range(20)]
    for sentence in sentences:
        log.add(NewEvent("run-1", time.time(), "info", sentence))
        log.flush()
    assert len(store.events("run-1")) < 20
    make_room(store)
    log.add(NewEvent("run-1", time.time(), "info", "the end"))
    log.close()
    assert [event.text for event in store.events("run-1")] == [*sentences, "the end"]
    store.close()


def test_a_checkpoint_that_finds_no_room_leaves_no_half_file_behind(
    make_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make_bundle().trainer()
    with Limit(1000), pytest.raises(OSError, match="File too large") as caught:
        save_checkpoint(tmp_path, 1, 0, trainer, trainer.config)
    assert is_disk_full(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_certificate_that_finds_no_room_leaves_the_old_one_with_its_key(tmp_path: Path) -> None:
    authority = make_authority(tmp_path, ["cloud.example.org"])
    before = {path.name: path.read_bytes() for path in authority.folder.iterdir()}
    key_bytes = len(before[authority.server_key.name])
    with Limit(key_bytes + 100), pytest.raises(OSError, match="File too large"):
        renew_certificate(tmp_path, [])
    assert {path.name: path.read_bytes() for path in authority.folder.iterdir()} == before


class Site:
    """A service with one device, whose disk a test fills."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self.crew = Crew()

    def run(self, test: Callable[[Service], Any], rounds: int) -> None:
        settings = {"batch_size": 2, "max_length": 16, "rounds": rounds, "report_every": 1}
        parts = {"evaluation": {"every": 0, "start": False}}

        async def main() -> None:
            config = {**msgspec.toml.decode(TASK), **settings, **parts}
            async with serving(self.bundle, self.folder / "cloud", config) as service:
                try:
                    self.crew.start(
                        EdgeSettings(
                            server=service.address,
                            token_file=str(service.token_file),
                            data=str(write_reviews(self.folder / "train.jsonl", 8)),
                            name="pi",
                            threads=1,
                            state_dir=str(self.folder / "state"),
                            cache_dir=str(self.folder / "cache"),
                        )
                    )
                    await asyncio.wait_for(test(service), 60.0)
                finally:
                    await asyncio.to_thread(make_room, service.coordinator.store)
                    await asyncio.to_thread(self.crew.dismiss)

        asyncio.run(main())


@pytest.fixture
def site(export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(room, "DISK_PAUSE_S", 0.2)
    monkeypatch.setattr(runs, "DISK_PAUSE_S", 0.2)
    return Site(export_bundle(tiny_model, "lora", 2), tmp_path)


async def until_full(service: Service) -> None:
    """Let the run come to a full disk."""
    while service.coordinator.run.round < 3:
        await asyncio.sleep(0.02)
    await asyncio.to_thread(fill, service.coordinator.store)
    while not service.coordinator.checkpointer.is_waiting_for_room:
        await asyncio.sleep(0.02)


def test_a_run_waits_for_room_says_so_and_goes_on(site: Site) -> None:
    async def test(service: Service) -> None:
        await until_full(service)
        stands_at = service.coordinator.run.round
        await asyncio.sleep(0.5)
        assert (service.coordinator.run.round, service.serving.done()) == (stands_at, False)
        assert sum("the run goes on when there is room" in sentence for sentence in service.said) == 1
        await asyncio.to_thread(make_room, service.coordinator.store)
        while service.coordinator.run.round < stands_at + 3:
            await asyncio.sleep(0.02)
        assert sum("there is room on the disk again" in sentence for sentence in service.said) == 1
        rounds = await asyncio.to_thread(service.coordinator.store.rounds, "run-1")
        assert [row.round for row in rounds][: stands_at + 3] == list(range(1, stands_at + 4))

    site.run(test, rounds=10**6)


def test_a_service_leaves_a_full_disk_without_a_word_to_the_store_and_without_an_error(site: Site) -> None:
    async def test(service: Service) -> None:
        await until_full(service)
        signal.raise_signal(signal.SIGTERM)
        await service.serving

    site.run(test, rounds=10**6)
