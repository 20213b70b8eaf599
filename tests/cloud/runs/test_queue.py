"""Where a device is sent that comes to a service without a run of its shard under way, and what holds nobody up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosl_cloud.runs.queue import Runs
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.store import Store
from hosl_protocol.run.settings import convert
from hosl_protocol.run.tasks import Task, load_preset
from hosl_protocol.wire.messages import Complete, Hello, Refusal

SHARD, DATA = "a" * 64, "d" * 64


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    """A service's runs after a restart: one is known, and nothing is under way."""
    store = Store(tmp_path / "hosl.sqlite")
    task: Task = convert(load_preset("sst2"), Task, "task")
    store.create_run("run-1", tmp_path / "bundle", SHARD, RunConfig(task=task))
    yield Runs(store, tmp_path, lambda sentence: None)
    store.close()


def hello(run: str | None) -> Hello:
    return Hello(software="test", device="pi", shard_digest=SHARD, data_digest=DATA, run=run)


@pytest.mark.parametrize("state", ["completed", "stopped", "failed"])
def test_a_device_of_a_run_that_has_ended_is_told_so_by_a_service_that_was_not_there(runs: Runs, state: str) -> None:
    runs.store.set_state("run-1", state)
    assert asyncio.run(runs.route(hello("run-1"))) == Complete(run="run-1", reason=state, round=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("run", ["run-1", "run-2", None])
def test_other_devices_are_told_to_come_back(runs: Runs, run: str | None) -> None:
    runs.store.set_state("run-1", "paused")
    answer = asyncio.run(runs.route(hello(run)))
    assert isinstance(answer, Refusal)
    assert (answer.code, answer.retry) == ("run", True)


def test_a_disk_that_is_slow_holds_up_nobody_who_says_something_and_keeps_the_order(runs: Runs) -> None:
    is_held, may_go_on = threading.Event(), threading.Event()

    def commit_slowly() -> None:
        with runs.store._transaction():
            is_held.set()
            may_go_on.wait(5.0)

    async def main() -> None:
        slow = asyncio.create_task(asyncio.to_thread(commit_slowly))
        await asyncio.to_thread(is_held.wait)
        for number in range(50):
            runs.say(f"sentence {number}", "run-1")
        assert not slow.done(), "nobody waited for the disk"
        may_go_on.set()
        await slow

    asyncio.run(main())
    runs.events.close()
    assert [event.text for event in runs.store.events("run-1")] == [f"sentence {number}" for number in range(50)]


def test_a_run_is_deleted_while_the_event_loop_turns(runs: Runs) -> None:
    runs.store.set_state("run-1", "completed")
    runs.folder("run-1").mkdir(parents=True)
    asyncio.run(runs.remove("run-1"))
    assert (runs.store.run_ids(), runs.folder("run-1").exists()) == ([], False)
