"""Directions: the recipe of protocol/README.md, bit by bit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hosl_protocol.arithmetic.directions import (
    CHUNK,
    MAX_DIRECTION,
    MAX_ROUND,
    MAX_SEED,
    SUMS,
    GaussianSteps,
    Stream,
    direction,
    philox,
    read_bits,
    signs,
    uniforms,
)
from hosl_protocol.exceptions import SettingsError

# (seed, round, direction, tensor): first two words, first 16 entries. The same stand in protocol/README.md.
GOLDEN_DIRECTIONS = {
    (0, 1, 0, 0): ("fe6125262204e515", "9dec465f844339a5", "+-+-+---+-+--+++"),
    (42, 1, 0, 0): ("3897e2e21ae187f3", "9937a5054d28a2c0", "++--+++++++----+"),
    (42, 1, 1, 0): ("c335e0afdd18a7a0", "950d34d24aa929d1", "-----+-++++--+-+"),
    (42, 2, 0, 0): ("06161d121cc9779a", "3a5e3d0f62900551", "-+-++--++++-+++-"),
    (42, 1, 0, 1): ("72e36415a1726f60", "9baaa6c3e8b770fb", "-----++-++++-++-"),
    (2**53 - 1, 2**48 - 1, 2**16 - 1, 7): ("4d1543ff79b0d9b5", "a941797731447187", "+-+-++-++--++-++"),
}
# First four entries where `distribution` is gaussian; likewise in protocol/README.md.
GOLDEN_NORMALS = {
    (42, 1, 0, 0): [0.36264604330062866, -0.09228073060512543, 0.2841728627681732, 0.5436607003211975],
    (42, 1, 1, 0): [-0.56308913230896, -0.9035435318946838, 0.14992080628871918, 0.759559690952301],
    (2**53 - 1, 2**48 - 1, 2**16 - 1, 7): [
        *(-1.6400994062423706, 0.893280565738678, -1.5382821559906006, -0.7120683789253235),
    ],
}
GOLDEN_CHUNK_1 = ("031264a53d9aea21", "b19cc9c8a326636b")  # (42, 1, 0, 0) from element 65536 on
GOLDEN_UNIFORMS = [0.5126624037141733, 0.28889461447508824, 0.6309124512556566]  # ROUNDING stream of (42, 1, 0)

# Random123's own known answers for philox4x64-10 (kat_vectors).
PI = (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89)
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    ((2**64 - 1,) * 4, (2**64 - 1,) * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    (
        PI,
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
    ),
]


def text_of(entries):
    return "".join("+" if entry > 0 else "-" for entry in entries)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_reference_gives_the_known_answers_of_random123(reference_block, counter, key, expected):
    assert " ".join(f"{word:016x}" for word in reference_block(counter, key)) == expected


@pytest.mark.parametrize("place", GOLDEN_DIRECTIONS)
def test_directions_have_their_golden_bits(place):
    seed, round_, direction_, index = place
    words = philox(seed, round_, direction_, Stream.SIGNS, index).random_raw(2)
    assert (*(f"{word:016x}" for word in words), text_of(direction(*place, 16))) == GOLDEN_DIRECTIONS[place]


def test_second_chunk_has_its_golden_words():
    words = philox(42, 1, 0, Stream.SIGNS, 0, CHUNK // 256).random_raw(2)
    assert tuple(f"{word:016x}" for word in words) == GOLDEN_CHUNK_1


@pytest.mark.parametrize("stream", Stream)
def test_words_are_those_of_an_independent_philox(reference_words, stream):
    expected = reference_words(12345, 678, 9, stream, 3, 11)
    assert philox(12345, 678, 9, stream, 3).random_raw(11).tolist() == expected


def test_entry_is_plus_one_where_its_bit_counted_from_the_least_significant_is_set(reference_words):
    bits = [word >> bit & 1 for word in reference_words(7, 3, 1, Stream.SIGNS, 2, 4) for bit in range(64)]
    assert direction(7, 3, 1, 2, 250).tolist() == [1.0 if bit else -1.0 for bit in bits[:250]]


def test_partial_byte_uses_its_low_bits():
    assert direction(42, 1, 0, 0, 13).tolist() == direction(42, 1, 0, 0, 16)[:13].tolist()
    assert read_bits(philox(42, 1, 0, Stream.SIGNS), 13).size == 2


def test_table_of_signs_has_the_least_significant_bit_first():
    assert signs()[1].tolist() == [1, -1, -1, -1, -1, -1, -1, -1]
    assert signs()[0x80].tolist() == [-1, -1, -1, -1, -1, -1, -1, 1]


def test_a_chunk_made_alone_is_the_same_as_within_the_whole():
    whole = direction(5, 6, 7, 8, 3 * CHUNK)
    alone = read_bits(philox(5, 6, 7, Stream.SIGNS, 8, 2 * CHUNK // 256), CHUNK)
    assert np.array_equal(whole[2 * CHUNK :], signs()[alone].reshape(-1))


def test_uniforms_are_the_top_53_bits_of_each_word(reference_words):
    expected = [(word >> 11) / 2**53 for word in reference_words(42, 1, 0, Stream.ROUNDING, 0, 3)]
    assert uniforms(42, 1, 0, Stream.ROUNDING, 3).tolist() == expected == GOLDEN_UNIFORMS


def test_directions_are_balanced_and_uncorrelated():
    elements = CHUNK
    places = [(1, 1, 0, 0), (2, 1, 0, 0), (1, 2, 0, 0), (1, 1, 1, 0), (1, 1, 0, 1), (1, 1, 0, 2), (1, 65537, 0, 0)]
    made = [direction(*place, elements) for place in places]
    made.append(signs()[read_bits(philox(1, 1, 0, Stream.SIGNS, 0, elements // 256), elements)].reshape(-1))
    bound = 5.0 / math.sqrt(elements)  # five standard deviations of a mean of ±1
    assert all(abs(float(one.mean())) < bound for one in made)
    assert all(abs(float(np.mean(a * b))) < bound for a, b in itertools.combinations(made, 2))


def test_neighbouring_entries_are_uncorrelated():
    one = direction(1, 1, 0, 0, CHUNK + 64)
    bound = 5.0 / math.sqrt(CHUNK)
    assert all(abs(float(np.mean(one[:CHUNK] * one[lag : CHUNK + lag]))) < bound for lag in (1, 2, 8, 32, 64))


@pytest.mark.parametrize(
    ("place", "field"),
    [
        ((-1, 1, 0), "seed"),
        ((MAX_SEED + 1, 1, 0), "seed"),
        ((0, MAX_ROUND + 1, 0), "round"),
        ((0, 1, MAX_DIRECTION + 1), "direction"),
        ((0, 1, -1), "direction"),
    ],
)
def test_a_place_outside_the_counter_is_refused_by_name(place, field):
    with pytest.raises(SettingsError, match="use a whole number from 0 to") as caught:
        philox(*place, Stream.SIGNS)
    assert caught.value.field == field


# Gaussian entries


def normals(place, count, start=0):
    return GaussianSteps(*place, 1.0, start, None).next(count).copy()


@pytest.mark.parametrize("place", GOLDEN_NORMALS)
def test_gaussian_entries_have_their_golden_values(place):
    assert normals(place, 4).tolist() == GOLDEN_NORMALS[place]


def test_gaussian_entries_are_what_the_specification_makes_of_words(reference_words):
    words, scale = reference_words(42, 3, 1, Stream.NORMALS, 2, SUMS + 300), np.uint32(0x36134A87).view(np.float32)
    expected = []
    for word in words:
        sums = 2 * (65536 * (word >> 16).bit_count() + word % 65536) + 1 - 49 * 65536
        expected.append(float(np.float32(sums) * scale))
    assert normals((42, 3, 1, 2), len(words)).tolist() == expected


def test_gaussian_entries_can_be_made_from_any_chunk_on():
    whole = normals((1, 2, 3, 4), 2 * CHUNK + 9)
    assert np.array_equal(normals((1, 2, 3, 4), CHUNK + 9, CHUNK), whole[CHUNK:])


def test_gaussian_entries_are_nearly_normal():
    z = np.sort(normals((7, 1, 0, 0), CHUNK).astype(np.float64))
    normal = np.array([0.5 * (1.0 + math.erf(x / math.sqrt(2.0))) for x in z])
    assert np.abs(normal - (np.arange(z.size) + 0.5) / z.size).max() < 2.0 / math.sqrt(z.size)
    assert z.mean() == pytest.approx(0.0, abs=4.0 / math.sqrt(z.size))
    assert z.var() == pytest.approx(1.0, abs=4.0 * math.sqrt(2.0 / z.size))
    assert (z**4).mean() == pytest.approx(2.96, abs=4.0 * math.sqrt(96.0 / z.size))
