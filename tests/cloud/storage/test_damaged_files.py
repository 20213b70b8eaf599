"""The service's database, token and bundle, damaged in every way: named with a remedy, and left as they are."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from damaging import DAMAGES, contents, damage, without_privileges
from hosl_cloud.exceptions import ServiceError, StoreError
from hosl_cloud.service.secrets import TOKEN_FILE, load_or_make_token
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.store import Store
from hosl_protocol.run.manifest import (
    TAIL_CONFIG,
    TAIL_WEIGHTS,
    BundleError,
    FileEntry,
    Manifest,
    check_files,
    describe_file,
)
from hosl_protocol.run.tasks import Task
from hosl_protocol.weights.estimates import UpdateRecord


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database with a run of 50 rounds, and a checkpoint of it."""
    path = tmp_path / "hosl.sqlite"
    store = Store(path)
    store.create_run("run-1", tmp_path, "s", RunConfig(task=Task(name="lm", kind="lm", template="{text}")))
    for round_ in range(1, 51):
        update = UpdateRecord(round_, np.full(64, round_, np.float32), 0.1)
        store.add_round("run-1", 0, update, seconds=1.0, loss=0.5, devices=["a"])
    store.close()
    (tmp_path / "runs" / "run-1").mkdir(parents=True)
    (tmp_path / "runs" / "run-1" / "epoch-0000-round-000050.json").write_text("{}", encoding="ascii")
    return path


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_database_is_named_and_left_as_it_is(database: Path, how: str) -> None:
    damage(database, how, bit=8 * 100 + 7)  # the kind of its first page
    before = contents(database.parent)
    with without_privileges(), pytest.raises(StoreError, match=r"hosl\.sqlite") as caught:
        Store(database)
    assert ":" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(database.parent) == before


def test_a_database_of_something_else_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "hosl.sqlite"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE songs (name TEXT)")
    other.commit()
    other.close()
    before = contents(tmp_path)
    with pytest.raises(StoreError, match="is a database of something else"):
        Store(path)
    assert contents(tmp_path) == before


def test_an_update_whose_bits_changed_on_disk_is_not_used(database: Path) -> None:
    data = bytearray(database.read_bytes())
    data[data.index(np.full(64, 33, np.float32).tobytes()) + 5] ^= 1
    database.write_bytes(bytes(data))
    store = Store(database)
    try:
        assert len(store.updates("run-1", 1, 32)) == 32
        with pytest.raises(StoreError, match=r"damaged .the update of round 33.: restore it"):
            store.updates("run-1", 1, 50)
    finally:
        store.close()


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_join_token_is_named(tmp_path: Path, how: str) -> None:
    _, path = load_or_make_token(tmp_path)
    damage(path, how)
    before = contents(tmp_path)
    with without_privileges(), pytest.raises(ServiceError, match=f"{TOKEN_FILE} .*delete it"):
        load_or_make_token(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [TAIL_WEIGHTS, TAIL_CONFIG])
def test_a_damaged_file_of_a_bundle_is_named(tmp_path: Path, name: str, how: str) -> None:
    (tmp_path / "tail").mkdir()
    for each in (TAIL_WEIGHTS, TAIL_CONFIG):
        (tmp_path / each).write_bytes(each.encode() * 20)
    entries: tuple[FileEntry, ...] = tuple(describe_file(tmp_path, each) for each in (TAIL_WEIGHTS, TAIL_CONFIG))
    manifest = Manifest(
        model="m", family="llama", architecture="A", split=1, blocks=2, width=4, max_length=8, pad_token_id=0,
        train="none", tensors=(), files=entries,
    )  # fmt: skip
    check_files(tmp_path, manifest)
    damage(tmp_path / name, how)
    with without_privileges(), pytest.raises(BundleError, match=f"{name} .*export the bundle again"):
        check_files(tmp_path, manifest)
