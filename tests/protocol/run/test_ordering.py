"""Who takes part and which examples come next."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_protocol.arithmetic.directions import Stream
from hosl_protocol.run.ordering import batch_indices, sample_devices

# The same stand in protocol/README.md.
GOLDEN_BATCHES = [[2, 9, 4, 3, 6, 5, 7, 1], [0, 8, 2, 8, 5, 3, 0, 7]]  # seed 42, device pi-1, 10 examples, 8 a round
GOLDEN_SAMPLE = ["pi-3", "pi-5"]  # seed 42, round 1, two of pi-1 to pi-5


def ranks(words):
    return sorted(range(len(words)), key=lambda place: words[place])


def test_batches_and_samples_are_golden():
    assert [batch_indices(42, round_, "pi-1", 10, 8).tolist() for round_ in (1, 2)] == GOLDEN_BATCHES
    assert sample_devices(42, 1, [f"pi-{n}" for n in range(1, 6)], 2) == GOLDEN_SAMPLE


@given(st.integers(0, 2**53 - 1), st.integers(1, 30), st.integers(1, 12))
def test_each_pass_over_the_data_is_a_permutation(seed, examples, batch_size):
    rounds = 3 * examples  # batch_size passes, three times
    order = np.concatenate([batch_indices(seed, n, "d", examples, batch_size) for n in range(1, rounds + 1)])
    for one_pass in order.reshape(-1, examples):
        assert sorted(one_pass.tolist()) == list(range(examples))


@given(st.integers(0, 2**53 - 1), st.integers(1, 10**6), st.text(min_size=1, max_size=10))
def test_a_batch_depends_on_seed_round_and_device_alone(seed, round_, device):
    first = batch_indices(seed, round_, device, 20, 8)
    for other in range(5):
        batch_indices(seed, other + 1, f"another {other}", 7, 3)
    np.random.seed(round_ % 1000)
    assert np.array_equal(batch_indices(seed, round_, device, 20, 8), first)


def test_passes_devices_and_seeds_have_orders_of_their_own():
    orders = [batch_indices(*place, 50, 50).tolist() for place in ((1, 1, "a"), (1, 2, "a"), (1, 1, "b"), (2, 1, "a"))]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("pass_", [0, 1, 5])
def test_order_is_the_rank_of_words_from_an_independent_philox(reference_words, pass_):
    words = reference_words(42, pass_, 0, Stream.ORDER, zlib.crc32(b"pi-1"), 13)
    assert batch_indices(42, pass_ + 1, "pi-1", 13, 13).tolist() == ranks(words)


def test_sampled_devices_are_those_of_the_smallest_words(reference_words):
    names = [f"pi-{n}" for n in range(9)]
    words = [reference_words(7, 3, 0, Stream.SAMPLING, zlib.crc32(name.encode()), 1)[0] for name in names]
    expected = [names[place] for place in sorted(ranks(words)[:4])]
    assert sample_devices(7, 3, names[::-1], 4) == expected


def test_a_device_that_is_away_changes_nothing_but_its_own_turn():
    names = [f"pi-{n}" for n in range(20)]
    for round_ in range(1, 30):
        chosen = sample_devices(3, round_, names, 6)
        for absent in names:
            without = sample_devices(3, round_, [name for name in names if name != absent], 6)
            assert len(set(without) - set(chosen)) == (absent in chosen)


@pytest.mark.parametrize("count", [0, 3, 4])
def test_all_devices_take_part_where_no_fewer_are_asked_for(count):
    assert sample_devices(1, 1, ["c", "a", "b"], count) == ["a", "b", "c"]


def test_every_device_has_its_turn():
    names = [f"d{n}" for n in range(10)]
    turns = [name for round_ in range(1, 1001) for name in sample_devices(5, round_, names, 3)]
    # 300 turns each in the mean, standard deviation 14.5; five of them either way.
    assert all(abs(turns.count(name) - 300) < 73 for name in names)
