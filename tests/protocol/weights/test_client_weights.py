"""The client's weights: probes, updates from scalars, range guard, AdamW, digest."""

from __future__ import annotations

import hashlib
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_protocol.arithmetic import lattice, perturbation
from hosl_protocol.arithmetic.directions import direction
from hosl_protocol.arithmetic.perturbation import LatticeTensor
from hosl_protocol.exceptions import HoslError, IrreversibleError, LatticeError, SettingsError
from hosl_protocol.run.manifest import Manifest, TensorEntry
from hosl_protocol.run.settings import ClientOptimizer, RunSettings, convert
from hosl_protocol.weights import adamw
from hosl_protocol.weights import client_weights as client
from hosl_protocol.weights.client_weights import ClientWeights, ProbePoint, make_client_weights
from hosl_protocol.weights.estimates import UpdateRecord

SEED = 42
LENGTHS = (300, 17, 256)

# After test_weights_have_their_golden_digest's updates; the same stands in protocol/README.md.
GOLDEN_DIGESTS = (
    "d61d082b67769e46e937ec0d974a83043de2bc3885c52a73a7dc6d889204c358",
    "5cd7a681e949af0e98d6be2af4c1cbbe5787198d24ee500d080934b9363d2488",
    "97c9331fa25ca20c7dffe7629b2558a7d16d29be128c415af8807f43378ed364",
)
GOLDEN_MANY_DIRECTIONS = "510a8797bf2989be7a8dfdb08ec91404ef46f128321d552c1cd83dfbe0ba81e0"
GOLDEN_GAUSSIAN = {
    "sgd": "b990e124f6a6b38f7d01d21adc80b031b5f5c38737ec55193d38e94929c82257",
    "adamw": "805cbb47080c2f1b122afed9c0fa4423e12067d833264e57c70e7419bc84606c",
}
# After 1,000 rounds, across re-lattice events; the same on every machine.
GOLDEN_LONG = {
    "sgd": "543f2e908b41c6a063a79abbac561c0f12ee05264fb48e66b98b9977036a6d81",
    "adamw": "acfbdfd83f060e01e51c50ab6d710e7d3f141d8115e3c63616159d6c291dd80e",
    "gaussian": "a8d21dbd0db38451c3b62aac2ef60d89dc1c53de2d8b8fffe644cde0a46d8f3a",
}


pytestmark = pytest.mark.usefixtures("arithmetic")


def make_base(length, index):
    """Multiples of 2^-10 from a line of a simple congruence: the same everywhere."""
    return np.array([((place * 37 + index * 11) % 601 - 300) / 1024 for place in range(length)], np.float32)


def make_weights(
    kind="sgd", *, seed=SEED, lengths=LENGTHS, probe_step=1e-3, distribution="rademacher", threads=1, **optimizer
):
    tensors = [LatticeTensor(f"w{i}", i, make_base(n, i), -24 + i) for i, n in enumerate(lengths)]
    chosen = ClientOptimizer(optimizer=kind, **optimizer)
    return ClientWeights(
        tensors, seed=seed, probe_step=probe_step, optimizer=chosen, distribution=distribution, threads=threads
    )


def make_updates(count, *, directions=2, scale=1.0, rate=1e-3):
    """Coefficients that are exact in float32 and the same everywhere."""
    rows = [[((7 * r + 5 * p) % 13 - 6) * 2.0**-13 * scale for p in range(directions)] for r in range(1, count + 1)]
    return [UpdateRecord(n, np.array(row, np.float32), rate) for n, row in enumerate(rows, 1)]


def bits_of(weights):
    return b"".join(tensor.values.tobytes() for tensor in weights.tensors)


points = st.builds(ProbePoint, round=st.integers(1, 1000), direction=st.integers(0, 9), sign=st.sampled_from([-1, 1]))
update_lists = st.lists(
    st.lists(st.floats(-(2.0**-10), 2.0**-10, width=32), min_size=2, max_size=2), min_size=1, max_size=6
).map(lambda rows: [UpdateRecord(n, np.array(row, np.float32), 1e-3) for n, row in enumerate(rows, 1)])


