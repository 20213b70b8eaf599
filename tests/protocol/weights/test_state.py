"""The client's state: what one machine gives, another takes on, and goes on with the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hosl_protocol.arithmetic.perturbation import LatticeTensor
from hosl_protocol.exceptions import HoslError, IrreversibleError, SettingsError
from hosl_protocol.run.settings import ClientOptimizer
from hosl_protocol.weights.client_weights import ClientWeights, ProbePoint
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.weights.state import ClientState, Moments

LENGTHS = (300, 17, 256)
KINDS = ["sgd", "adamw"]


def make_weights(kind="sgd", *, lengths=LENGTHS, distribution="rademacher", **optimizer):
    values = [np.array([(place % 41 - 20) / 1024 for place in range(n)], np.float32) for n in lengths]
    tensors = [LatticeTensor(f"w{i}", i, each, -24 + i) for i, each in enumerate(values)]
    chosen = ClientOptimizer(optimizer=kind, **optimizer)
    return ClientWeights(tensors, seed=42, probe_step=1e-3, optimizer=chosen, distribution=distribution)


def make_updates(first, last, *, size=2.0**-13, rate=1e-3):
    rows = [np.array([((7 * r + 5 * p) % 13 - 6) * size for p in range(2)], np.float32) for r in range(first, last + 1)]
    return [UpdateRecord(first + n, row, rate) for n, row in enumerate(rows)]


def copy_of(state: ClientState) -> ClientState:
    moments = state.moments
    if moments is not None:
        first, second = ({n: v.copy() for n, v in part.items()} for part in (moments.first, moments.second))
        moments = Moments(moments.steps, first, second)
    return replace(state, weights={n: v.copy() for n, v in state.weights.items()}, moments=moments)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_took_on_a_state_go_on_with_the_same_bits(kind, distribution):
    ahead, behind = (make_weights(kind, distribution=distribution, weight_decay=0.01) for _ in range(2))
    ahead.apply(make_updates(1, 20))
    behind.apply(make_updates(1, 3))
    behind.probe(ProbePoint(4, 0, 1))
    behind.load_state(copy_of(ahead.state()))
    assert (behind.applied_round, behind.digest()) == (20, ahead.digest())
    for weights in (ahead, behind):
        weights.apply(make_updates(21, 30))
    assert behind.digest() == ahead.digest()


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_after_a_relattice_event_brings_the_coarser_lattice(kind):
    big = {"size": 2.0**-5, "rate": 2.0**-4}
    ahead, behind = make_weights(kind), make_weights(kind)
    while not ahead.coarsenings:
        ahead.apply(make_updates(ahead.applied_round + 1, ahead.applied_round + 1, **big))
    behind.load_state(copy_of(ahead.state()))
    assert [tensor.exponent for tensor in behind.tensors] == [tensor.exponent for tensor in ahead.tensors]
    first = ahead.applied_round + 1
    for weights in (ahead, behind):
        weights.apply(make_updates(first, first + 200, **big))
    assert behind.digest() == ahead.digest()
    assert behind.coarsenings == [event for event in ahead.coarsenings if event.round >= first]


def test_rounds_after_a_loaded_state_can_be_taken_back_and_those_before_cannot():
    ahead, behind = make_weights(), make_weights()
    ahead.apply(make_updates(1, 5))
    behind.load_state(copy_of(ahead.state()))
    base, later = behind.digest(), make_updates(6, 8)
    behind.apply(later)
    with pytest.raises(IrreversibleError, match="as they stood after round 5"):
        behind.revert([*make_updates(5, 5), *later])
    assert behind.applied_round == 8
    behind.revert(later)
    assert behind.digest() == base


def test_a_state_is_shared_until_it_is_copied():
    weights = make_weights()
    state = weights.state()
    weights.apply(make_updates(1, 1))
    assert state.digest() == weights.digest()


WRONGS = {
    "a tensor is missing": lambda s: replace(s, weights={n: v for n, v in s.weights.items() if n != "w1"}),
    "a tensor has another size": lambda s: replace(s, weights={**s.weights, "w1": np.zeros(3, np.float32)}),
    "another optimizer": lambda s: replace(s, moments=None if s.moments else Moments(1, {}, {})),
    "an exponent is missing": lambda s: replace(s, exponents={}),
    "a lattice finer than the manifest's": lambda s: replace(s, exponents={**s.exponents, "w1": -24}),
    "a lattice coarser than a run may use": lambda s: replace(s, exponents={**s.exponents, "w1": -14}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", WRONGS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(kind, wrong):
    weights = make_weights(kind)
    weights.apply(make_updates(1, 3))
    before = weights.digest()
    with pytest.raises(HoslError, match="the state "):
        weights.load_state(WRONGS[wrong](copy_of(weights.state())))
    assert (weights.digest(), weights.applied_round) == (before, 3)


def test_adamws_moments_must_be_of_the_same_tensors_and_steps():
    weights = make_weights("adamw")
    weights.apply(make_updates(1, 3))
    state = copy_of(weights.state())
    with pytest.raises(HoslError, match="of other tensors"):
        weights.load_state(replace(state, moments=replace(state.moments, first={})))
    with pytest.raises(HoslError, match="of round 3 and of 4 steps"):
        weights.load_state(replace(state, moments=replace(state.moments, steps=4)))


def test_a_lattice_that_the_probe_step_does_not_meet_changes_nothing():
    tensor = LatticeTensor("w", 0, np.zeros(4, np.float32), -24)
    weights = ClientWeights([tensor], seed=1, probe_step=2.0**-23, optimizer=ClientOptimizer())
    with pytest.raises(SettingsError, match="rounds to 0"):
        weights.load_state(ClientState(7, {"w": np.ones(4, np.float32)}, {"w": -20}))
    assert (weights.applied_round, weights.tensors, tensor.values.tolist()) == (0, [tensor], [0.0] * 4)
