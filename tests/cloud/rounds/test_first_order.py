"""A round of first-order training: what devices' gradients come to, and what becomes of those that cannot be."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from hosl_cloud.rounds import algorithms as rounds
from hosl_cloud.rounds.exchange import Ask, Fault, Tell
from hosl_cloud.rounds.first_order import LARGEST_SCALE, SentGradient, average_gradients
from hosl_cloud.settings import DeviceSettings
from hosl_protocol.arithmetic.directions import CHUNK
from hosl_protocol.arithmetic.rotation import GradientLayout, Rotation, rotation_of
from hosl_protocol.run.settings import ClientOptimizer
from hosl_protocol.weights.adamw import LARGEST_ESTIMATE
from hosl_protocol.weights.estimates import UPDATE_ROTATION, UpdateRecord
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import Anchor, CutGradient, Gradient, Late, RoundStart
from leading import NAME, RATE, Cloud, drive

Floats = npt.NDArray[np.float32]
SIZES = (5, 40, 4200)
SEED, ROUND = 5, 1


def whole(parts: Floats, sizes: tuple[int, ...] = SIZES) -> list[Floats]:
    return np.split(parts, np.cumsum(sizes)[:-1])


def sent(layout: GradientLayout, values: Floats, device: str) -> SentGradient:
    """What a device makes of its gradient."""
    codes, scales = layout.empty()
    rotation = rotation_of(device)
    for index, part in enumerate(whole(values, layout.sizes)):
        layout.encode(part, index, Rotation(SEED, ROUND, rotation), codes, scales)
    return SentGradient(codes, scales, rotation)


def received(layout: GradientLayout, codes: Any, scales: Floats, rotation: int = UPDATE_ROTATION) -> Floats:
    """What is decoded of it."""
    parts = []
    for index, size in enumerate(layout.sizes):
        for start in range(0, size, CHUNK):
            out = np.empty(min(CHUNK, size - start), np.float32)
            layout.decode(codes, scales, index, Rotation(SEED, ROUND, rotation), start, out)
            parts.append(out)
    return np.concatenate(parts)


def random_gradients(names: str = "abc", sizes: tuple[int, ...] = SIZES) -> dict[str, Floats]:
    generator = np.random.default_rng(3)
    return {name: generator.standard_normal(sum(sizes)).astype(np.float32) for name in names}


def average(
    values: Mapping[str, Floats], weights: Mapping[str, float] | None = None, bits: int = 32, **devices: Any
) -> Floats:
    """The average of gradients as devices then decode it."""
    layout = GradientLayout(SIZES, bits)
    gradients = {name: sent(layout, gradient, name) for name, gradient in values.items()}
    weights = weights or dict.fromkeys(values, 1.0)
    return received(layout, *average_gradients(gradients, weights, DeviceSettings(**devices), layout, SEED, ROUND))


def test_the_mean_is_weighted() -> None:
    values = random_gradients("ab")
    got = average(values, {"a": 1.0, "b": 3.0})
    np.testing.assert_allclose(got, (values["a"] + 3.0 * values["b"]) / 4.0, atol=1e-6)


def test_robust_averages_take_each_entry_by_itself() -> None:
    values = {
        name: np.full(sum(SIZES), value, np.float32) for name, value in zip("abcde", (-90, 1, 2, 6, 1e6), strict=True)
    }
    values["a"][7], values["e"][7] = 3.0, 4.0
    median = average(values, aggregation="median")
    assert (median[7], set(np.delete(median, 7))) == (3.0, {2.0})
    trimmed = average(values, aggregation="trimmed-mean", trim=0.2)
    assert (trimmed[7], set(np.delete(trimmed, 7))) == (3.0, {3.0})


@pytest.mark.parametrize("aggregation", ["mean", "trimmed-mean"])
def test_clip_shortens_a_gradient_to_so_many_medians_of_their_lengths(aggregation: str) -> None:
    direction = random_gradients("a")["a"]
    values = {name: direction * np.float32(factor) for name, factor in zip("abc", (1.0, 2.0, 100.0), strict=True)}
    got = average(values, clip=3.0, aggregation=aggregation, trim=0.0)
    np.testing.assert_allclose(got, direction * (1.0 + 2.0 + 6.0) / 3.0, rtol=1e-5)


def test_the_limit_of_clip_is_of_what_was_decoded() -> None:
    values = {"a": random_gradients()["a"]}
    np.testing.assert_array_equal(average(values, bits=4, clip=1.0), average(values, bits=4))


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.2), (2, 0.6), (1, 1.4)])
def test_an_average_in_a_few_bits_points_where_the_mean_does(bits: int, error: float) -> None:
    values = random_gradients("abcdefghijklmnop")
    mean = np.mean(list(values.values()), axis=0)
    assert np.linalg.norm(average(values, bits=bits) - mean) < error * np.linalg.norm(mean)


@pytest.mark.parametrize("aggregation", ["mean", "trimmed-mean", "median"])
def test_the_order_of_arrival_does_not_matter_to_a_bit(aggregation: str) -> None:
    # Opposite numbers, and some that are lost beside one of them: a sum of float64 depends on its order.
    big, tiny = random_gradients("ab").values()
    values = {"a": np.float32(1e6) * big, "b": np.float32(-1e6) * big, "c": np.float32(1e-12) * tiny}
    weights = {"a": 2.0, "b": 2.0, "c": 3.0}
    there = average(values, weights, aggregation=aggregation, trim=0.0)
    back = average(dict(reversed(values.items())), weights, aggregation=aggregation, trim=0.0)
    assert there.tobytes() == back.tobytes()


def test_without_gradients_the_average_is_zero() -> None:
    assert not average({}).any()


def test_a_tensor_of_several_chunks_is_averaged_whole() -> None:
    sizes = (CHUNK + 100,)
    layout, values = GradientLayout(sizes, 8), random_gradients("ab", (CHUNK + 100,))
    gradients = {name: sent(layout, gradient, name) for name, gradient in values.items()}
    for aggregation in ("mean", "median"):
        devices = DeviceSettings(aggregation=aggregation)  # type: ignore[arg-type]
        codes, scales = average_gradients(gradients, {"a": 1.0, "b": 1.0}, devices, layout, SEED, ROUND)
        mean = (values["a"] + values["b"]) / 2.0
        assert np.linalg.norm(received(layout, codes, scales) - mean) < 0.05 * np.linalg.norm(mean)


def test_memory_grows_with_a_chunk_of_each_device_alone() -> None:
    layout = GradientLayout((20 * CHUNK,), 1)
    codes, scales = layout.empty()
    scales[:] = 1.0
    gradients = {f"d{place}": SentGradient(codes, scales, 1 + place) for place in range(8)}
    for aggregation in ("mean", "median"):
        devices = DeviceSettings(aggregation=aggregation)  # type: ignore[arg-type]
        tracemalloc.start()
        average_gradients(gradients, dict.fromkeys(gradients, 1.0), devices, layout, SEED, ROUND)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * 20 * CHUNK + 4 * CHUNK * 2 * 8 + 2**22, aggregation


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
def test_no_average_of_what_is_let_in_is_too_large_for_adamw(bits: int) -> None:
    layout = GradientLayout((4096, 37), bits)
    largest, (codes, scales) = np.nextafter(np.float32(LARGEST_SCALE), np.float32(0)), layout.empty()
    scales[:], codes[:] = largest, 0xFF
    for same in (True, False):
        if not same and bits < 32:
            # A single entry of the average as large as can be.
            one = np.zeros(4133, np.float32)
            one[5] = np.abs(received(layout, codes, scales, 1)).max()
            codes, scales = layout.empty()
            for index, part in enumerate(whole(one, layout.sizes)):
                layout.encode(part, index, Rotation(SEED, ROUND, 1), codes, scales)
        gradients = {"a": SentGradient(codes, scales, 1)}
        updated = average_gradients(gradients, {"a": 1.0}, DeviceSettings(), layout, SEED, ROUND)
        assert np.abs(received(layout, *updated)).max() < LARGEST_ESTIMATE


class FirstOrderCloud(Cloud):
    """Rounds of first-order training with made-up gradients."""

    def __init__(self, bundle: Any, weighting: str = "equal", bits: int = 32) -> None:
        super().__init__(bundle, "first-order", weighting)
        self.layout = GradientLayout(SIZES, bits)
        self.gradients = random_gradients()

    def answers(self, ask: Ask) -> Frame | None:
        if ask.kind is Anchor:
            return self.anchor(ask.device)
        assert ask.kind is Gradient
        assert self.layout is not None
        gradient = self.gradients.get(ask.device)
        if gradient is None:
            return None
        made = sent(self.layout, gradient, ask.device)
        return Frame(Gradient(**NAME, id=1, rotation=made.rotation), {"scales": made.scales, "codes": made.codes})

    def decoded(self, update: UpdateRecord) -> Floats:
        assert self.layout is not None
        return received(self.layout, update.codes, update.coefficients)


MakeCloud = Callable[..., FirstOrderCloud]


@pytest.fixture
def make_cloud(bundle: Any) -> MakeCloud:
    return lambda *arguments, **more: FirstOrderCloud(bundle, *arguments, **more)


def lead(cloud: FirstOrderCloud) -> tuple[Any, list[Any]]:
    return drive(rounds.ROUNDS["first-order"](cloud.context()), cloud.answers)


def test_every_device_gets_its_lambda_and_the_average_goes_into_the_update(make_cloud: MakeCloud) -> None:
    cloud = make_cloud("examples")
    outcome, seen = lead(cloud)
    mean = np.average(list(cloud.gradients.values()), axis=0, weights=[2, 4, 3])
    np.testing.assert_allclose(cloud.decoded(outcome.update), -RATE * mean, atol=1e-6)
    told = [type(action.message) for action in seen if isinstance(action, Tell)]
    assert told == [RoundStart] * 3 + [CutGradient] * 3
    assert (outcome.update.round, outcome.devices) == (1, ("a", "b", "c"))
    assert not cloud.has_gradient()


@pytest.mark.parametrize("bits", [1, 4])
def test_sgd_has_its_rate_in_the_scales_and_adamw_has_not(make_cloud: MakeCloud, bits: int) -> None:
    plain, adamw = make_cloud(bits=bits), make_cloud(bits=bits)
    client = ClientOptimizer(optimizer="adamw", learning_rate=RATE)
    adamw.config = msgspec.structs.replace(adamw.config, client=client)
    step, gradient = (lead(cloud)[0].update for cloud in (plain, adamw))
    assert step.codes.tobytes() == gradient.codes.tobytes()
    assert step.codes.any()
    np.testing.assert_array_equal(
        step.coefficients, (-RATE * gradient.coefficients.astype(np.float64)).astype(np.float32)
    )
    assert (step.learning_rate, gradient.learning_rate) == (RATE, RATE)


def test_a_device_without_a_gradient_is_left_out_of_the_average_but_not_of_the_tail(make_cloud: MakeCloud) -> None:
    cloud = make_cloud()
    del cloud.gradients["b"]
    outcome, _ = lead(cloud)
    mean = (cloud.gradients["a"] + cloud.gradients["c"]) / 2.0
    np.testing.assert_allclose(cloud.decoded(outcome.update), -RATE * mean, atol=1e-6)
    assert outcome.devices == ("a", "b", "c")


def test_without_any_gradient_the_devices_stand_still(make_cloud: MakeCloud) -> None:
    cloud = make_cloud(bits=1)
    before = cloud.weights()
    cloud.gradients = {}
    outcome, _ = lead(cloud)
    assert outcome.update.codes.size == cloud.layout.codes  # type: ignore[union-attr]
    assert not cloud.decoded(outcome.update).any()
    assert not all(torch.equal(value, before[name]) for name, value in cloud.weights().items())


@pytest.mark.parametrize("bits", [1, 32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_a_gradient_that_is_not_finite_or_absurd_counts_against_its_device(
    make_cloud: MakeCloud, bad: float, bits: int
) -> None:
    cloud = make_cloud(bits=bits)
    cloud.gradients["a"][17] = bad
    outcome, seen = lead(cloud)
    good = make_cloud(bits=bits)
    del good.gradients["a"]
    assert outcome.update.coefficients.tobytes() == lead(good)[0].update.coefficients.tobytes()
    assert [action.device for action in seen if isinstance(action, Fault)] == ["a"]
    (late,) = (each for each in seen if isinstance(each, Tell) and isinstance(each.message, Late))
    reason = "its gradient's scales are not finite, or absurd"
    assert late == Tell("a", Late(**NAME, id=1, answer="gradient", code="numbers", reason=reason))


@pytest.mark.parametrize("lost", [Anchor, Gradient])
def test_a_strict_round_that_loses_a_device_leaves_everything_as_it_was(make_cloud: MakeCloud, lost: type) -> None:
    cloud = make_cloud()
    cloud.config = msgspec.structs.replace(cloud.config, strict=True)
    before = cloud.weights()

    def answers(ask: Ask) -> Frame | None:
        return None if (ask.device, ask.kind) == ("b", lost) else cloud.answers(ask)

    outcome, _ = drive(rounds.ROUNDS["first-order"](cloud.context()), answers)
    assert outcome is None
    assert not cloud.has_gradient()
    assert all(torch.equal(value, before[name]) for name, value in cloud.weights().items())


def test_a_strict_round_has_the_same_bits_in_whatever_order_answers_come(make_cloud: MakeCloud) -> None:
    outcomes = []
    for reverse in (False, True):
        cloud = make_cloud("examples", bits=4)
        cloud.config = msgspec.structs.replace(cloud.config, strict=True)
        exchange = rounds.ROUNDS["first-order"](cloud.context())
        outcomes.append(drive(exchange, cloud.answers, lambda asks, end=-reverse: asks[end])[0])  # type: ignore[misc]
    first, second = (outcome.update for outcome in outcomes)
    assert first.codes.tobytes() == second.codes.tobytes()
    assert first.coefficients.tobytes() == second.coefficients.tobytes()
