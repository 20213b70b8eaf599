"""Where a device is sent that comes to a service without a run of its shard under way, and what holds nobody up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hosl_cloud.commands.runs import _line, _waits
from hosl_cloud.runs.current_run import CurrentRun
from hosl_cloud.runs.queue import RunQueue
from hosl_cloud.runs.run import Ending, Paused
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.store import Store
from hosl_cloud.tail.checkpoint import CheckpointInfo
from hosl_protocol.run.settings import convert
from hosl_protocol.run.tasks import Task, load_preset
from hosl_protocol.wire.messages import Complete, Hello, Refusal

SHARD, DATA = "a" * 64, "d" * 64


@pytest.fixture
def said() -> list[str]:
    """What the service told people."""
    return []


@pytest.fixture
def runs(tmp_path: Path, said: list[str]) -> Iterator[RunQueue]:
    """A service's runs after a restart: one is known, and nothing is under way."""
    store = Store(tmp_path / "hosl.sqlite")
    task: Task = convert(load_preset("sst2"), Task, "task")
    store.create_run("run-1", tmp_path / "bundle", SHARD, RunConfig(task=task))
    runs = RunQueue(store, tmp_path, said.append)
    yield runs
    runs.events.close()
    store.close()


def hello(run: str | None) -> Hello:
    return Hello(software="test", device="pi", shard_digest=SHARD, data_digest=DATA, run=run)


@pytest.mark.parametrize("state", ["completed", "stopped", "failed"])
def test_a_device_of_a_run_that_has_ended_is_told_so_by_a_service_that_was_not_there(
    runs: RunQueue, state: str
) -> None:
    runs.store.set_state("run-1", state)
    assert asyncio.run(runs.route(hello("run-1"))) == Complete(run="run-1", reason=state, round=0)  # type: ignore[arg-type]


def test_lines_name_their_run_where_more_than_one_is_under_way(runs: RunQueue, said: list[str], tmp_path: Path) -> None:
    for run in ("run-1", "run-2"):
        runs.current.put(run, CurrentRun(run, tmp_path, None))  # type: ignore[arg-type]
        runs.say("round 10/20", run)
    runs.say("run run-2 stopped", "run-2")
    assert said == ["round 10/20", "run-2: round 10/20", "run run-2 stopped"]


@pytest.mark.parametrize("ending", ["completed", "stopped", "failed", "paused"])
@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_at_a_runs_end_is_said_what_can_be_done_with_it(
    runs: RunQueue, said: list[str], ending: Ending | Paused, has_checkpoint: bool
) -> None:
    if has_checkpoint:
        config = runs.store.run("run-1").config
        info = CheckpointInfo(round=3, epoch=1, sha256="", head_rows=(), metrics=None, config=config)
        runs.folder("run-1").mkdir(parents=True)
        (runs.folder("run-1") / "epoch-0001-round-000003.json").write_bytes(msgspec.json.encode(info))
    asyncio.run(runs._tell_next("run-1", ending))
    folder = f"--data-dir {runs.data_dir}"
    take = f"take it with: hosl-cloud merge run --out trained {folder}"
    nothing = "run run-1 has no checkpoint, so that there is nothing to merge"
    go_on = f"go on with it: hosl-cloud run resume run {folder}; devices without --stay have to be started, too"
    expected = [take if has_checkpoint else nothing] * (ending != "paused")
    assert said == expected + [go_on] * (ending in ("stopped", "failed"))


def test_a_service_that_leaves_says_that_it_must_be_there_to_go_on(runs: RunQueue, said: list[str]) -> None:
    runs._is_draining = True
    asyncio.run(runs._tell_next("run-1", "stopped"))
    folder = f"--data-dir {runs.data_dir}"
    assert f"go on with it: hosl-cloud run resume run {folder} && hosl-cloud serve {folder}; devices" in said[-1]


def test_why_a_run_is_pending_stands_in_its_lines() -> None:
    common = {"id": "run-3", "state": "pending", "round": 0, "rounds": 9, "devices": 1, "loss": None, "accuracy": None}
    common |= {"problem": "", "behind": (), "waits_for": None}
    behind = common | {"behind": ("run-1", "run-2")}
    waits = common | {
        "waits_for": {"what": "devices", "devices": (), "since": time.time(), "ready": 1, "needed": 2},
    }
    assert _line(behind).endswith("in line behind run-1")
    assert _waits(behind).startswith("in line behind run run-1, and after 1 more run: ")
    assert _line(waits).endswith("1 of 2 devices")
    assert _waits(waits) == "waits for devices: 1 of 2 are there, since 0 s"


@pytest.mark.parametrize("run", ["run-1", "run-2", None])
def test_other_devices_are_told_to_come_back(runs: RunQueue, run: str | None) -> None:
    runs.store.set_state("run-1", "paused")
    answer = asyncio.run(runs.route(hello(run)))
    assert isinstance(answer, Refusal)
    assert (answer.code, answer.retry) == ("run", True)


def test_a_disk_that_is_slow_holds_up_nobody_who_says_something_and_keeps_the_order(runs: RunQueue) -> None:
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


def test_a_run_is_deleted_while_the_event_loop_turns(runs: RunQueue) -> None:
    runs.store.set_state("run-1", "completed")
    runs.folder("run-1").mkdir(parents=True)
    asyncio.run(runs.remove("run-1"))
    assert (runs.store.run_ids(), runs.folder("run-1").exists()) == ([], False)
