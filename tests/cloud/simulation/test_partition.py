"""Dealing examples out to devices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_cloud.simulation.partition import Partition
from hosl_protocol.exceptions import SettingsError

partitions = st.sampled_from([Partition(), Partition(0.05), Partition(0.5), Partition(50.0)])


@given(partitions, st.integers(1, 40), st.integers(0, 200), st.integers(1, 12), st.integers(0, 2**53 - 1))
def test_every_example_goes_to_one_device_and_no_device_is_without(
    partition: Partition, devices: int, more: int, classes: int, seed: int
) -> None:
    labels = (np.arange(devices + more) % classes).astype(np.int32)
    parts = partition.deal(labels, len(labels), devices, seed)
    assert len(parts) == devices
    assert all(len(part) for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))


def test_the_same_seed_deals_the_same_and_another_does_not() -> None:
    labels = (np.arange(300) % 10).astype(np.int32)
    for partition in (Partition(), Partition(0.5)):
        first, again, other = (partition.deal(labels, 300, 12, seed) for seed in (4, 4, 5))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def spread(alpha: float | None) -> float:
    """How far the classes' shares on devices are from equal, in the mean."""
    labels = (np.arange(4000) % 10).astype(np.int32)
    parts = Partition(alpha).deal(labels, 4000, 20, seed=1)
    shares = np.array([np.bincount(labels[part], minlength=10) / len(part) for part in parts])
    return float(np.abs(shares - 0.1).mean())


def test_a_smaller_alpha_is_less_even() -> None:
    assert spread(0.05) > spread(0.5) > spread(5.0) > spread(500.0)
    assert spread(None) < 0.03 < 0.08 < spread(0.5)


@pytest.mark.parametrize(
    "text", ["", "iid:1", "dirichlet", "dirichlet:", "dirichlet:0", "dirichlet:-1", "dirichlet:inf", "x:1"]
)
def test_what_is_no_partition_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match="use iid or dirichlet:ALPHA"):
        Partition.parse(text)


def test_what_cannot_be_dealt_is_named() -> None:
    assert Partition.parse("dirichlet:0.5") == Partition(0.5)
    with pytest.raises(SettingsError, match="use at most 3, the examples in the data"):
        Partition().deal(None, 3, 4, 0)
    with pytest.raises(SettingsError, match="the task has no classes: use iid"):
        Partition(0.5).deal(None, 30, 4, 0)
