"""Where a device is sent that comes to a service without a run of its shard under way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hosl_cloud.runs import Runs
from hosl_cloud.settings import RunConfig
from hosl_cloud.store import Store
from hosl_protocol import Complete, Hello, Refusal, Task, convert, load_preset

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
    assert runs.route(hello("run-1")) == Complete(run="run-1", reason=state, round=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("run", ["run-1", "run-2", None])
def test_other_devices_are_told_to_come_back(runs: Runs, run: str | None) -> None:
    runs.store.set_state("run-1", "paused")
    answer = runs.route(hello(run))
    assert isinstance(answer, Refusal)
    assert (answer.code, answer.retry) == ("run", True)
