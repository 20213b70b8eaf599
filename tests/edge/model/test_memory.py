"""Figures of this process's memory, and micro-batches that keep to a budget."""

from __future__ import annotations

import resource

import msgspec
import numpy as np
import psutil
import pytest

from hosl_edge.exceptions import MemoryBudgetError
from hosl_edge.model.memory import (
    choose_micro_batch,
    growth_bytes,
    keep_heap_small,
    preferred_rows,
    read_memory,
    release_unused,
)
from hosl_protocol.run.manifest import ImageEntry
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import Task

MB = 10**6
TASK = Task(name="t", kind="lm", template="{text}")


class Arena:
    """Forwards that keep what they take, as those of ONNX Runtime do."""

    def __init__(self, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self.runs: list[int] = []
        self._kept: list[np.ndarray] = []

    def forward(self, rows: int) -> None:
        missing = rows * self.row_bytes - sum(part.size for part in self._kept)
        if missing > 0:
            self._kept.append(np.ones(missing, np.uint8))
        self.runs.append(rows)


@pytest.fixture(autouse=True)
def _as_the_agent_does() -> None:
    """Without it the C library keeps large buffers that were freed, and figures depend on what ran before."""
    keep_heap_small()


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


def test_what_stays_is_measured_and_what_passes_is_not() -> None:
    arena = Arena(80 * MB)
    assert growth_bytes(lambda: arena.forward(1)) == pytest.approx(80 * MB, rel=0.1)
    assert growth_bytes(lambda: arena.forward(1)) < 5 * MB
    assert growth_bytes(lambda: np.ones(80 * MB, np.uint8).fill(2)) < 5 * MB


def test_without_a_budget_a_micro_batch_holds_the_preferred_tokens_or_pixels() -> None:
    def rows(batch_size: int, max_length: int, image: ImageEntry | None = None) -> int:
        settings = RunSettings(task=TASK, batch_size=batch_size, max_length=max_length)
        return choose_micro_batch(Arena(MB).forward, preferred_rows(settings, image), 0, None)

    assert [rows(64, 128), rows(1, 128), rows(64, 4096)] == [2, 1, 1]
    small = ImageEntry(channels=3, height=32, width=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    large = msgspec.structs.replace(small, height=224, width=224)
    assert [rows(200, 64, small), rows(8, 64, small), rows(16, 197, large)] == [16, 8, 1]


def test_the_largest_forward_is_the_first_to_stay() -> None:
    arena = Arena(MB)
    assert choose_micro_batch(arena.forward, 8, 0, None) == 8
    assert arena.runs == [8]


def test_more_budget_never_means_fewer_rows() -> None:
    chosen = []
    for rows in (1.7, 3.5, 6.5, 100.0):
        release_unused()
        budget = int(read_memory().anonymous + 20 * MB * rows)
        chosen.append(choose_micro_batch(Arena(20 * MB).forward, 8, 0, budget))
        assert chosen[-1] <= rows
    assert chosen == sorted(chosen)
    assert chosen[0] == 1
    assert chosen[1] == 2
    assert 3 <= chosen[2] <= 5
    assert chosen[3] == 8


def test_what_a_round_holds_besides_is_reserved() -> None:
    release_unused()
    budget = read_memory().anonymous + 160 * MB
    free = choose_micro_batch(Arena(20 * MB).forward, 8, 0, budget)
    held = choose_micro_batch(Arena(20 * MB).forward, 8, 100 * MB, budget)
    assert free > held


def test_a_budget_that_cannot_hold_one_row_is_refused_with_both_figures() -> None:
    release_unused()
    base = read_memory().anonymous
    with pytest.raises(MemoryBudgetError, match=r"memory budget is \d+ MB, this run needs \d+ MB") as caught:
        choose_micro_batch(Arena(60 * MB).forward, 8, 30 * MB, base + 20 * MB)
    assert caught.value.budget_bytes == base + 20 * MB
    assert caught.value.needed_bytes == pytest.approx(base + 120 * MB, abs=20 * MB)
