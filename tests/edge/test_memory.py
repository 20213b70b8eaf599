"""Figures of this process's memory, and micro-batches that keep to a budget."""

from __future__ import annotations

import resource
from collections.abc import Callable

import msgspec
import numpy as np
import psutil
import pytest

from hosl_edge.exceptions import MemoryBudgetError
from hosl_edge.memory import (
    choose_micro_batch,
    keep_heap_small,
    preferred_rows,
    read_memory,
    release_unused,
    transient_bytes,
)
from hosl_protocol import ImageEntry, RunSettings, Task

MB = 10**6
TASK = Task(name="t", kind="lm", template="{text}")


def touch(size_bytes: int) -> None:
    """Take memory, use all of it, and give it back."""
    np.ones(size_bytes, np.uint8)


def rows_of(row_bytes: int) -> Callable[[int], None]:
    return lambda rows: touch(rows * row_bytes)


@pytest.fixture(autouse=True)
def _as_the_agent_does() -> None:
    """Without it the C library keeps large buffers that were freed, and figures depend on what ran before."""
    keep_heap_small()


@pytest.fixture
def measurable() -> None:
    if transient_bytes(lambda: None) is None:
        pytest.skip("this kernel does not let a process reset its own peak")


def test_the_figures_are_those_that_the_system_gives() -> None:
    memory = read_memory()
    assert memory.resident == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    assert memory.anonymous + memory.file_backed <= memory.resident
    assert memory.anonymous + memory.file_backed > 0.9 * memory.resident
    assert memory.resident <= memory.peak
    assert memory.peak < 1.05 * 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_memory_that_is_taken_is_anonymous() -> None:
    before = read_memory()
    block = np.ones(50 * MB, np.uint8)
    after = read_memory()
    assert after.anonymous - before.anonymous == pytest.approx(block.nbytes, rel=0.1)
    assert after.file_backed - before.file_backed < 10 * MB


@pytest.mark.usefixtures("measurable")
def test_a_passing_allocation_is_measured() -> None:
    assert transient_bytes(lambda: touch(80 * MB)) == pytest.approx(80 * MB, rel=0.2)
    rest = transient_bytes(lambda: None)
    assert rest is not None
    assert rest < 5 * MB, "what is gone is not measured again"


@pytest.mark.usefixtures("measurable")
def test_measuring_does_not_forget_the_peak() -> None:
    touch(120 * MB)
    peak = read_memory().peak
    transient_bytes(lambda: None)
    assert read_memory().peak >= peak


def test_without_a_budget_a_micro_batch_holds_the_preferred_tokens_or_pixels() -> None:
    def never(rows: int) -> None:
        raise AssertionError("nothing has to be measured")

    def rows(batch_size: int, max_length: int, image: ImageEntry | None = None) -> int:
        settings = RunSettings(task=TASK, batch_size=batch_size, max_length=max_length)
        return choose_micro_batch(never, preferred_rows(settings, image), 0, None).rows

    assert [rows(64, 128), rows(1, 128), rows(64, 4096)] == [2, 1, 1]
    small = ImageEntry(channels=3, height=32, width=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    large = msgspec.structs.replace(small, height=224, width=224)
    assert [rows(200, 64, small), rows(8, 64, small), rows(16, 197, large)] == [16, 8, 1]


@pytest.mark.usefixtures("measurable")
def test_more_budget_never_means_fewer_rows() -> None:
    chosen = []
    for rows in (1.5, 3.5, 6.5, 100.0):
        release_unused()
        budget = int(read_memory().anonymous + 20 * MB * rows)
        chosen.append(choose_micro_batch(rows_of(20 * MB), 8, 0, budget).rows)
    assert chosen == sorted(chosen)
    assert chosen[0] == 1
    assert 2 <= chosen[1] <= 4
    assert 5 <= chosen[2] <= 7
    assert chosen[3] == 8


@pytest.mark.usefixtures("measurable")
def test_what_a_round_holds_besides_is_reserved() -> None:
    release_unused()
    budget = read_memory().anonymous + 160 * MB
    free = choose_micro_batch(rows_of(20 * MB), 8, 0, budget)
    held = choose_micro_batch(rows_of(20 * MB), 8, 100 * MB, budget)
    assert free.rows > held.rows
    assert free.work_bytes == pytest.approx(20 * MB * free.rows, rel=0.1)


@pytest.mark.usefixtures("measurable")
def test_a_budget_that_cannot_hold_one_row_is_refused_with_both_figures() -> None:
    release_unused()
    base = read_memory().anonymous
    with pytest.raises(MemoryBudgetError, match=r"memory budget is \d+ MB, this run needs \d+ MB") as caught:
        choose_micro_batch(rows_of(60 * MB), 8, 30 * MB, base + 20 * MB)
    assert caught.value.budget_bytes == base + 20 * MB
    assert caught.value.needed_bytes == pytest.approx(base + 90 * MB, abs=20 * MB)
