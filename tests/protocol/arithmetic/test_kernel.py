"""The compiled pass against numpy's, bit by bit."""

from __future__ import annotations

import shutil
from importlib.metadata import distribution

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_protocol.arithmetic import kernel
from hosl_protocol.arithmetic.directions import CHUNK
from hosl_protocol.arithmetic.perturbation import TERMS_PER_PASS, LatticeTensor, Recipe, Term

needs_kernel = pytest.mark.skipif(kernel.load() is None, reason="installed without a C compiler")


def test_where_there_is_a_compiler_there_is_a_kernel():
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    assert kernel.load() is not None


def test_where_a_wheel_for_this_machine_was_installed_there_is_a_kernel():
    if "Root-Is-Purelib: true" in str(distribution("hosl").read_text("WHEEL")):
        pytest.skip("installed without a C compiler")
    assert kernel.load() is not None


def test_without_the_library_numpy_does_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel, "LIBRARY", tmp_path / "absent.so")
    assert kernel.open_library.__wrapped__() is None


def make_terms(chance, count):
    return [
        Term(int(chance.integers(1, 2**48)), int(chance.integers(0, 2**16)), [0.0, 0.0, float(chance.normal())])
        for _ in range(count)
    ]


@needs_kernel
@given(
    st.integers(0, 2**53 - 1),
    st.one_of(st.integers(1, 700), st.integers(CHUNK - 300, CHUNK)),
    st.one_of(st.integers(1, TERMS_PER_PASS), st.sampled_from([TERMS_PER_PASS + 1, 3 * TERMS_PER_PASS, 1024])),
    st.sampled_from([0, CHUNK, 5 * CHUNK]),
)
def test_kernel_adds_what_numpy_adds(seed, length, count, start):
    """In the order of the terms, so that even steps off the lattice give the same bits."""
    tensor = LatticeTensor("w", 2, np.empty(0, np.float32), -24)
    chance = np.random.default_rng(seed)
    terms = make_terms(chance, count)
    compiled, plain = np.zeros(length + 16, np.float32), np.zeros(length + 16, np.float32)
    compiled[3 : 3 + length] = plain[3 : 3 + length] = chance.normal(size=length).astype(np.float32)
    # Three elements from the start, so that nothing is aligned; what lies before and behind must stay.
    Recipe(seed).add(compiled[3 : 3 + length], tensor, start, terms)
    Recipe(seed)._add_with_numpy(plain[3 : 3 + length], tensor, start, terms, False)
    assert compiled.tobytes() == plain.tobytes()
    assert not compiled[:3].any()
    assert not compiled[3 + length :].any()
