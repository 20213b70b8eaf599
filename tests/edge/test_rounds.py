"""The device's part of a round: who speaks when, and that the weights stand at θ whatever ends it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

from hosl_edge import rounds
from hosl_edge.data.datasets import TextBatch, TextDataset
from hosl_protocol.arithmetic.rotation import Rotation, rotation_of
from hosl_protocol.exceptions import ProtocolError
from hosl_protocol.run.manifest import load_manifest
from hosl_protocol.run.settings import Algorithm, RunSettings
from hosl_protocol.run.updates import gradient_layout
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import CutGradient, EvalResult, Gradient, ProbeLoss, name_of
from support import TASK, Device

MakeBundle = Callable[[str, int], Path]
LENGTHS = (2, 3, 5, 5)
LOSS = np.float32(0.5).reshape(())


@pytest.fixture
def make_device(make_bundle: MakeBundle) -> Callable[..., Device]:
    def make(algorithm: str, held_sets: int = 1, anchor: str = "clean", bits: int = 32) -> Device:
        bundle = make_bundle("norm", 2)
        manifest = load_manifest(bundle)
        data = {"algorithm": algorithm, "seed": 3, "batch_size": 4, "max_length": 8, "directions": 2, "anchor": anchor}
        data["gradient_bits"] = bits
        settings = msgspec.convert({**msgspec.toml.decode(TASK), **data}, RunSettings)
        ids_BL = np.random.default_rng(0).integers(4, 41, (len(LENGTHS), max(LENGTHS)))
        batch = TextBatch(ids_BL, np.array(LENGTHS, np.int32), np.array([0, 1, 1, 0], np.int32))
        return Device(bundle, manifest, settings, batch, held_sets)

    return make


def context(device: Device, round_: int = 1) -> rounds.DeviceRound:
    return rounds.DeviceRound(
        run="r",
        device="d",
        epoch=0,
        round=round_,
        settings=device.settings,
        shard=device.shard,
        weights=device.weights,
        held_sets=device.held_sets,
    )


def steps_of(device: Device) -> rounds.Step:
    return rounds.PARTS[device.settings.algorithm](context(device), device.batch)


def reply_to(action: rounds.Send | rounds.Receive) -> Frame | None:
    """What the cloud would answer."""
    name: dict[str, Any] = {"run": "r", "epoch": 0, "round": 1}
    if isinstance(action, rounds.Send):
        return None
    if action.kind is ProbeLoss:
        return Frame(ProbeLoss(**name, direction=0, sign=1), {"loss": LOSS})
    lambda_TD = np.ones((sum(LENGTHS), 32), np.float32)
    return Frame(CutGradient(**name), {"lambda": lambda_TD, "loss": LOSS})


def run(steps: rounds.Step, most: int = 1000) -> list[rounds.Send | rounds.Receive]:
    """Advance a generator by at most `most` yields; what it yielded."""
    actions: list[rounds.Send | rounds.Receive] = []
    reply = None
    while len(actions) < most:
        try:
            actions.append(steps.send(reply))
        except StopIteration:
            break
        reply = reply_to(actions[-1])
    return actions


def words(actions: list[rounds.Send | rounds.Receive]) -> list[str]:
    return [
        f"> {name_of(action.message)}" if isinstance(action, rounds.Send) else f"< {name_of(action.kind)}"
        for action in actions
    ]


def bits(device: Device) -> list[bytes]:
    """The weights as they stand; a digest would first put them back."""
    return [tensor.values.tobytes() for tensor in device.weights.tensors]


@pytest.mark.parametrize("held_sets", [0, 1, 2, 9])
@pytest.mark.parametrize(
    ("algorithm", "anchor", "expected"),
    [
        ("ho-sfl", "clean", ["> anchor", "< cut-gradient", "> projections"]),
        ("ho-sfl", "midpoint", ["> anchor", "< cut-gradient", "> projections"]),
        ("hosl", "clean", [*["> probe", "< probe-loss"] * 4, "> anchor"]),
        ("hosl", "midpoint", ["> probe", "< probe-loss"] * 4),
        ("first-order", "clean", ["> anchor", "< cut-gradient", "> gradient"]),
        ("frozen", "clean", ["> anchor"]),
    ],
)
def test_messages_come_in_the_order_of_the_algorithm(
    make_device: Callable[..., Device], algorithm: str, anchor: str, expected: list[str], held_sets: int
) -> None:
    actions = run(steps_of(make_device(algorithm, held_sets, anchor)))
    assert words(actions) == expected
    sent = [action.message for action in actions if isinstance(action, rounds.Send)]
    assert [message.id for message in sent] == list(range(len(sent)))
    if algorithm == "hosl":
        assert [(message.direction, message.sign) for message in sent[:4]] == [(0, 1), (0, -1), (1, 1), (1, -1)]


def test_a_batch_travels_whole_and_without_padding(make_device: Callable[..., Device]) -> None:
    device = make_device("frozen")
    (send,) = run(steps_of(device))
    assert isinstance(send, rounds.Send)
    assert send.tensors["activations"].shape == (sum(LENGTHS), 32)
    assert send.tensors["lengths"].tolist() == list(LENGTHS)
    assert send.tensors["labels"].tolist() == [0, 1, 1, 0]


def test_probes_differ_from_the_anchor_and_from_each_other(make_device: Callable[..., Device]) -> None:
    actions = run(steps_of(make_device("hosl")))
    sets = [action.tensors["activations"].tobytes() for action in actions if isinstance(action, rounds.Send)]
    assert len(set(sets)) == 5


@pytest.mark.parametrize("held_sets", [0, 1, 9])
@pytest.mark.parametrize(
    ("algorithm", "anchor"),
    [
        ("ho-sfl", "clean"),
        ("ho-sfl", "midpoint"),
        ("hosl", "clean"),
        ("hosl", "midpoint"),
        ("first-order", "clean"),
        ("frozen", "clean"),
    ],
)
def test_weights_stand_at_theta_wherever_a_round_is_broken_off(
    make_device: Callable[..., Device], algorithm: str, anchor: str, held_sets: int
) -> None:
    device = make_device(algorithm, held_sets, anchor)
    before = bits(device)
    whole = len(run(steps_of(device)))
    assert bits(device) == before
    for most in range(1, whole + 1):
        steps = steps_of(device)
        assert len(run(steps, most)) == most
        steps.close()
        assert bits(device) == before, f"closed at yield {most} of {whole}"


@pytest.mark.parametrize("anchor", ["clean", "midpoint"])
@pytest.mark.parametrize("held_sets", [0, 1, 2])
def test_the_projections_do_not_depend_on_what_is_held(
    make_device: Callable[..., Device], held_sets: int, anchor: str
) -> None:
    def projections(held: int) -> np.ndarray:
        last = run(steps_of(make_device("ho-sfl", held, anchor)))[-1]
        assert isinstance(last, rounds.Send)
        return last.tensors["projections"]

    assert np.abs(projections(0)).min() > 0.0
    np.testing.assert_allclose(projections(held_sets), projections(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(14, 32), (15, 31), (15 * 32,)])
@pytest.mark.parametrize(("algorithm", "held_sets"), [("ho-sfl", 0), ("ho-sfl", 2), ("first-order", 1)])
def test_a_lambda_of_another_shape_is_refused(
    make_device: Callable[..., Device], shape: tuple[int, ...], algorithm: str, held_sets: int
) -> None:
    device = make_device(algorithm, held_sets)
    before = bits(device)
    steps = steps_of(device)
    run(steps, 2)
    reply = Frame(CutGradient(run="r", epoch=0, round=1), {"lambda": np.zeros(shape, np.float32), "loss": LOSS})
    with pytest.raises(ProtocolError, match=r"expected that of the Anchor, \[15, 32\]"):
        steps.send(reply)
    assert bits(device) == before


def sent_gradient(device: Device, exponent: int = 0) -> dict[str, np.ndarray]:
    """What a first-order device says of each tensor's gradient, decoded."""
    steps = steps_of(device)
    run(steps, 2)
    # Not the same everywhere: what a norm gives has a fixed sum.
    lambda_TD = np.random.default_rng(2).standard_normal((sum(LENGTHS), 32)).astype(np.float32)
    message = CutGradient(run="r", epoch=0, round=1, exponent=exponent)
    last = steps.send(Frame(message, {"lambda": lambda_TD, "loss": LOSS}))
    assert isinstance(last, rounds.Send)
    assert isinstance(last.message, Gradient)
    assert last.message.rotation == rotation_of("d")
    layout = gradient_layout(device.settings, device.shard.manifest)
    rotation, found = Rotation(device.settings.seed, 1, last.message.rotation), {}
    for index, entry in enumerate(device.shard.manifest.trainable):
        found[entry.name] = np.empty(layout.sizes[index], np.float32)
        layout.decode(last.tensors["codes"], last.tensors["scales"], index, rotation, 0, found[entry.name])
    return found


