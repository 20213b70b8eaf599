"""Updates of first-order training: same bits everywhere, and back; the exact range holds whatever they carry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_protocol.arithmetic import lattice
from hosl_protocol.arithmetic.directions import CHUNK
from hosl_protocol.arithmetic.perturbation import LatticeTensor
from hosl_protocol.arithmetic.rotation import GradientLayout, Rotation
from hosl_protocol.exceptions import HoslError, IrreversibleError, LatticeError
from hosl_protocol.run.settings import ClientOptimizer
from hosl_protocol.weights.client_weights import ClientWeights
from hosl_protocol.weights.estimates import UpdateRecord

pytestmark = pytest.mark.usefixtures("arithmetic")

SIZES, EXPONENTS = (300, 17, 256), (-24, -23, -22)
SGD = ClientOptimizer()
ADAMW = ClientOptimizer(optimizer="adamw", weight_decay=0.01)


def make_weights(bits=1, optimizer=SGD, sizes=SIZES, exponents=EXPONENTS):
    tensors = [
        LatticeTensor(f"t{t}", t, ((37 * np.arange(n) + 11 * t) % 601 - 300).astype(np.float32) / 1024, exponent)
        for t, (n, exponent) in enumerate(zip(sizes, exponents, strict=True))
    ]
    return ClientWeights(tensors, seed=42, probe_step=None, optimizer=optimizer, gradient_bits=bits)


def make_updates(bits, count, *, scale=1.0, rate=1e-3, sizes=SIZES):
    layout = GradientLayout(sizes, bits)
    scales, codes = np.arange(layout.scales), np.arange(layout.codes)
    return [
        UpdateRecord(
            r,
            (((7 * r + 5 * scales) % 13 - 6) * 2.0**-19 * scale).astype(np.float32),
            rate,
            ((37 * codes + 11 * r) % 256).astype(np.uint8),
        )
        for r in range(1, count + 1)
    ]


def bits_of(weights: ClientWeights) -> bytes:
    return b"".join(tensor.values.tobytes() for tensor in weights.tensors)


@pytest.mark.parametrize(
    ("bits", "optimizer", "digest"),
    [
        (1, SGD, "d2c91beac731f21543a121087f87ca0c48ac05e67a170483fb0d9af7631377da"),
        (2, SGD, "89fdfdb6b0727040341ca53325c0dce7269ff09333c1201ffa4fb605a57bc6ed"),
        (4, SGD, "a4953e18c8cb503b416ebaf393bf256d81ed17bd2f67fcb534d95c8543487e8d"),
        (8, SGD, "7bf49f30b1e817d92b4d8fbc45ef3b92efd56bcff7833b2104409899c8b4c54c"),
        (32, SGD, "8fafc19279a95ef8a6277a639e68b7895f1702d3a5e5bf0c3df6ab052c37cde5"),
        (1, ADAMW, "ec679f34d9e0a5e543323032aa8bf9d8c3cd0af62d552084d6b13d85ca158119"),
        (2, ADAMW, "c5a8e713921116f71a071627225ce29870392befcdd9ed2ad6ec191ac6cd096d"),
        (4, ADAMW, "a8e04232f012fcbd01e31cdf155e54c83f311e7a889c914065b0276b6f18e047"),
        (8, ADAMW, "87a1cffc6f283b0724b2433d02c34b612fbbd85df6f1fe6406636f004661baaf"),
        (32, ADAMW, "d9d939e1d80f46f070713b00435b38127469a9ea9a2c6645322bad5dda0addd5"),
    ],
)
def test_five_rounds_have_their_golden_digest(bits: Any, optimizer: ClientOptimizer, digest: str) -> None:
    weights = make_weights(bits, optimizer)
    weights.apply(make_updates(bits, 5))
    assert weights.digest() == digest


@pytest.mark.parametrize(
    ("optimizer", "scale", "rate", "event", "digest"),
    [
        (SGD, 64.0, 1e-3, (713, "t0"), "e5efffaf52e570efed6f37d4ceaea63412b352618e8862d860f28ab4adf7f818"),
        (ADAMW, 1.0, 2.0**-6, (246, "t0"), "8f010f6a0ab34d0e5a0a693804ccfa9ee7ac072ad4a3dccae4126f947c2e16f4"),
    ],
)
def test_a_thousand_rounds_have_their_golden_digest(optimizer, scale, rate, event, digest):
    weights = make_weights(1, optimizer)
    weights.apply(make_updates(1, 1000, scale=scale, rate=rate))
    assert [(each.round, each.tensor) for each in weights.coarsenings] == [event]
    assert weights.digest() == digest
    assert all(lattice.is_on_lattice(tensor.values, tensor.exponent) for tensor in weights.tensors)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
def test_rounds_that_are_taken_back_leave_the_former_bits(bits):
    weights, updates = make_weights(bits), make_updates(bits, 9)
    weights.apply(updates[:4])
    before = bits_of(weights)
    weights.apply(updates[4:])
    assert bits_of(weights) != before
    weights.revert(updates[4:])
    assert (bits_of(weights), weights.applied_round) == (before, 4)


def test_adamw_cannot_be_taken_back():
    weights, updates = make_weights(1, ADAMW), make_updates(1, 2)
    weights.apply(updates)
    with pytest.raises(IrreversibleError):
        weights.revert(updates[1:])


def test_an_update_moves_the_weights_by_its_decoded_gradient():
    """At sixteen times the spacing and more the chance in rounding says little: each step is off by g at most."""
    weights, (update,) = make_weights(4), make_updates(4, 1, scale=64.0)
    before = [tensor.values.copy() for tensor in weights.tensors]
    weights.apply([update])
    layout = GradientLayout(SIZES, 4)
    for tensor, old in zip(weights.tensors, before, strict=True):
        decoded = np.empty(old.size, np.float32)
        layout.decode(update.codes, update.coefficients, tensor.index, Rotation(42, 1, 0), 0, decoded)
        assert np.abs(tensor.values - old - decoded).max() <= lattice.spacing(tensor.exponent)


def test_steps_below_the_spacing_are_kept_on_average():
    """A thousandth of g a round would vanish if it were rounded to the nearest."""
    tensor = LatticeTensor("w", 0, np.zeros(2048, np.float32), -24)
    weights = ClientWeights([tensor], seed=1, probe_step=None, optimizer=SGD, gradient_bits=32)
    step = np.full(2048, 2.0**-24 / 32, np.float32)
    weights.apply([UpdateRecord(r, step, 0.0) for r in range(1, 65)])
    assert tensor.values.mean() == pytest.approx(2 * 2.0**-24, rel=0.1)


@given(st.lists(st.floats(-0.75, 0.75, width=32), min_size=1, max_size=12))
def test_no_weight_leaves_the_exact_range(steps):
    tensor = LatticeTensor("w", 0, np.array([0.5, -0.5, 0.0], np.float32), -24)
    weights = ClientWeights([tensor], seed=1, probe_step=None, optimizer=SGD, gradient_bits=32)
    for round_, step in enumerate(steps, 1):
        weights.apply([UpdateRecord(round_, np.array([step, -step, step / 3], np.float32), 0.0)])
        (now,) = weights.tensors
        assert lattice.is_on_lattice(now.values, now.exponent)


def test_weights_that_diverge_stay_as_they_were():
    weights = make_weights(32)
    before = weights.digest()
    scales = np.zeros(sum(SIZES), np.float32)
    scales[-1] = 1e9
    with pytest.raises(LatticeError, match="t2"):
        weights.apply([UpdateRecord(1, scales, 0.0)])
    assert (weights.digest(), weights.applied_round) == (before, 0)


def test_adamw_refuses_a_gradient_that_it_cannot_square():
    weights = make_weights(32, ADAMW)
    scales = np.zeros(sum(SIZES), np.float32)
    scales[3] = -2e15
    with pytest.raises(HoslError, match="is an estimate of 2e\\+15: AdamW cannot square it"):
        weights.apply([UpdateRecord(1, scales, 1e-3)])


@pytest.mark.parametrize(("scales", "codes"), [(4, 74), (5, 73), (5, 0), (0, 0)])
def test_an_update_of_other_sizes_is_refused(scales, codes):
    weights = make_weights(1)
    wrong = UpdateRecord(1, np.zeros(scales, np.float32), 0.0, np.zeros(codes, np.uint8))
    with pytest.raises(HoslError, match=f"has {scales} scales and {codes} codes, expected 5 and 74"):
        weights.apply([wrong])


def test_a_tensor_of_many_chunks_is_stepped_like_its_parts():
    """Rounding draws by the element's place, whatever the chunks."""
    elements = CHUNK + 777
    whole = ClientWeights(
        [LatticeTensor("w", 0, np.zeros(elements, np.float32), -24)],
        seed=5, probe_step=None, optimizer=SGD, gradient_bits=32,
    )  # fmt: skip
    steps = np.random.default_rng(0).uniform(-3, 3, elements).astype(np.float32) * np.float32(2.0**-24)
    whole.apply([UpdateRecord(1, steps, 0.0)])
    values = whole.tensors[0].values / 2.0**-24
    assert np.abs(values - steps / 2.0**-24).max() <= 1.0
    assert np.array_equal(np.unique(values), np.arange(-3, 4))
