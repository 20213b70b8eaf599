"""How images vary: the same on every machine, of one example alone, and as protocol/README.md tells it."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_protocol.arithmetic.directions import Stream, philox
from hosl_protocol.run.augmentation import draw_variations, vary
from hosl_protocol.run.settings import Augmentation

BOTH = Augmentation(crop_padding=4, flip=True)
# Seed 42, round 1, device pi-1; the same stand in protocol/README.md.
GOLDEN = {
    0: (["28a7c5de16378478", "8d524afd9a9fb28a", "4498946d3a6055a1"], [4, 0, 1]),
    1: (["f54153199533e6c3", "25e64cacb4806eee", "5d148e161f7ac0e7"], [8, 4, 1]),
    5: (["414fbc7625e8f098", "3f0eb09eb2b0807c", "9e35eab944ee81df"], [4, 0, 1]),
}


@pytest.mark.parametrize("place", GOLDEN)
def test_variations_are_golden(place):
    words, variation = GOLDEN[place]
    made = philox(42, 1, 0, Stream.AUGMENTATION, zlib.crc32(b"pi-1"), place).random_raw(3)
    assert [f"{word:016x}" for word in made.tolist()] == words
    assert draw_variations(42, 1, "pi-1", np.array([place]), BOTH).tolist() == [variation]


def test_words_are_those_of_an_independent_philox(reference_block):
    index = zlib.crc32(b"pi-1")
    for place in (0, 3, 50_000):
        words = reference_block((place + 1, index, 6, 0), (7, 9 * 65536))
        expected = [words[0] % 9, words[1] % 9, words[2] % 2]
        assert draw_variations(7, 9, "pi-1", np.array([place]), BOTH).tolist() == [expected]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8), st.integers(0, 2**53 - 1), st.integers(1, 10**6))
def test_an_example_varies_alike_whatever_is_beside_it(places, seed, round_):
    together = draw_variations(seed, round_, "d", np.array(places), BOTH)
    alone = [draw_variations(seed, round_, "d", np.array([place]), BOTH)[0] for place in places]
    assert np.array_equal(together, np.array(alone))


def test_seeds_rounds_devices_and_places_differ():
    many = np.arange(64)
    drawn = [
        draw_variations(*name, many, BOTH).tobytes() for name in ((1, 1, "a"), (2, 1, "a"), (1, 2, "a"), (1, 1, "b"))
    ]
    assert len({*drawn, draw_variations(1, 1, "a", many + 64, BOTH).tobytes()}) == 5


def test_every_crop_and_both_flips_come_up():
    drawn = draw_variations(3, 1, "d", np.arange(4000), BOTH)
    assert {*map(tuple, drawn[:, :2].tolist())} == {(top, left) for top in range(9) for left in range(9)}
    # Half of 4000, standard deviation 32; five of them either way.
    assert abs(int(drawn[:, 2].sum()) - 2000) < 160
    only_flips = draw_variations(3, 1, "d", np.arange(100), Augmentation(flip=True))
    assert np.array_equal(only_flips[:, 2], drawn[:100, 2])
    assert not only_flips[:, :2].any()
    assert not draw_variations(3, 1, "d", np.arange(100), Augmentation(crop_padding=2))[:, 2].any()


def test_crop_and_flip_of_the_readmes_image():
    image = np.arange(1, 13, dtype=np.uint8).reshape(1, 3, 4, 1)
    varied = vary(image, np.array([[0, 2, 1]]), 1)
    assert varied[0, ..., 0].tolist() == [[0, 0, 0, 0], [0, 4, 3, 2], [0, 8, 7, 6]]


@given(st.integers(0, 3), st.integers(0, 6), st.integers(0, 6), st.booleans())
def test_every_pixel_comes_from_its_place(padding, top, left, is_flipped):
    top, left = min(top, 2 * padding), min(left, 2 * padding)
    image = np.random.default_rng(1).integers(1, 256, (1, 5, 4, 3), np.uint8)
    varied = vary(image, np.array([[top, left, int(is_flipped)]]), padding)[0]
    for y in range(5):
        for x in range(4):
            row, column = y + top - padding, (3 - x if is_flipped else x) + left - padding
            inside = 0 <= row < 5 and 0 <= column < 4
            assert varied[y, x].tolist() == (image[0, row, column].tolist() if inside else [0, 0, 0])
