"""Philox4x64-10 in plain Python, after Random123's definition: the truth that numpy's is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from hosl_protocol.arithmetic import kernel

# No deadline: a loaded machine is not a failure. Fifty examples keep the folder within seconds.
settings.register_profile("quick", deadline=None, max_examples=50)
settings.load_profile("quick")

MASK = 2**64 - 1
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)

Block = tuple[int, int, int, int]


def philox4x64(counter: Block, key: tuple[int, int]) -> Block:
    """One block of four 64-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = product1 >> 64 ^ c1 ^ k0, product1 & MASK, product0 >> 64 ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def words_by_hand(seed: int, round_: int, direction: int, stream: int, index: int, count: int) -> list[int]:
    """The first `count` words of a stream, as protocol/README.md tells it."""
    words: list[int] = []
    block = 0
    while len(words) < count:
        words += philox4x64((block + 1, index, stream, 0), (seed, round_ * 65536 + direction))
        block += 1
    return words[:count]


@pytest.fixture
def reference_block() -> Callable[[Block, tuple[int, int]], Block]:
    """philox4x64."""
    return philox4x64


@pytest.fixture
def reference_words() -> Callable[[int, int, int, int, int, int], list[int]]:
    """words_by_hand(seed, round, direction, stream, index, count)."""
    return words_by_hand


@pytest.fixture(params=["compiled", "numpy"], scope="module")
def arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of the module runs with the compiled passes over weights and gradients and with numpy's."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(kernel, "load", lambda: None)
            patch.setattr(kernel, "load_hadamard", lambda: None)
        elif kernel.load() is None:
            pytest.skip("installed without a C compiler")
        yield
