"""Token ids on disk: used where they fit, made again where they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hosl_edge.data.datasets import TextDataset
from hosl_edge.data.token_cache import FILE, Splits, load_or_tokenize, tokens_key
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import Task, load_preset


def make_splits(has_labels: bool = True) -> Splits:
    labels = np.array([1, 0], np.int32) if has_labels else None
    train = TextDataset(np.arange(7, dtype=np.int32), np.array([0, 3, 7]), labels, 9)
    held_out = TextDataset(
        np.arange(2, dtype=np.int32), np.array([0, 2]), labels[:1] if labels is not None else None, 9
    )
    return {"train": train, "eval": held_out}


def never() -> Splits:
    raise AssertionError("tokenized again")


def assert_same(one: Splits, other: Splits) -> None:
    assert one.keys() == other.keys()
    for split in one:
        for name in ("ids", "offsets", "labels", "pad_token_id"):
            np.testing.assert_array_equal(getattr(one[split], name), getattr(other[split], name))


@pytest.mark.parametrize("has_labels", [True, False])
def test_a_second_start_reads_what_the_first_kept(tmp_path: Path, has_labels: bool) -> None:
    made = load_or_tokenize(tmp_path, "k", 9, lambda: make_splits(has_labels))
    assert_same(load_or_tokenize(tmp_path, "k", 9, never), made)
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0, "token ids are as private as the data"


def test_another_key_is_made_again_and_replaces_the_old(tmp_path: Path) -> None:
    load_or_tokenize(tmp_path, "k", 9, make_splits)
    only_train = {"train": make_splits()["train"]}
    assert_same(load_or_tokenize(tmp_path, "other", 9, lambda: only_train), only_train)
    assert_same(load_or_tokenize(tmp_path, "other", 9, never), only_train)


@pytest.mark.parametrize(
    "how", [lambda data: data[:-1], lambda data: data[:20], lambda data: data[:-3] + b"\7\7\7", bytes]
)
def test_a_damaged_file_is_made_again(tmp_path: Path, how: Callable[[bytes], bytes]) -> None:
    load_or_tokenize(tmp_path, "k", 9, make_splits)
    path = tmp_path / FILE
    path.write_bytes(how(path.read_bytes()) if how is not bytes else b"")
    assert_same(load_or_tokenize(tmp_path, "k", 9, make_splits), make_splits())
    assert_same(load_or_tokenize(tmp_path, "k", 9, never), make_splits())


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert_same(load_or_tokenize(tmp_path / "absent", "k", 9, make_splits), make_splits())
    assert "not kept" in caplog.text


def test_the_key_names_all_that_the_ids_depend_on() -> None:
    task = msgspec.convert(load_preset("sst2"), Task)
    settings = RunSettings(task=task)
    other_task = msgspec.structs.replace(task, template="{sentence}")
    keys = {
        tokens_key("s", "d", settings),
        tokens_key("t", "d", settings),
        tokens_key("s", "e", settings),
        tokens_key("s", "d", msgspec.structs.replace(settings, max_length=64)),
        tokens_key("s", "d", msgspec.structs.replace(settings, task=other_task)),
    }
    assert len(keys) == 5
    assert tokens_key("s", "d", msgspec.structs.replace(settings, seed=5, rounds=7)) in keys
