"""A few seeds of the chaos test; `make chaos SEEDS=1-100` runs many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.seeds import run_seed

MakeBundle = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where seeds share what they are compared with."""
    return tmp_path_factory.mktemp("chaos")


@pytest.mark.parametrize("seed", [16, 39])
def test_a_run_with_faults_ends_with_the_bits_of_one_without(make_bundle: MakeBundle, work: Path, seed: int) -> None:
    result = run_seed(seed, make_bundle("lora", 2), work)
    assert result.is_good, result.outcome
    assert sum(result.faults.values()) >= 3


def test_a_run_that_is_not_strict_ends_with_the_same_weights_everywhere(make_bundle: MakeBundle, work: Path) -> None:
    result = run_seed(102, make_bundle("lora", 2), work, strict=False)
    assert result.is_good, result.outcome
