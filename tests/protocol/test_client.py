"""The client's weights: probes, updates from scalars, range guard, AdamW, digest."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_protocol import (
    ClientOptimizer,
    ClientWeights,
    HoslError,
    LatticeError,
    LatticeTensor,
    Manifest,
    ProbePoint,
    RunSettings,
    SettingsError,
    TensorEntry,
    UpdateRecord,
    client,
    convert,
    direction,
    lattice,
    make_client_weights,
    perturbation,
)

SEED = 42
LENGTHS = (300, 17, 256)

# After test_weights_have_their_golden_digest's updates; the same stands in protocol/README.md.
GOLDEN_DIGESTS = (
    "d61d082b67769e46e937ec0d974a83043de2bc3885c52a73a7dc6d889204c358",
    "5cd7a681e949af0e98d6be2af4c1cbbe5787198d24ee500d080934b9363d2488",
    "97c9331fa25ca20c7dffe7629b2558a7d16d29be128c415af8807f43378ed364",
)


def make_base(length, index):
    """Multiples of 2^-10 from a line of a simple congruence: the same everywhere."""
    return np.array([((place * 37 + index * 11) % 601 - 300) / 1024 for place in range(length)], np.float32)


def make_weights(kind="sgd", *, seed=SEED, lengths=LENGTHS, probe_step=1e-3, threads=1, **optimizer):
    tensors = [LatticeTensor(f"w{i}", i, make_base(n, i), -24 + i) for i, n in enumerate(lengths)]
    chosen = ClientOptimizer(optimizer=kind, **optimizer)
    return ClientWeights(tensors, seed=seed, probe_step=probe_step, optimizer=chosen, threads=threads)


def make_updates(count, *, scale=1.0, rate=1e-3):
    """Coefficients that are exact in float32 and the same everywhere."""
    rows = [[((7 * r + 5 * p) % 13 - 6) * 2.0**-13 * scale for p in range(2)] for r in range(1, count + 1)]
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


# The range in which sums are exact


def make_one(values, probe_step=2.0**-10):
    tensor = LatticeTensor("w", 0, np.array(values, np.float32), -24)  # exact up to 1
    return ClientWeights([tensor], seed=SEED, probe_step=probe_step, optimizer=ClientOptimizer()), tensor


def test_range_guard_raises_before_the_weights_leave_the_exact_range():
    weights, tensor = make_one([0.5, -0.25])
    with pytest.raises(LatticeError, match=r"weights of w may reach 1\.1.*, exact sums end at 1: lower") as caught:
        weights.apply([UpdateRecord(1, np.array([0.6], np.float32), 0.0)])
    assert tensor.values.tolist() == [0.5, -0.25]
    assert (weights.applied_round, caught.value.tensor, caught.value.limit) == (0, "w", 1.0)


def test_range_guard_leaves_room_for_the_probe_step():
    weights, _ = make_one([0.5], probe_step=0.25)
    with pytest.raises(LatticeError):
        weights.apply([UpdateRecord(1, np.array([0.375], np.float32), 0.0)])
    weights.apply([UpdateRecord(1, np.array([0.25], np.float32), 0.0)])


def to_and_fro(rounds, size=0.125):
    """Updates that move a weight of one element up and down by turns."""
    signs = [float(direction(SEED, n, 0, 0, 1)[0]) * (-1) ** n for n in range(1, rounds + 1)]
    return [UpdateRecord(n, np.array([size * s], np.float32), 0.0) for n, s in enumerate(signs, 1)]


def test_range_guard_takes_the_true_maximum_before_it_gives_up():
    weights, tensor = make_one([0.25])
    for update in to_and_fro(20):  # their sizes add up to 2.5; the weight never leaves 0.125 to 0.375
        weights.apply([update])
    assert weights.applied_round == 20
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


def test_a_catch_up_that_leaves_the_range_stops_at_the_last_round_that_fits():
    up = [float(direction(SEED, n, 0, 0, 1)[0]) for n in range(1, 9)]
    updates = [UpdateRecord(n, np.array([0.125 * s], np.float32), 0.0) for n, s in enumerate(up, 1)]
    weights, tensor = make_one([0.25])
    with pytest.raises(LatticeError):
        weights.apply(updates)
    assert weights.applied_round == 5
    assert tensor.values.tolist() == [0.25 + 5 * 0.125]


def test_the_last_round_that_fitted_can_always_be_taken_back():
    sign = float(direction(SEED, 1, 0, 0, 1)[0])
    weights, tensor = make_one([0.5])
    update = UpdateRecord(1, np.array([0.4375 * sign], np.float32), 0.0)
    weights.apply([update])
    assert tensor.values.tolist() == [0.9375]
    weights.revert([update])
    assert tensor.values.tolist() == [0.5]
    weights.apply([update])
    with pytest.raises(LatticeError):
        weights.apply([UpdateRecord(2, np.array([0.125], np.float32), 0.0)])


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
        patch.setattr(client, "CHUNK", chunk)
        patch.setattr(perturbation, "CHUNK", chunk)
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


def test_adamw_cannot_be_taken_back_and_says_what_to_do():
    weights = make_weights("adamw")
    weights.apply(make_updates(1))
    with pytest.raises(HoslError, match="replay from the base shard"):
        weights.revert(make_updates(1))


def test_adamw_raises_before_a_probe_could_leave_the_exact_range():
    with pytest.raises(LatticeError, match="weights of w0"):
        make_weights("adamw").apply(make_updates(1, rate=0.8))
    # The largest weight is 300/1024 and the step is the rate: 0.5 + 0.3 + ε still fits below 1.
    make_weights("adamw", probe_step=1e-3).apply(make_updates(1, rate=0.5))
    with pytest.raises(LatticeError, match="weights of w0"):
        make_weights("adamw", probe_step=0.4).apply(make_updates(1, rate=0.5))


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


def test_a_frozen_run_has_no_trainable_weights_and_counts_its_rounds():
    weights = make_client_weights(make_manifest(), {}, make_settings(algorithm="frozen"))
    weights.apply([UpdateRecord(1, np.empty(0, np.float32), 0.0)])
    assert (weights.elements, weights.applied_round) == (0, 1)
    assert weights.digest() == hashlib.sha256().hexdigest()
