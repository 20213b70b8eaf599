"""How fast a device says that it catches up."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from hosl_edge.connection.catch_up_speed import load_link, measure_replay_s, save_link
from hosl_protocol.arithmetic.perturbation import LatticeTensor
from hosl_protocol.run.settings import ClientOptimizer, RunSettings
from hosl_protocol.run.tasks import Task
from hosl_protocol.weights.client_weights import ClientWeights
from hosl_protocol.weights.estimates import UpdateRecord

TASK = Task(name="lm", kind="lm", template="{text}")


def test_the_links_speed_is_read_as_it_was_kept(tmp_path: Path) -> None:
    assert load_link(tmp_path) == 0.0
    save_link(tmp_path, 2.5e6)
    assert load_link(tmp_path) == 2.5e6


@pytest.mark.parametrize("sizes", [[], [0]])
def test_where_nothing_trains_nothing_is_replayed(sizes: list[int]) -> None:
    assert measure_replay_s(sizes, None, 1) == 0.0


def test_a_frozen_client_replays_nothing() -> None:
    assert measure_replay_s([100], RunSettings(task=TASK, algorithm="frozen"), 1) == 0.0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_pace_is_near_that_of_a_replay(optimizer: str) -> None:
    """Within a factor of thirty, on a machine that does other things: a wrong formula is off by a tensor's size."""
    settings = RunSettings(task=TASK, client=ClientOptimizer(optimizer=optimizer))  # type: ignore[arg-type]
    sizes = [300_000, 700] * 15
    tensors = [LatticeTensor(f"w{i}", i, np.zeros(size, np.float32), -24) for i, size in enumerate(sizes)]
    weights = ClientWeights(tensors, seed=1, probe_step=1e-3, optimizer=settings.client)
    updates = [UpdateRecord(n, np.full(2, 1e-5, np.float32), 1e-5) for n in range(1, 33)]
    began = time.monotonic()
    weights.apply(updates)
    real_s = (time.monotonic() - began) / 64
    assert real_s / 30 < min(measure_replay_s(sizes, settings, 1) for _ in range(3)) < real_s * 30