@pytest.mark.parametrize("held_sets", [0, 1, 9])
def test_the_gradient_is_the_shards_own_whatever_is_held(make_device: Callable[..., Device], held_sets: int) -> None:
    device = make_device("first-order", held_sets)
    found = sent_gradient(device)
    lambda_TD = np.random.default_rng(2).standard_normal((sum(LENGTHS), 32)).astype(np.float32)
    kept = device.shard.last_inputs(9)
    device.shard.activations(device.batch, np.empty_like(lambda_TD), kept)
    expected = dict(device.shard.gradients(device.batch, lambda_TD, kept))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.abs(values).max() > 0.0
        assert found[name].tobytes() == values.tobytes(), name


def test_the_power_of_two_that_lambda_was_divided_by_is_in_the_gradient(make_device: Callable[..., Device]) -> None:
    plain, scaled = (sent_gradient(make_device("first-order"), exponent) for exponent in (0, 5))
    for name, values in plain.items():
        np.testing.assert_array_equal(scaled[name], 32.0 * values)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.9), (2, 0.5), (4, 0.15), (8, 0.02)])
def test_the_gradient_is_sent_in_as_many_bits_as_the_run_says(
    make_device: Callable[..., Device], bits: int, error: float
) -> None:
    exact, rough = (
        np.concatenate(list(sent_gradient(make_device("first-order", bits=n)).values())) for n in (32, bits)
    )
    assert error / 10 < np.linalg.norm(rough - exact) / np.linalg.norm(exact) < error