# Probes


@given(points, st.integers(0, 2**53 - 1))
def test_perturb_then_restore_gives_back_the_same_bits(point, seed):
    weights = make_weights(seed=seed)
    before = bits_of(weights)
    weights.probe(point)
    assert bits_of(weights) != before
    weights.probe(None)
    assert bits_of(weights) == before


@given(st.lists(points, min_size=2, max_size=5))
def test_moving_between_probes_in_one_pass_equals_restoring_in_between(chain):
    direct, detour = make_weights(), make_weights()
    for point in chain:
        direct.probe(point)
        detour.probe(None)
        detour.probe(point)
        assert bits_of(direct) == bits_of(detour)


def test_probe_stands_one_rounded_step_along_the_direction():
    weights = make_weights(probe_step=1.3e-3)
    weights.probe(ProbePoint(4, 1, -1))
    for tensor in weights.tensors:
        step = lattice.round_probe_step(1.3e-3, tensor.exponent, tensor.name)
        z = direction(SEED, 4, 1, tensor.index, tensor.values.size)
        assert np.array_equal(tensor.values, make_base(tensor.values.size, tensor.index) - np.float32(step) * z)


def test_small_weights_rounded_to_the_lattice_survive_a_probe():
    values = lattice.round_to_lattice(np.array([-1e-9, -0.0, 1e-9, 0.25], np.float32), -24)
    weights = ClientWeights([LatticeTensor("w", 0, values, -24)], seed=1, probe_step=1e-3, optimizer=ClientOptimizer())
    before = weights.digest()
    weights.probe(ProbePoint(1, 0, 1))
    assert weights.digest() == before


@pytest.mark.parametrize(("probe_step", "sentence"), [(1e-9, "rounds to 0"), (0.51, "exact only for steps up to 0.5")])
def test_probe_step_that_the_lattice_cannot_take_is_an_error(probe_step, sentence):
    with pytest.raises(SettingsError, match=sentence):
        make_weights(probe_step=probe_step)


# Updates


@given(update_lists, st.integers(0, 2**53 - 1))
def test_updates_fused_equal_updates_one_by_one_and_come_back_to_the_same_bits(updates, seed):
    fused, single = make_weights(seed=seed), make_weights(seed=seed)
    before = fused.digest()
    fused.apply(updates)
    for update in updates:
        single.apply([update])
    assert fused.applied_round == single.applied_round == len(updates)
    assert fused.digest() == single.digest()
    keep = len(updates) // 2
    fused.revert(updates[keep:])
    assert fused.applied_round == keep
    fused.revert(updates[:keep])
    assert fused.applied_round == 0
    assert fused.digest() == before


@given(update_lists, st.lists(points, max_size=3))
def test_a_client_that_probed_matches_one_that_only_replayed(updates, probes):
    probing, replaying = make_weights(), make_weights()
    for update in updates:
        for point in probes:
            probing.probe(point)
        probing.apply([update])
    replaying.apply(updates)
    assert probing.digest() == replaying.digest()


def test_update_adds_the_coefficient_times_the_direction_with_the_sign_as_given():
    weights = make_weights(lengths=(64,), probe_step=2.0**-10)
    weights.apply([UpdateRecord(1, np.array([2.0**-12, -(2.0**-13)], np.float32), 0.0)])
    moved = weights.tensors[0].values - make_base(64, 0)
    assert np.array_equal(moved, 2.0**-12 * direction(SEED, 1, 0, 0, 64) - 2.0**-13 * direction(SEED, 1, 1, 0, 64))


