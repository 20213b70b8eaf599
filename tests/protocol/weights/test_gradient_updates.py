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
            (((7 * r + 5 * scales) % 13 - 6) * 2.0**-27 * scale).astype(np.float32),
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
        (1, SGD, "7d9e74aafc771f705e3827a8dca264c04024b3d84882713865c0f5ab32424b88"),
        (2, SGD, "c9e6ad329a5cfa9482eb662b79e7fcd6bb7c27d741cd41949e4c469afaa3cc00"),
        (4, SGD, "8578467cae6a48a18da90ff699ef5fa1c6096bb3fea5b3eeb66311a504903fd2"),
        (8, SGD, "3d195c384f58040380128c6311ab6361f7faf7f6f8e60593bee5e3bf644b33d9"),
        (32, SGD, "a3c015ccc5a487e2a735dab5f66bb1faf8a31cd1130d9a15124fada725067f09"),
        (1, ADAMW, "1497257a743c80e224a5aad70dfec00c2802f1405e6d16ce6fca5e2304aadb2b"),
        (2, ADAMW, "f4b2dc251c4f16ef636caace1e36377fda735437d31cdfddba8e8d59a4d93986"),
        (4, ADAMW, "7673c36ee9abdb52ed31fb30cdd00e82bf43ec78aa7ad658d23e22b0800c8230"),
        (8, ADAMW, "617cdbffa8a3766cc6e571f52fca149250ae8ff451659576065b1dfda7072bd6"),
        (32, ADAMW, "018275360b7ca362d958d5af151fe3402b2e21a067773bb4bd1601c43de74fed"),
    ],
)
def test_five_rounds_have_their_golden_digest(bits: Any, optimizer: ClientOptimizer, digest: str) -> None:
    weights = make_weights(bits, optimizer)
    weights.apply(make_updates(bits, 5))
    assert weights.digest() == digest


@pytest.mark.parametrize(
    ("optimizer", "scale", "rate", "event", "digest"),
    [
        (SGD, 2.0**14, 1e-3, (713, "t0"), "e5efffaf52e570efed6f37d4ceaea63412b352618e8862d860f28ab4adf7f818"),
        (ADAMW, 1.0, 2.0**-6, (248, "t0"), "a9009b1e1c868bac5349068700bec444d4e41305596686660d91994161651c33"),
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
    weights, (update,) = make_weights(4), make_updates(4, 1, scale=2.0**14)
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


def test_a_step_between_two_multiples_goes_up_by_its_own_byte(reference_words):
    """Half of g for each element, also where a tensor goes on in another chunk: up where the byte is above half."""
    elements = CHUNK + 77
    tensors = [LatticeTensor(f"w{t}", t, np.zeros(n, np.float32), -24) for t, n in enumerate((8, elements))]
    weights = ClientWeights(tensors, seed=42, probe_step=None, optimizer=SGD, gradient_bits=32)
    weights.apply([UpdateRecord(1, np.full(8 + elements, 2.0**-25, np.float32), 0.0)])

    words = reference_words(42, 1, 0, 1, 2, -(-elements // 8))
    drawn = [word >> 8 * place & 255 for word in words for place in range(8)]
    expected = [2.0**-24 if byte >= 128 else 0.0 for byte in drawn[:elements]]
    assert tensors[1].values.tolist() == expected


def test_bounds_hold_though_rounding_goes_up_by_luck():
    weights = make_weights(32, sizes=(4096,), exponents=(-24,))
    (bound,) = weights._range.bounds
    weights._range.bounds[0] = float(np.abs(weights.tensors[0].values).max())
    for round_ in range(1, 65):
        step = np.sign(weights.tensors[0].values) * np.float32(2.0**-24 / 16)
        weights.apply([UpdateRecord(round_, step, 0.0)])
        assert np.abs(weights.tensors[0].values).max() <= weights._range.bounds[0] < bound + 1
