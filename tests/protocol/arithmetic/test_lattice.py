"""The lattice: exponents and the three roundings."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_protocol.arithmetic import lattice
from hosl_protocol.arithmetic.directions import Stream, uniforms
from hosl_protocol.exceptions import SettingsError

magnitudes = st.floats(min_value=0.0, max_value=2.0**100, width=32)
exponents = st.integers(-24, -10)


@given(magnitudes)
def test_exponent_is_sufficient_and_the_smallest_that_is(largest):
    exponent = lattice.exponent_for(largest)
    needed = max(2.0 * largest, 1.0)
    assert lattice.limit(exponent) >= needed > lattice.limit(exponent - 1)


@pytest.mark.parametrize(("largest", "exponent"), [(0.0, -24), (0.5, -24), (0.500001, -23), (1.0, -23), (1.5, -22)])
def test_exponents_at_the_powers_of_two(largest, exponent):
    assert lattice.exponent_for(largest) == exponent


@pytest.mark.parametrize("largest", [math.nan, math.inf])
def test_weights_that_are_not_finite_have_no_lattice(largest):
    with pytest.raises(SettingsError, match="not finite"):
        lattice.exponent_for(largest)


@given(st.lists(st.floats(-4.0, 4.0, width=32), min_size=1, max_size=50))
def test_rounded_weights_lie_on_the_lattice_within_half_a_step(values):
    weights = np.array(values, np.float32)
    exponent = lattice.exponent_for(float(np.abs(weights).max()))
    rounded = lattice.round_to_lattice(weights, exponent)
    assert lattice.is_on_lattice(rounded, exponent)
    assert np.all(np.abs(rounded.astype(np.float64) - weights) <= lattice.spacing(exponent) / 2)
    assert np.array_equal(lattice.round_to_lattice(rounded, exponent), rounded)


def test_zero_is_always_plus_zero_on_the_lattice():
    tiny = np.array([-1e-12, -0.0, 0.0, 1e-12], np.float32)
    rounded = lattice.round_to_lattice(tiny, -24)
    assert rounded.tobytes() == bytes(16)
    assert not lattice.is_on_lattice(np.array([-0.0], np.float32), -24)


def test_values_between_lattice_points_or_beyond_the_range_are_noticed():
    g = lattice.spacing(-20)
    assert lattice.is_on_lattice(np.array([3 * g, -g], np.float32), -20)
    assert lattice.is_on_lattice(np.empty(0, np.float32), -20)
    assert not lattice.is_on_lattice(np.array([1.5 * g], np.float32), -20)
    assert not lattice.is_on_lattice(np.array([2 * lattice.limit(-20)], np.float32), -20)
    assert not lattice.is_on_lattice(np.array([math.nan], np.float32), -20)


@given(st.floats(1e-4, 0.4), exponents)
def test_probe_step_is_the_nearest_multiple_of_the_spacing(step, exponent):
    g = lattice.spacing(exponent)
    if step <= g / 2:
        return
    rounded = lattice.round_probe_step(step, exponent, "w")
    assert rounded > 0.0
    assert rounded % g == 0.0
    assert abs(rounded - step) <= g / 2


def test_probe_step_that_rounds_to_zero_is_an_error_with_a_remedy():
    with pytest.raises(SettingsError, match=r"probe_step is 1e-09: .* lattice of layers.0.w; use at least 5.96e-08"):
        lattice.round_probe_step(1e-9, -24, "layers.0.w")


@given(st.floats(-0.1, 0.1), exponents, st.floats(0.0, 1.0, exclude_max=True))
def test_stochastic_rounding_takes_one_of_the_two_neighbours(step, exponent, uniform):
    g = lattice.spacing(exponent)
    rounded = lattice.round_stochastically(step, exponent, uniform)
    assert (rounded / g).is_integer()
    assert abs(rounded - step) <= g


@given(st.integers(-(2**23), 2**23), exponents, st.floats(0.0, 1.0, exclude_max=True))
def test_stochastic_rounding_leaves_multiples_alone(multiple, exponent, uniform):
    step = math.ldexp(multiple, exponent)
    assert lattice.round_stochastically(step, exponent, uniform) == step


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9, -0.3, 7.2])
def test_stochastic_rounding_is_unbiased(fraction):
    count, g = 20_000, lattice.spacing(-24)
    chances = uniforms(3, 1, 0, Stream.ROUNDING, count).tolist()
    mean = sum(lattice.round_stochastically(fraction * g, -24, chance) for chance in chances) / count
    remainder = fraction - math.floor(fraction)
    deviation = g * math.sqrt(remainder * (1 - remainder) / count)
    assert abs(mean - fraction * g) < 4 * deviation


def test_stochastic_rounding_goes_up_exactly_where_the_uniform_is_below_the_remainder():
    g = lattice.spacing(-20)
    assert lattice.round_stochastically(2.25 * g, -20, 0.24) == 3 * g
    assert lattice.round_stochastically(2.25 * g, -20, 0.25) == 2 * g
    assert lattice.round_stochastically(-2.25 * g, -20, 0.74) == -2 * g
    assert lattice.round_stochastically(-2.25 * g, -20, 0.75) == -3 * g