def test_update_is_corrected_by_the_rounding_of_the_probe_step():
    exponent, probe_step = -14, 2.0**-14 * 1.4  # rounds to 2^-14
    tensor = LatticeTensor("w", 0, np.zeros(8, np.float32), exponent)
    weights = ClientWeights([tensor], seed=SEED, probe_step=probe_step, optimizer=ClientOptimizer())
    weights.apply([UpdateRecord(1, np.array([10 * 2.0**-14], np.float32), 0.0)])
    assert np.array_equal(tensor.values, 14 * 2.0**-14 * direction(SEED, 1, 0, 0, 8))


def test_tiny_updates_move_the_weights_by_their_mean():
    rounds, g = 4000, lattice.spacing(-24)
    tensor = LatticeTensor("w", 0, np.zeros(1, np.float32), -24)
    weights = ClientWeights([tensor], seed=SEED, probe_step=2.0**-10, optimizer=ClientOptimizer())
    # The sign of each coefficient cancels the direction's, so that every step has the mean +0.3 g.
    signs = [float(direction(SEED, n, 0, 0, 1)[0]) for n in range(1, rounds + 1)]
    weights.apply([UpdateRecord(n, np.array([0.3 * g * s], np.float32), 0.0) for n, s in enumerate(signs, 1)])
    deviation = math.sqrt(0.3 * 0.7 / rounds)
    assert abs(float(tensor.values[0]) / g / rounds - 0.3) < 4 * deviation


@pytest.mark.parametrize("rounds", [[2], [1, 3], [0]])
def test_updates_out_of_order_are_refused_and_change_nothing(rounds):
    weights = make_weights()
    before = weights.digest()
    with pytest.raises(HoslError, match="expected round"):
        weights.apply([UpdateRecord(n, np.zeros(2, np.float32), 0.0) for n in rounds])
    assert (weights.digest(), weights.applied_round) == (before, 0)


def test_only_the_newest_updates_can_be_taken_back():
    weights, updates = make_weights(), make_updates(3)
    weights.apply(updates)
    with pytest.raises(HoslError, match="take back of round 2, expected round 3"):
        weights.revert(updates[:2])


@pytest.mark.parametrize(("coefficient", "rate"), [(math.nan, 0.0), (math.inf, 0.0), (0.0, math.nan)])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_update_that_is_not_finite_is_refused_and_changes_nothing(kind, coefficient, rate):
    weights = make_weights(kind)
    before = weights.digest()
    with pytest.raises(HoslError, match="round 1 holds a number that is not finite"):
        weights.apply([UpdateRecord(1, np.array([coefficient], np.float32), rate)])
    assert (weights.digest(), weights.applied_round) == (before, 0)


def test_resolution_is_the_smallest_coefficient_in_lattice_steps():
    weights = make_weights(lengths=(8, 8), probe_step=2.0**-10)  # exponents -24 and -23
    update = UpdateRecord(1, np.array([2.0**-22, 0.0, -(2.0**-20)], np.float32), 0.0)
    assert weights.resolution(update) == 2.0
    assert weights.resolution(UpdateRecord(1, np.zeros(2, np.float32), 0.0)) == math.inf


# The range in which sums are exact, and the event that widens it


def make_one(values, probe_step=2.0**-10, **options):
    tensor = LatticeTensor("w", 0, np.array(values, np.float32), -24)  # exact up to 1
    optimizer = ClientOptimizer(**options)
    return ClientWeights([tensor], seed=SEED, probe_step=probe_step, optimizer=optimizer), tensor


def away(rounds, size):
    """Updates that move a weight of one element up by `size` each."""
    signs = [float(direction(SEED, n, 0, 0, 1)[0]) for n in range(1, rounds + 1)]
    return [UpdateRecord(n, np.array([size * s], np.float32), 0.0) for n, s in enumerate(signs, 1)]


