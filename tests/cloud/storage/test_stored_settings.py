"""Stored settings of another version: named, and in nobody's way."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hosl_cloud.__main__ import main
from hosl_cloud.exceptions import ForeignSettings
from hosl_cloud.runs.resume import find_run
from hosl_cloud.runs.run_status import LiveState, QueueState, WaitsFor, list_runs
from hosl_cloud.storage.store import Store
from hosl_cloud.storage.stored_settings import read_stored
from hosl_cloud.tail.checkpoint import find_checkpoint, save_checkpoint
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.weights.estimates import UpdateRecord


def text_of(bundle: Any, *path: str, **more: Any) -> str:
    """The bundle's settings as they are stored, with others in a table of them; None takes one away."""
    settings = json.loads(msgspec.json.encode(bundle.config()))
    table = settings
    for name in path:
        table = table[name]
    table |= more
    for name in [name for name, value in more.items() if value is None]:
        del table[name]
    return json.dumps(settings)


def test_a_setting_that_was_renamed_is_named_and_the_rest_is_known(bundle: Any) -> None:
    stored = read_stored(text_of(bundle, "tail", momentum=None, inertia=0.5))
    assert stored.known == bundle.config()
    with pytest.raises(
        ForeignSettings, match=r"run old: .* of another version of hosl: .* no setting tail\.inertia; use"
    ):
        stored.config("old")
    assert stored.for_merge("old").config("old") == bundle.config()


@pytest.mark.parametrize(
    ("path", "change", "named"),
    [
        ((), {"directions": None, "probes": 4}, "probes"),
        (("client",), {"nesterov": True}, r"client\.nesterov"),
        (("client",), {"beta1": None, "beta_1": 0.9}, r"client\.beta_1"),
        (("tail",), {"train": "dora"}, r"tail\.train"),
    ],
)
def test_what_the_devices_weights_depend_on_must_be_known_to_merge(
    bundle: Any, path: tuple[str, ...], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ForeignSettings, match=named):
        read_stored(text_of(bundle, *path, **change)).for_merge("old")


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"task": 3}', "\xff"])
def test_settings_that_are_none_are_a_problem_of_their_run_alone(text: str) -> None:
    stored = read_stored(text.encode("latin-1"))
    assert (stored.known, stored.problem != "") == (None, True)
    with pytest.raises(ForeignSettings):
        stored.config("old")
    with pytest.raises(ForeignSettings):
        stored.for_merge("old")


@pytest.fixture
def store(bundle: Any, tmp_path: Path) -> Iterator[Store]:
    """A run of this version between two of another."""
    store = Store(tmp_path / "hosl.sqlite")
    for run in ("old-1", "own", "old-2"):
        store.create_run(run, bundle.path, bundle.manifest.shard_digest, bundle.config())
        update = UpdateRecord(1, np.zeros(2, np.float32), 0.0)
        store.add_round(run, 0, update, seconds=1.0, loss=0.5, devices=["a"])
        store.set_state(run, "completed")
    with sqlite3.connect(tmp_path / "hosl.sqlite") as database:
        text = text_of(bundle, report_every=None, report_each=10)
        database.execute("UPDATE runs SET config = ? WHERE id LIKE 'old-%'", (text,))
    database.close()
    yield store
    store.close()


def test_a_run_of_another_version_is_listed_as_that_and_its_neighbours_as_ever(bundle: Any, store: Store) -> None:
    first, own, _ = list_runs(store, {"own": LiveState()})
    assert (first.id, first.rounds, first.algorithm, first.state) == ("old-1", 10, "ho-sfl", "completed")
    assert "of another version of hosl: this one has no setting report_each" in first.problem
    assert (own.id, own.problem) == ("own", "")
    found = find_run(store, bundle.manifest, bundle.config())
    assert found is not None
    assert found.id == "own"


def test_a_checkpoint_of_another_version_is_read_as_far_as_this_one_knows_it(
    bundle: Any, store: Store, tmp_path: Path
) -> None:
    trainer = bundle.trainer()
    folder = tmp_path / "runs" / "old-1"
    path = save_checkpoint(folder, 1, 0, trainer, trainer.config)
    info = path.with_suffix(".json")
    fields = json.loads(info.read_text(encoding="utf-8"))
    fields["config"] = json.loads(text_of(bundle, report_every=None, report_each=10))
    info.write_text(json.dumps({**fields, "checksum": 0}), encoding="utf-8")
    assert find_checkpoint(folder).info.config == trainer.config


def test_run_show_says_which_setting_it_is(bundle: Any, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(Path(store._path).parent)
    assert main(["run", "show", "old-1", "--data-dir", folder]) == ExitCode.OK
    assert "this one has no setting report_each" in capsys.readouterr().out
    assert main(["run", "list", "--data-dir", folder]) == ExitCode.OK
    assert capsys.readouterr().out.count("its settings cannot be read") == 2


def test_a_run_in_line_names_those_before_it_and_one_of_another_bundle_waits_for_nobody(
    bundle: Any, tmp_path: Path
) -> None:
    store = Store(tmp_path / "hosl.sqlite")
    for run, shard in (("first", "a"), ("second", "a"), ("other", "b"), ("stuck", "a"), ("third", "a")):
        store.create_run(run, tmp_path / run, shard, bundle.config())
    waits = WaitsFor("devices", (), 1.0, 1, 2)
    turns = QueueState({"a": "first", "b": "other"}, frozenset({"stuck"}))
    runs = {run.id: run for run in list_runs(store, {"first": LiveState(["pi"], {"pi": 1.0}, waits)}, turns)}
    assert {id_: run.behind for id_, run in runs.items()} == {
        "first": (),
        "second": ("first",),
        "other": (),
        "stuck": (),
        "third": ("first", "second"),
    }
    assert (runs["first"].devices, runs["first"].waits_for) == (1, waits)
    assert not any(run.behind for run in list_runs(store, {})), "nobody has a turn where no service runs"
    store.close()
