"""Adding directions in place: one pass, any order, any chunks, any threads, the same bits."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_protocol.arithmetic import lattice, perturbation
from hosl_protocol.arithmetic.directions import CHUNK, direction
from hosl_protocol.arithmetic.perturbation import (
    SEGMENT,
    TERMS_PER_PASS,
    LatticeTensor,
    Recipe,
    Term,
    add_directions,
    estimate,
)

sizes = st.sampled_from([1, 7, 8, 9, 63, 64, 65, 255, 256, 257, 1000])
seeds = st.integers(0, 2**53 - 1)


pytestmark = pytest.mark.usefixtures("arithmetic")


def make_tensors(seed, lengths):
    tensors = []
    for index, length in enumerate(lengths):
        values = np.random.default_rng([seed, index]).normal(0, 0.1 + index, length).astype(np.float32)
        exponent = lattice.exponent_for(float(np.abs(values).max()))
        tensors.append(LatticeTensor(f"w{index}", index, lattice.round_to_lattice(values, exponent), exponent))
    return tensors


def make_terms(tensors, seed, count):
    chance = random.Random(seed)
    return [
        Term(
            chance.randrange(1, 50),
            chance.randrange(4),
            [chance.randrange(-9, 9) * lattice.spacing(t.exponent) for t in tensors],
        )
        for _ in range(count)
    ]


def opposite(terms):
    return [Term(term.round, term.direction, [-step for step in term.steps]) for term in terms]


def bits_of(tensors):
    return [tensor.values.tobytes() for tensor in tensors]


@given(seeds, st.lists(sizes, min_size=1, max_size=3), st.integers(1, 5))
def test_add_then_take_back_gives_the_same_bits(seed, lengths, count):
    tensors = make_tensors(seed, lengths)
    before, terms = bits_of(tensors), make_terms(tensors, seed, count)
    add_directions(tensors, terms, Recipe(seed))
    add_directions(tensors, opposite(terms), Recipe(seed))
    assert bits_of(tensors) == before


@given(seeds, st.lists(sizes, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_any_order_in_one_pass_or_many_gives_the_same_bits(seed, lengths, chance):
    fused, single, shuffled = (make_tensors(seed, lengths) for _ in range(3))
    terms = make_terms(fused, seed, 6)
    add_directions(fused, terms, Recipe(seed))
    for term in terms:
        add_directions(single, [term], Recipe(seed))
    chance.shuffle(terms)
    add_directions(shuffled, terms[:2], Recipe(seed))
    add_directions(shuffled, terms[2:], Recipe(seed))
    assert bits_of(fused) == bits_of(single) == bits_of(shuffled)


@given(seeds, st.integers(1, 600), st.sampled_from([256, 512, 1024]), st.sampled_from([1, 2, 3]))
def test_chunks_and_threads_do_not_matter(seed, length, chunk, threads):
    plain, cut = make_tensors(seed, [length, 700]), make_tensors(seed, [length, 700])
    terms = make_terms(plain, seed, 3)
    add_directions(plain, terms, Recipe(seed))
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(threads) as executor:
        patch.setattr(perturbation, "WORK", chunk)
        patch.setattr(perturbation, "SEGMENT", 2 * chunk)
        add_directions(cut, terms, Recipe(seed), executor)
    assert bits_of(plain) == bits_of(cut)


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, SEGMENT + 13])
def test_whole_tensors_move_along_the_direction_of_the_plain_recipe(length):
    g = lattice.spacing(-24)
    tensor = LatticeTensor("w", 0, np.zeros(length, np.float32), -24)
    add_directions([tensor], [Term(3, 1, [5 * g]), Term(4, 0, [-2 * g])], Recipe(9))
    expected = np.float32(5 * g) * direction(9, 3, 1, 0, length) - np.float32(2 * g) * direction(9, 4, 0, 0, length)
    assert np.array_equal(tensor.values, expected)


def test_each_tensor_has_bits_of_its_own():
    tensors = [LatticeTensor(name, index, np.zeros(64, np.float32), -24) for index, name in enumerate("ab")]
    add_directions(tensors, [Term(1, 0, [1.0, 1.0])], Recipe(1))
    assert tensors[0].values.tolist() == direction(1, 1, 0, 0, 64).tolist()
    assert tensors[1].values.tolist() == direction(1, 1, 0, 1, 64).tolist()


def test_step_zero_leaves_a_tensor_alone():
    tensors = make_tensors(1, [100, 100])
    before = bits_of(tensors)
    add_directions(tensors, [Term(1, 0, [0.0, lattice.spacing(tensors[1].exponent)])], Recipe(1))
    assert tensors[0].values.tobytes() == before[0]
    assert tensors[1].values.tobytes() != before[1]


def test_more_terms_than_one_pass_takes_all_count():
    tensor = LatticeTensor("w", 0, np.zeros(16, np.float32), -24)
    count = TERMS_PER_PASS + 3
    add_directions([tensor], [Term(round_, 0, [lattice.spacing(-24)]) for round_ in range(1, count + 1)], Recipe(2))
    expected = sum(direction(2, round_, 0, 0, 16) for round_ in range(1, count + 1))
    assert np.array_equal(tensor.values / np.float32(lattice.spacing(-24)), expected)


@pytest.mark.parametrize("count", [1, 2, 64, 65, 128, 129, 1024])
def test_estimate_of_any_number_of_directions_is_one_sum_in_their_order(count):
    tensor = LatticeTensor("w", 1, np.zeros(50, np.float32), -24)
    steps = np.random.default_rng(count).normal(size=count)
    expected, out = np.zeros(50, np.float32), np.empty(50, np.float32)
    for p, step in enumerate(steps):
        expected += np.float32(step) * direction(8, 1, p, 1, 50)
    estimate(tensor, 0, 50, [Term(1, p, [0.0, step]) for p, step in enumerate(steps)], Recipe(8), out)
    assert out.tobytes() == expected.tobytes()


def test_estimate_of_a_chunk_is_that_part_of_the_whole_sum():
    tensor = LatticeTensor("w", 2, np.zeros(CHUNK + 100, np.float32), -24)
    out = np.empty(100, np.float32)
    terms = [Term(1, 0, [0, 0, 0.25]), Term(1, 1, [0, 0, -0.5])]
    estimate(tensor, CHUNK, CHUNK + 100, terms, Recipe(8), out)
    expected = 0.25 * direction(8, 1, 0, 2, CHUNK + 100) - 0.5 * direction(8, 1, 1, 2, CHUNK + 100)
    assert np.array_equal(out, expected[CHUNK:])


# Gaussian directions


def test_gaussian_entries_are_cut_rounded_and_the_same_from_any_chunk_on():
    g, count = lattice.spacing(-24), 2 * CHUNK + 500
    whole = LatticeTensor("w", 1, np.zeros(count, np.float32), -24)
    term = Term(3, 1, [0.0, 2.0**-10])
    add_directions([whole], [term], Recipe(5, "gaussian"))
    assert lattice.is_on_lattice(whole.values, -24)
    assert np.abs(whole.values).max() <= 8 * 2.0**-10
    z = whole.values / 2.0**-10
    assert abs(z.mean()) < 5 / math.sqrt(count)
    assert abs(z.std() - 1.0) < 5 / math.sqrt(2 * count)
    chunk = np.empty(500, np.float32)
    estimate(whole, 2 * CHUNK, count, [term], Recipe(5, "gaussian"), chunk)
    assert np.array_equal(np.rint(chunk / np.float32(g)) * np.float32(g), whole.values[2 * CHUNK :])


@given(seeds, st.integers(1, 3), st.sampled_from([1, 2, 3]))
def test_gaussian_perturb_and_restore_give_the_same_bits_whatever_the_threads(seed, count, threads):
    tensors = make_tensors(seed, [300, CHUNK + 7])
    plain = make_tensors(seed, [300, CHUNK + 7])
    before, terms, recipe = bits_of(tensors), make_terms(tensors, seed, count), Recipe(seed, "gaussian")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(threads) as executor:
        patch.setattr(perturbation, "SEGMENT", CHUNK)
        add_directions(tensors, terms, recipe, executor)
    add_directions(plain, terms[::-1], recipe)
    assert bits_of(tensors) == bits_of(plain)
    add_directions(tensors, opposite(terms), recipe)
    assert bits_of(tensors) == before