def test_weights_that_would_leave_the_exact_range_move_to_a_coarser_lattice():
    g = 2.0**-24
    weights, tensor = make_one([0.5, 3 * g, 2 * g, g])
    weights.apply([UpdateRecord(1, np.array([0.625], np.float32), 0.0)])
    assert weights.coarsenings == [client.Coarsening(1, "w", -22)]
    signs = direction(SEED, 1, 0, 0, 4)
    # Steps are now 4 g: 3 g lies nearest to 4 g, 2 g half way goes to the even 0, g to 0.
    assert (tensor.values - np.float32(0.625) * signs).tolist() == [0.5, 4 * g, 0.0, 0.0]
    assert lattice.is_on_lattice(tensor.values, -22)
    assert weights.tensors[0].exponent == -22


def test_the_coarser_lattice_rounds_probes_and_later_steps():
    weights, tensor = make_one([0.5], probe_step=21 * 2.0**-24)
    weights.apply([UpdateRecord(1, np.array([0.625], np.float32), 0.0)])
    before = tensor.values.copy()
    weights.probe(ProbePoint(2, 0, 1))
    assert abs(float(tensor.values[0] - before[0])) == 5 * 2.0**-22  # 21 steps of the old g, 5.25 of the new
    weights.probe(None)
    assert np.array_equal(tensor.values, before)
    weights.apply([UpdateRecord(2, np.array([2.0**-24], np.float32), 0.0)])
    assert abs(float(tensor.values[0] - before[0])) in (0.0, 2.0**-22)


def test_the_guard_leaves_room_for_the_probe_step():
    tight, _ = make_one([0.5], probe_step=0.25)
    tight.apply([UpdateRecord(1, np.array([0.375], np.float32), 0.0)])
    assert [event.exponent for event in tight.coarsenings] == [-22]
    fitting, _ = make_one([0.5], probe_step=0.25)
    fitting.apply([UpdateRecord(1, np.array([0.25], np.float32), 0.0)])
    assert fitting.coarsenings == []


def test_weights_that_outgrow_every_lattice_have_diverged_and_nothing_changes():
    weights, tensor = make_one([0.5, -0.25])
    with pytest.raises(LatticeError, match=r"weights of w may reach 200\.5.*coarsest lattice ends at 128") as caught:
        weights.apply([UpdateRecord(1, np.array([200.0], np.float32), 0.0)])
    assert tensor.values.tolist() == [0.5, -0.25]
    assert (weights.applied_round, weights.coarsenings, caught.value.tensor) == (0, [], "w")


def to_and_fro(rounds, size=0.125):
    """Updates that move a weight of one element up and down by turns."""
    signs = [float(direction(SEED, n, 0, 0, 1)[0]) * (-1) ** n for n in range(1, rounds + 1)]
    return [UpdateRecord(n, np.array([size * s], np.float32), 0.0) for n, s in enumerate(signs, 1)]


def test_the_guard_takes_the_true_maximum_before_it_coarsens():
    weights, tensor = make_one([0.25])
    for update in to_and_fro(20):  # their sizes add up to 2.5; the weight never leaves 0.125 to 0.375
        weights.apply([update])
    assert (weights.applied_round, weights.coarsenings) == (20, [])
    assert tensor.values.tolist() == [0.25]


def test_a_long_catch_up_that_no_single_pass_could_hold_equals_the_rounds_one_by_one():
    updates = to_and_fro(64)
    fused, tensor = make_one([0.25])
    fused.apply(updates)
    single, _ = make_one([0.25])
    for update in updates:
        single.apply([update])
    assert fused.digest() == single.digest()
    assert fused.applied_round == 64
    fused.revert(updates)
    assert (fused.applied_round, tensor.values.tolist()) == (0, [0.25])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@given(st.integers(0, 2**32), st.data())