def test_the_midpoint_is_the_mean_of_the_first_pair_and_near_the_clean_activations(
    make_device: Callable[..., Device],
) -> None:
    plus, minus, _, _, clean = (
        action.tensors["activations"]
        for action in run(steps_of(make_device("hosl")))
        if isinstance(action, rounds.Send)
    )
    anchor = run(steps_of(make_device("ho-sfl", anchor="midpoint")), 1)[0]
    assert isinstance(anchor, rounds.Send)
    midpoint = anchor.tensors["activations"]
    np.testing.assert_allclose(midpoint, (plus + minus) / 2, rtol=1e-6, atol=1e-7)
    # Second order against first order of the probe step.
    assert 0.0 < np.abs(midpoint - clean).max() < 0.02 * np.abs(plus - clean).max()


def held_out(count: int) -> TextDataset:
    """Examples of different lengths, each labelled by its own number."""
    lengths = [1 + 3 * index % 7 for index in range(count)]
    ids = np.random.default_rng(1).integers(4, 41, sum(lengths)).astype(np.int32)
    return TextDataset(ids, np.cumsum([0, *lengths]), np.arange(count, dtype=np.int32), pad_token_id=3)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_every_held_out_example_is_sent_once_and_the_last_batch_says_so(
    make_device: Callable[..., Device], count: int
) -> None:
    device = make_device("ho-sfl")
    heard: list[tuple[float, int, int]] = []
    steps = rounds.evaluate(context(device), held_out(count), lambda *result: heard.append(result))
    labels: list[int] = []
    is_last: list[bool] = []
    action: Any = next(steps)
    try:
        while True:
            assert isinstance(action, rounds.Send)
            labels += action.tensors["labels"].tolist()
            is_last.append(action.message.last)
            assert isinstance(next(steps), rounds.Receive)
            result = EvalResult(run="r", epoch=0, round=1, id=len(is_last) - 1, correct=1, scored=len(labels))
            action = steps.send(Frame(result, {"loss": LOSS}))
    except StopIteration:
        pass
    assert sorted(labels) == list(range(count))
    assert is_last == [False] * (len(is_last) - 1) + [True]
    assert len(is_last) == -(-count // device.settings.batch_size)
    assert [loss for loss, _, _ in heard] == [0.5] * len(is_last)


def test_every_algorithm_has_its_part() -> None:
    assert set(rounds.PARTS) == set(get_args(Algorithm))
