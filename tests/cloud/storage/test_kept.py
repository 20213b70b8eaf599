"""Kept activations on the disk: what is cut off, damaged, foreign or removed, and who goes first."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hosl_cloud.__main__ import main
from hosl_cloud.storage.kept_data import KeptFolder, list_kept, remove_kept
from hosl_cloud.storage.kept_file import Example, KeptData, KeptFile, read_kept

WIDTH = 6


def data(device: str = "pi", dtype: str = "float32", examples: int = 4) -> KeptData:
    facts = {"key": "0" * 64, "bundle": "tiny", "task": "reviews", "data_digest": "1" * 64, "part": "train"}
    return KeptData(**facts, device=device, examples=examples, width=WIDTH, dtype=dtype)


def example(place: int, dtype: str = "float32") -> Example:
    activations = np.random.default_rng(place).standard_normal((3 + place, WIDTH)).astype(np.float32)
    if dtype == "float16":
        activations = activations.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        activations = (activations.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return activations, np.array([place], np.int32)


def filled(path: Path, count: int = 4, dtype: str = "float32") -> KeptFile:
    file = KeptFile(path, data(dtype=dtype))
    for place in range(count):
        file.add([(place, example(place, dtype))])
    return file


def is_same(one: Example | None, other: Example) -> bool:
    return one is not None and all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_came_is_kept_exactly(tmp_path: Path, dtype: str) -> None:
    filled(tmp_path / "a.kept", dtype=dtype).close()
    file = KeptFile(tmp_path / "a.kept", data(dtype=dtype))
    assert file.is_whole
    assert all(is_same(file.get(place), example(place, dtype)) for place in range(4))
    file.close()


def test_a_record_cut_off_at_any_byte_is_dropped_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.kept"
    file = filled(path, 2)
    two = file.size_bytes
    file.add([(2, example(2))])
    whole = path.read_bytes()
    file.close()
    for end in range(two, len(whole)):
        path.write_bytes(whole[:end])
        again = KeptFile(path, data())
        assert (len(again), again.size_bytes, path.stat().st_size) == (2, two, two)
        again.add([(2, example(2))])
        assert path.read_bytes() == whole
        again.close()


def test_a_flipped_bit_costs_its_example_and_never_gives_wrong_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.kept"
    filled(path).close()
    whole = path.read_bytes()
    for place in range(whole.index(b"\n") + 1, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 4
        path.write_bytes(content)
        file = KeptFile(path, data())
        found = [file.get(place) for place in range(4)]
        assert sum(each is None for each in found) >= 1
        assert all(each is None or is_same(each, example(place)) for place, each in enumerate(found))
        assert not file.is_whole
        file.close()


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff\xfe\n", b"no line"])
def test_what_is_none_of_ours_is_made_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.kept"
    path.write_bytes(content)
    assert read_kept(path) is None
    file = filled(path)
    assert file.is_whole
    file.close()


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.kept"
    file = filled(path, 2)
    before, write = path.read_bytes(), os.pwrite

    def fail(descriptor: int, content: Any, offset: int) -> int:
        write(descriptor, content[:5], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="No space"):
        file.add([(2, example(2))])
    assert path.read_bytes() == before
    assert 2 not in file
    file.close()


def test_what_was_used_least_recently_goes_first(tmp_path: Path) -> None:
    size = 0
    for number, device in enumerate(("old", "older", "own")):
        folder = KeptFolder(tmp_path, 10**6)
        file = folder.open(data(device))
        file.add([(0, example(0))])
        size = file.size_bytes
        os.utime(file.path, (100 - number, 100 - number))
        folder.close()
    folder = KeptFolder(tmp_path, 2 * size + 60)
    folder.open(data("own"))
    assert folder.make_room(50)
    assert {each.data.device for each in list_kept(tmp_path)} == {"old", "own"}
    assert not folder.make_room(2 * size), "its own would not fit"
    assert {each.data.device for each in list_kept(tmp_path)} == {"old", "own"}
    folder.close()


def test_a_removed_file_is_forgotten_by_who_has_it_open(tmp_path: Path) -> None:
    folder = KeptFolder(tmp_path, 10**6)
    file = folder.open(data())
    file.add([(0, example(0))])
    assert not file.is_removed
    assert len(remove_kept(tmp_path, ["pi"])) == 1
    assert file.is_removed
    assert 0 not in file
    folder.close()


def test_the_commands_show_and_delete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("kitchen", "porch"):
        folder = KeptFolder(tmp_path / "cache", 10**6)
        folder.open(data(device)).add([(0, example(0))])
        folder.close()
    place = ["--data-dir", str(tmp_path)]
    assert main(["cache", "list", *place]) == 0
    assert "kitchen  train  reviews on tiny" in capsys.readouterr().out
    assert main(["cache", "list", "--json", *place]) == 0
    assert len(json.loads(capsys.readouterr().out)["kept"]) == 2
    assert main(["cache", "rm", *place]) != 0
    assert main(["cache", "rm", "attic", *place]) != 0
    assert "nothing of attic is kept" in capsys.readouterr().err
    assert main(["cache", "rm", "kitchen", *place]) == 0
    assert [each.data.device for each in list_kept(tmp_path / "cache")] == ["porch"]
    assert main(["cache", "rm", "--all", *place]) == 0
    capsys.readouterr()
    assert main(["cache", "list", *place]) == 0
    assert capsys.readouterr().out == "nothing is kept\n"