def test_a_catch_up_across_events_equals_the_rounds_one_by_one(kind, seed, data):
    chance = np.random.default_rng(seed)
    rows = chance.normal(0, 0.1, (24, 2)).astype(np.float32)
    updates = [UpdateRecord(n, row, abs(float(row[0]))) for n, row in enumerate(rows, 1)]
    single = make_weights(kind, seed=seed % 1000, weight_decay=0.1)
    for update in updates:
        single.apply([update])
    cut = data.draw(st.integers(0, len(updates)))
    fused = make_weights(kind, seed=seed % 1000, weight_decay=0.1)
    fused.apply(updates[:cut])
    fused.apply(updates[cut:])
    assert fused.digest() == single.digest()
    assert fused.coarsenings == single.coarsenings
    assert all(lattice.is_on_lattice(tensor.values, tensor.exponent) for tensor in fused.tensors)


def test_updates_after_an_event_can_be_taken_back_and_those_before_cannot():
    weights, tensor = make_one([0.25])
    updates = away(8, 0.125)
    weights.apply(updates)
    assert [event.round for event in weights.coarsenings] == [6]
    assert tensor.values.tolist() == [1.25]
    before = weights.digest()
    with pytest.raises(IrreversibleError, match="round 6 made the lattice of w coarser"):
        weights.revert(updates[5:])
    assert (weights.digest(), weights.applied_round) == (before, 8)
    weights.revert(updates[6:])
    assert (weights.applied_round, tensor.values.tolist()) == (6, [1.0])


def test_the_last_round_that_fitted_can_always_be_taken_back():
    sign = float(direction(SEED, 1, 0, 0, 1)[0])
    weights, tensor = make_one([0.5])
    update = UpdateRecord(1, np.array([0.4375 * sign], np.float32), 0.0)
    weights.apply([update])
    assert tensor.values.tolist() == [0.9375]
    weights.revert([update])
    assert tensor.values.tolist() == [0.5]
    weights.apply([update])
    weights.apply([UpdateRecord(2, np.array([0.125], np.float32), 0.0)])
    assert [event.round for event in weights.coarsenings] == [2]


# AdamW


def adamw_by_the_book(base, index, updates, *, probe_step, exponent, beta1, beta2, epsilon, weight_decay):
    """AdamW (Loshchilov and Hutter, algorithm 2, decay times rate) in float64, without the lattice."""
    theta, m, v = base.astype(np.float64), 0.0, 0.0
    correction = probe_step / lattice.round_probe_step(probe_step, exponent, "w")
    for update in updates:
        z = [direction(SEED, update.round, p, index, base.size) for p in range(update.coefficients.size)]
        gradient = sum(float(c) * correction * z_p for c, z_p in zip(update.coefficients, z, strict=True))
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        step = (m / (1 - beta1**update.round)) / (np.sqrt(v / (1 - beta2**update.round)) + epsilon)
        theta = theta - update.learning_rate * (step + weight_decay * theta)
    return theta


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_follows_the_reference_in_float64(weight_decay):
    numbers = {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "weight_decay": weight_decay}
    weights, updates = make_weights("adamw", **numbers), make_updates(20, scale=1024.0, rate=1e-3)
    weights.apply(updates)
    for tensor in weights.tensors:
        base = make_base(tensor.values.size, tensor.index)
        expected = adamw_by_the_book(base, tensor.index, updates, probe_step=1e-3, exponent=tensor.exponent, **numbers)
        # Half a lattice step and a few float32 roundings of a step of size `rate`, in each of 20 rounds.
        tolerance = 20 * (lattice.spacing(tensor.exponent) / 2 + 1e-3 * 1e-5)
        assert np.abs(tensor.values - expected).max() < tolerance
        assert np.abs(tensor.values - base).max() > 100 * tolerance


@given(st.sampled_from([256, 512]), st.integers(1, 4))
def test_adamw_gives_the_same_bits_whatever_the_chunks(chunk, rounds):
    updates = make_updates(rounds)
    whole = make_weights("adamw", weight_decay=0.01)
    whole.apply(updates)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "CHUNK", chunk)
        patch.setattr(perturbation, "WORK", chunk)
        cut = make_weights("adamw", weight_decay=0.01)
        for update in updates:
            cut.apply([update])
    assert whole.digest() == cut.digest()


