"""What frozen blocks compute, on the disk: the same bits however much of it is there, whole or damaged."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from hosl_edge.model.prefix_cache import FILE, PrefixCache

KEY, OTHER = b"k" * 32, b"o" * 32
SIZES = np.array([40, 8, 400, 80], np.int64)
WHOLE = 48 + int(SIZES.sum()) + 8 * len(SIZES)


def values_of(example: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(example).standard_normal(SIZES[example] // 4).astype(np.float32)


def fill(cache: PrefixCache) -> None:
    for example in range(len(SIZES)):
        cache.write(example, values_of(example))


def found(cache: PrefixCache) -> list[int]:
    """The examples that it has; each with the bits in which it was written."""
    whole = []
    for example, size in enumerate(SIZES):
        out = np.full(size // 4, np.nan, np.float32)
        if cache.read(example, out):
            assert out.tobytes() == values_of(example).tobytes()
            whole.append(example)
    return whole


def make(folder: Path, key: bytes = KEY, budget: int = 10**6) -> PrefixCache:
    return PrefixCache(folder / FILE, key, SIZES, budget)


def test_what_was_written_is_there_at_the_next_start_and_is_written_once(tmp_path: Path) -> None:
    cache = make(tmp_path)
    assert found(cache) == []
    fill(cache)
    assert cache.written_bytes == WHOLE == cache.size_bytes == (tmp_path / FILE).stat().st_size
    cache.close()
    again = make(tmp_path)
    assert found(again) == [0, 1, 2, 3]
    assert again.written_bytes == 0
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0, "activations are as private as the data"


def test_a_foreign_file_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(make(tmp_path))
    foreign = make(tmp_path, OTHER)
    assert "is made again" in caplog.text
    assert found(foreign) == []
    foreign.write(0, values_of(0))
    assert found(make(tmp_path, OTHER)) == [0], "nothing of the first is below the new head"


@pytest.mark.parametrize("place", range(0, WHOLE, 7))
def test_a_flipped_bit_costs_one_example_and_a_damaged_head_all(tmp_path: Path, place: int) -> None:
    fill(make(tmp_path))
    data = bytearray((tmp_path / FILE).read_bytes())
    data[place] ^= 4
    (tmp_path / FILE).write_bytes(data)
    cache = make(tmp_path)
    assert len(found(cache)) == (0 if place < 48 else 3)
    fill(cache)
    assert found(make(tmp_path)) == [0, 1, 2, 3]


@pytest.mark.parametrize("size", range(0, WHOLE, 13))
def test_a_file_that_ends_too_soon_is_used_up_to_what_is_whole(tmp_path: Path, size: int) -> None:
    fill(make(tmp_path))
    os.truncate(tmp_path / FILE, size)
    cache = make(tmp_path)
    ends = 48 + np.cumsum(SIZES + 8)
    assert found(cache) == [example for example, end in enumerate(ends) if end <= size]
    fill(cache)
    assert found(cache) == [0, 1, 2, 3]


def test_a_place_with_another_examples_bytes_is_no_hit(tmp_path: Path) -> None:
    sizes = np.array([40, 40], np.int64)
    cache = PrefixCache(tmp_path / FILE, KEY, sizes, 10**6)
    cache.write(0, values_of(0))
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data + data[48:])
    assert not cache.read(1, np.empty(10, np.float32))


@pytest.mark.parametrize(("budget", "room"), [(0, 0), (95, 0), (96, 1), (111, 1), (112, 2), (519, 2), (520, 3)])
def test_a_small_budget_holds_the_first_examples_and_no_byte_more(tmp_path: Path, budget: int, room: int) -> None:
    cache = make(tmp_path, budget=budget)
    fill(cache)
    assert found(cache) == list(range(room)) == list(range(cache.room))
    assert (tmp_path / FILE).stat().st_size == cache.size_bytes <= max(budget, 48)
    assert cache.describe().startswith(f"{room} of 4 examples")


def test_a_smaller_budget_gives_room_back_and_keeps_the_rest(tmp_path: Path) -> None:
    fill(make(tmp_path))
    smaller = make(tmp_path, budget=112)
    assert (tmp_path / FILE).stat().st_size == 112
    assert found(smaller) == [0, 1]


def test_a_full_disk_ends_the_writing_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    cache = make(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))  # in the middle of example 2
    try:
        fill(cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caplog.text.count("cannot be written") == 1
    assert found(cache) == [0, 1]
    cache.write(3, values_of(3))
    assert found(cache) == [0, 1], "a disk that was full is left alone until the next start"
    fill(make(tmp_path))
    assert found(make(tmp_path)) == [0, 1, 2, 3]


def test_a_file_that_cannot_be_opened_keeps_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).symlink_to(tmp_path / "elsewhere")
    cache = make(tmp_path)
    assert "cannot be written" in caplog.text
    fill(cache)
    assert found(cache) == []
    assert not (tmp_path / "elsewhere").exists()


WRITER = """
import sys, numpy as np
from pathlib import Path
from hosl_edge.model.prefix_cache import PrefixCache
sizes = np.full(400, 40000, np.int64)
cache = PrefixCache(Path(sys.argv[1]), b"k" * 32, sizes, 10**9)
print("ready", flush=True)
for example in range(400):
    cache.write(example, np.full(10000, example, np.float32))
"""


@pytest.mark.parametrize("after_bytes", [0, 100_000, 3_000_000])
def test_a_writer_that_is_killed_leaves_a_file_of_whole_examples(tmp_path: Path, after_bytes: int) -> None:
    path = tmp_path / FILE
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    while path.stat().st_size < after_bytes:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    cache = PrefixCache(path, KEY, np.full(400, 40000, np.int64), 10**9)
    out = np.empty(10000, np.float32)
    whole = [example for example in range(400) if cache.read(example, out) and (out == example).all()]
    assert whole == list(range(len(whole)))
    assert 40_008 * len(whole) >= after_bytes - 2 * 40_008
    assert path.stat().st_size - 48 - 40_008 * len(whole) < 40_008


def test_a_disk_that_cannot_be_read_is_damage_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make(tmp_path)
    fill(cache)

    def fail(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hosl_edge.model.prefix_cache.os.preadv", fail)
    with caplog.at_level(logging.WARNING):
        assert found(cache) == []
    assert caplog.text.count("Input/output error") == 1
