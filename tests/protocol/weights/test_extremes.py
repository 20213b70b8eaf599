"""Settings at the ends of what the checks let pass: float32 holds what comes of them, or a sentence says why not."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hosl_protocol.arithmetic import lattice
from hosl_protocol.arithmetic.perturbation import LatticeTensor
from hosl_protocol.exceptions import HoslError, SettingsError
from hosl_protocol.run.schedule import scheduled_rate
from hosl_protocol.run.settings import (
    MAX_BETA1,
    MAX_BETA_RATIO,
    MIN_BETA2,
    MIN_EPSILON,
    ClientOptimizer,
    RunSettings,
    check_run_settings,
)
from hosl_protocol.run.tasks import Task, load_preset
from hosl_protocol.weights.client_weights import ClientWeights
from hosl_protocol.weights.estimates import UpdateRecord

EXPONENTS = (-24, 0, 103)
TASK = Task(**load_preset("sst2"))

numbers = st.one_of(
    st.sampled_from([0.0, 5e-324, 1e-50, 1e-45, 1e-30, MIN_EPSILON, 1e-3, 1.0 - 2.0**-53, 1.0, 1e9, 1e39, 1e308]),
    st.floats(0.0, 1.0),
    st.floats(0.0),
)
names = st.sampled_from(["learning_rate", "beta1", "beta2", "epsilon", "weight_decay"])
# Few at a time: of many at once hardly any are accepted.
optimizers = st.dictionaries(names, numbers, max_size=2)
coefficients = st.builds(
    lambda fraction, power: float(np.float32(math.ldexp(fraction, power))), st.floats(-1.0, 1.0), st.integers(-149, 120)
)
updates = st.lists(st.lists(coefficients, min_size=2, max_size=2), min_size=1, max_size=6)


@settings(max_examples=300)
@given(optimizers, st.sampled_from(["sgd", "adamw"]), st.one_of(st.sampled_from([1e-3, 0.3]), numbers), updates)
def test_accepted_settings_keep_the_weights_on_their_lattice_or_say_why_not(optimizer, kind, probe_step, rows):
    client = ClientOptimizer(optimizer=kind, **optimizer)
    run = RunSettings(task=TASK, rounds=len(rows), probe_step=probe_step, client=client)
    try:
        check_run_settings(run)
        tensors = [LatticeTensor(f"w{n}", n, np.zeros(40, np.float32), e) for n, e in enumerate(EXPONENTS)]
        weights = ClientWeights(tensors[: 1 if probe_step < 1 else 3], seed=1, probe_step=probe_step, optimizer=client)
        for round_, row in enumerate(rows, 1):
            rate = scheduled_rate(client, round_, run.rounds)
            weights.apply([UpdateRecord(round_, np.array(row, np.float32), rate)])
    except SettingsError:
        return
    except HoslError:
        pass  # the weights have diverged, and stand where they did
    for tensor in weights.tensors:
        assert np.isfinite(tensor.values).all()
        assert lattice.is_on_lattice(tensor.values, tensor.exponent)


@given(
    st.one_of(st.just(0.9), st.floats(0.0, MAX_BETA1)),
    st.one_of(st.just(1.0 - 2.0**-53), st.floats(0.0, 1.0, exclude_max=True)),
    st.lists(coefficients.filter(lambda value: abs(value) < 1e14), min_size=1, max_size=60),
    st.integers(-100, 0),
)
def test_no_step_of_adamw_passes_its_bound_whatever_underflows(beta1, share, row, power):
    """Estimates of any size, the squares of which float32 cannot hold among them, with the least epsilon allowed."""
    lowest = max(MIN_BETA2, beta1 * beta1 / MAX_BETA_RATIO)
    beta2 = min(lowest + share * (1.0 - lowest), 1.0 - 2.0**-53)
    client = ClientOptimizer(optimizer="adamw", beta1=beta1, beta2=beta2, epsilon=MIN_EPSILON)
    check_run_settings(RunSettings(task=TASK, client=client))
    tensor = LatticeTensor("w", 0, np.zeros(1, np.float32), -24)
    weights = ClientWeights([tensor], seed=1, probe_step=0.25, optimizer=client)
    optimizer = weights._adamw
    assert optimizer is not None
    for round_, coefficient in enumerate(row, 1):
        bound, before = optimizer.growths([0.0], weights.tensors, 2.0**-6)[0], float(tensor.values[0])
        update = np.array([math.ldexp(coefficient, power)], np.float32)
        weights.apply([UpdateRecord(round_, update, 2.0**-6)])
        assert abs(float(tensor.values[0]) - before) <= bound + lattice.spacing(weights.tensors[0].exponent)