def test_adamw_stays_on_the_lattice_and_survives_probes():
    weights = make_weights("adamw", weight_decay=0.01)
    for update in make_updates(3):
        weights.probe(ProbePoint(update.round, 0, 1))
        weights.apply([update])
    assert all(lattice.is_on_lattice(tensor.values, tensor.exponent) for tensor in weights.tensors)
    replayed = make_weights("adamw", weight_decay=0.01)
    replayed.apply(make_updates(3))
    assert weights.digest() == replayed.digest()


def test_adamw_digest_covers_its_moments():
    a, b = make_weights("adamw"), make_weights("adamw")
    a.apply(make_updates(1, rate=0.0))
    b.apply([UpdateRecord(1, np.array([1e-3, 2e-3], np.float32), 0.0)])
    assert bits_of(a) == bits_of(b) == bits_of(make_weights())
    assert len({a.digest(), b.digest(), make_weights("adamw").digest()}) == 3


def test_adamw_cannot_be_taken_back():
    weights = make_weights("adamw")
    weights.apply(make_updates(1))
    with pytest.raises(IrreversibleError, match="AdamW"):
        weights.revert(make_updates(1))


def test_adamw_moves_to_a_coarser_lattice_before_a_probe_could_leave_the_exact_range():
    # The largest weight is 300/1024 and the first step is the rate: 0.5 + 0.3 + ε still fits below 1.
    fitting = make_weights("adamw", lengths=(300,), probe_step=1e-3)
    fitting.apply(make_updates(1, rate=0.5))
    assert fitting.coarsenings == []
    for weights, rate in (
        (make_weights("adamw", lengths=(300,)), 0.8),
        (make_weights("adamw", lengths=(300,), probe_step=0.4), 0.5),
    ):
        weights.apply(make_updates(1, rate=rate))
        assert [(event.round, event.tensor) for event in weights.coarsenings] == [(1, "w0")]
        assert lattice.is_on_lattice(weights.tensors[0].values, weights.tensors[0].exponent)


def test_adamw_refuses_what_it_cannot_square_and_changes_nothing():
    weights = make_weights("adamw")
    before = weights.digest()
    with pytest.raises(HoslError, match=r"round 1 is an estimate of 1e\+30"):
        weights.apply([UpdateRecord(1, np.array([1e30], np.float32), 1e-3)])
    with pytest.raises(LatticeError, match="weights of w0"):
        weights.apply([UpdateRecord(1, np.array([1.0], np.float32), 1e6)])
    assert (weights.digest(), weights.applied_round) == (before, 0)


@given(
    st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=1, max_size=40),
    st.sampled_from([(0.9, 0.999), (0.9, 0.82), (0.0, 0.5)]),
)
def test_no_step_of_adamw_is_longer_than_its_bound(coefficients, betas):
    weights, tensor = make_one([0.0], optimizer="adamw", beta1=betas[0], beta2=betas[1], probe_step=0.25)
    optimizer = weights._adamw
    for n, coefficient in enumerate(coefficients, 1):
        bound, before = optimizer.growths([0.0], weights.tensors, 2.0**-6)[0], float(tensor.values[0])
        weights.apply([UpdateRecord(n, np.array([coefficient], np.float32), 2.0**-6)])
        assert abs(float(tensor.values[0]) - before) <= bound + lattice.spacing(weights.tensors[0].exponent)


def test_the_bound_on_adamws_steps_has_its_golden_value():
    """protocol/README.md has the same numbers: machines compare them with the range, to the last bit."""
    tensor = LatticeTensor("w", 0, np.zeros(1, np.float32), -24)
    weights = ClientWeights(
        [tensor], seed=1, probe_step=1e-3, optimizer=ClientOptimizer(optimizer="adamw", weight_decay=0.01)
    )
    found = []
    for round_ in range(1, 101):
        found += weights._adamw.growths([0.3], weights.tensors, 1e-3)
        weights.apply([UpdateRecord(round_, np.zeros(2, np.float32), 1e-3)])
    assert [found[n - 1] for n in (1, 2, 3, 10, 100)] == [
        *(0.0010040626046447752, 0.001005421878655242, 0.0010076797882952366),
        *(0.0010472134297885456, 0.0022486700550596148),
    ]


# Digest


def test_digest_is_sha256_of_the_tensors_in_order():
    weights = make_weights()
    expected = hashlib.sha256(b"".join(make_base(n, i).astype("<f4").tobytes() for i, n in enumerate(LENGTHS)))
    weights.probe(ProbePoint(1, 0, 1))
    assert weights.digest() == expected.hexdigest()


def test_weights_have_their_golden_digest():
    sgd, adamw = make_weights(), make_weights("adamw", weight_decay=0.01)
    base = sgd.digest()
    sgd.apply(make_updates(5))
    adamw.apply(make_updates(5))
    assert (base, sgd.digest(), adamw.digest()) == GOLDEN_DIGESTS


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_weights_have_their_golden_digest_with_gaussian_directions(kind):
    weights = make_weights(kind, weight_decay=0.01, distribution="gaussian")
    weights.apply(make_updates(5))
    assert weights.digest() == GOLDEN_GAUSSIAN[kind]


def test_more_directions_than_one_pass_takes_have_their_golden_digest():
    weights = make_weights("adamw", weight_decay=0.01)
    weights.apply(make_updates(5, directions=200))
    assert weights.digest() == GOLDEN_MANY_DIRECTIONS


@pytest.mark.parametrize(
    ("kind", "scale", "events"), [("sgd", 64.0, [(60, 0), (325, 1), (755, 0), (836, 2)]), ("adamw", 1.0, [(177, 0)])]
)
def test_weights_have_their_golden_digest_after_a_thousand_updates(kind, scale, events):
    weights = make_weights(kind, weight_decay=0.01)
    weights.apply(make_updates(1000, scale=scale, rate=2.0**-6))
    assert [(event.round, event.tensor) for event in weights.coarsenings] == [(n, f"w{t}") for n, t in events]
    assert weights.digest() == GOLDEN_LONG[kind]


def test_weights_have_their_golden_digest_after_events_with_gaussian_directions():
    weights = make_weights(distribution="gaussian")
    weights.apply(make_updates(1000, scale=64.0))
    events = [(event.round, event.tensor) for event in weights.coarsenings]
    assert events == [(7, "w0"), (343, "w1"), (386, "w2"), (874, "w0")]
    assert weights.digest() == GOLDEN_LONG["gaussian"]


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_ten_thousand_mixed_moves_leave_the_bits_of_the_updates_alone(distribution, monkeypatch):
    """Probes, restores, updates and take-backs in a random order, by one thread or three, in odd stretches."""
    chance = np.random.default_rng(7)
    updates = make_updates(40)
    expected = [make_weights(distribution=distribution).digest()]
    straight = make_weights(distribution=distribution)
    for update in updates:
        straight.apply([update])
        expected.append(straight.digest())
    monkeypatch.setattr(client, "THREADED_ABOVE", 10)
    weights, moves = make_weights(distribution=distribution, threads=3), 0
    if distribution == "rademacher":
        monkeypatch.setattr(perturbation, "WORK", 64)
        monkeypatch.setattr(perturbation, "SEGMENT", 256)
    while moves < 10_000:
        for _ in range(int(chance.integers(1, 40))):
            weights.probe(ProbePoint(int(chance.integers(1, 99)), int(chance.integers(4)), int(chance.choice([-1, 1]))))
            moves += 1
        target, here = int(chance.integers(0, 41)), weights.applied_round
        if target > here:
            weights.apply(updates[here:target])
        else:
            weights.revert(updates[target:here])
        moves += abs(target - here)
        assert weights.digest() == expected[target]
    weights.close()


def test_threads_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(client, "THREADED_ABOVE", 10)
    one, two = make_weights(), make_weights(threads=2)
    one.apply(make_updates(3))
    two.apply(make_updates(3))
    two.close()
    assert one.digest() == two.digest()


# From a manifest


def make_manifest():
    entries = (
        TensorEntry(name="frozen", shape=(4,)),
        TensorEntry(name="a", shape=(2, 3), trainable=True, exponent=-24),
        TensorEntry(name="b", shape=(5,), trainable=True, exponent=-23),
    )
    return Manifest(
        model="m", family="opt", architecture="OPTForCausalLM", split=1, blocks=2, width=4, max_length=8,
        pad_token_id=0, train="blocks", tensors=entries, files=(),
    )  # fmt: skip


def make_settings(**changes):
    task = {"name": "lm", "kind": "lm", "template": "{text}"}
    return convert({"task": task, **changes}, RunSettings, "run")


def test_weights_of_a_manifest_change_the_tensors_in_place():
    tensors = {"frozen": np.zeros(4, np.float32), "a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float32)}
    weights = make_client_weights(make_manifest(), tensors, make_settings(seed=3, probe_step=2.0**-10))
    weights.apply([UpdateRecord(1, np.array([0.125], np.float32), 0.0)])
    assert (weights.elements, [tensor.name for tensor in weights.tensors]) == (11, ["a", "b"])
    assert np.array_equal(tensors["a"], 0.125 * direction(3, 1, 0, 0, 6).reshape(2, 3))
    assert np.array_equal(tensors["b"], 0.125 * direction(3, 1, 0, 1, 5))
    assert not tensors["frozen"].any()


GOLDEN_FROZEN = {
    "sgd": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "adamw": "220dde27afee4d537cac96d85d6546f825153b90e828931b74e103807541bc42",
}


@pytest.mark.parametrize("kind", GOLDEN_FROZEN)
def test_a_frozen_run_has_no_trainable_weights_and_counts_its_rounds(kind):
    settings = make_settings(algorithm="frozen", client={"optimizer": kind})
    weights = make_client_weights(make_manifest(), {}, settings)
    weights.apply([UpdateRecord(round_, np.empty(0, np.float32), 0.0) for round_ in range(1, 13)])
    assert (weights.elements, weights.applied_round) == (0, 12)
    assert weights.digest() == GOLDEN_FROZEN[kind]


# Replays in portions


@pytest.mark.parametrize(("size", "has_events"), [(1.0, False), (1024.0, True)])
def test_portions_of_any_size_give_the_same_bits(monkeypatch, size, has_events):
    updates = make_updates(150, scale=size)
    whole = make_weights()
    whole.apply(updates)
    assert bool(whole.coarsenings) == has_events
    for portion in (0, 200, 1000):
        monkeypatch.setattr(client, "PORTION", portion)
        monkeypatch.setattr(client, "TERMS_PER_PASS", 3)
        parts = make_weights()
        parts.apply(iter(updates))
        assert (bits_of(parts), parts.coarsenings) == (bits_of(whole), whole.coarsenings)
        if not has_events:
            parts.revert(updates[20:])
            assert parts.applied_round == 20
            parts.apply(updates[20:])
            assert bits_of(parts) == bits_of(whole)


def test_a_replay_takes_no_more_memory_where_more_rounds_were_missed(monkeypatch):
    monkeypatch.setattr(client, "PORTION", 640)

    def peak_bytes(rounds):
        tensors = [LatticeTensor(f"w{index}", index, np.zeros(8, np.float32), -24) for index in range(10)]
        weights = ClientWeights(tensors, seed=SEED, probe_step=1e-3, optimizer=ClientOptimizer())
        updates = (UpdateRecord(n, np.full(4, 2.0**-20, np.float32), 1e-3) for n in range(1, rounds + 1))
        tracemalloc.start()
        weights.apply(updates)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert weights.applied_round == rounds
        return peak

    assert peak_bytes(400) < 1.5 * peak_bytes(40)
