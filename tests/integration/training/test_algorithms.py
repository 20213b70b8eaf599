"""HOSL and HO-SFL as the shipped generators run them, against a plain torch reading of the same equations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer

from hosl_cloud.rounds import algorithms as rounds
from hosl_cloud.rounds.anchors import RoundResult
from hosl_cloud.rounds.exchange import CloudRound
from hosl_cloud.settings import RunConfig, parse_config
from hosl_cloud.tail.trainer import TailTrainer
from hosl_edge.data.datasets import TextBatch
from hosl_edge.data.texts import load_texts
from hosl_export.model.halves import client_half
from hosl_export.sources.loading import load_model
from hosl_protocol.arithmetic.directions import direction
from hosl_protocol.arithmetic.lattice import round_probe_step
from hosl_protocol.run.manifest import SHARD_TOKENIZER, Manifest, load_manifest
from hosl_protocol.run.updates import gradient_layout
from services import run_round
from support import TASK, Device, write_reviews

SEED = 11
MakeBundle = Callable[[str, int], Path]


def configure(manifest: Manifest, algorithm: str, **more: Any) -> RunConfig:
    data = {"algorithm": algorithm, "seed": SEED, "batch_size": 8, "max_length": 16, "probe_step": 1e-3, **more}
    data["client"] = {"optimizer": "sgd", **more.get("client", {})}  # whatever trains, the papers' step
    return parse_config({**msgspec.toml.decode(TASK), **data}, manifest)


def make_batch(bundle: Path, manifest: Manifest, config: RunConfig, folder: Path, offset: int = 0) -> TextBatch:
    tokenizer = Tokenizer.from_file(str(bundle / SHARD_TOKENIZER))
    path = write_reviews(folder / f"train-{offset}.jsonl", config.batch_size, offset)
    dataset = load_texts(path, config.task, tokenizer, config.max_length, manifest)
    return dataset.batch(np.arange(config.batch_size))


class Reference:
    """The same client half in torch, moved by whole directions; the tail is the trainer's own module."""

    def __init__(self, bundle: Path, manifest: Manifest, tiny_model: Path, trainer: TailTrainer) -> None:
        self.half = client_half(load_model(str(tiny_model)), manifest.split)
        self.parameters = {name: value.data for name, value in self.half.model.named_parameters()}
        self.manifest, self.trainer = manifest, trainer

    def activations(self, batch: TextBatch) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            h_BLD = self.half(torch.from_numpy(batch.ids_BL)).numpy()
        return np.concatenate([h_BLD[row, :length] for row, length in enumerate(batch.lengths_B)])

    def move(self, round_: int, p: int, factor: float, probe_step: float) -> None:
        for index, entry in enumerate(self.manifest.trainable):
            assert entry.exponent is not None
            step = factor * round_probe_step(probe_step, entry.exponent, entry.name)
            z = direction(SEED, round_, p, index, int(np.prod(entry.shape))).reshape(entry.shape)
            self.parameters[entry.name] += torch.from_numpy(z * np.float32(step))

    def at(self, batch: TextBatch, round_: int, p: int, factor: float, probe_step: float) -> npt.NDArray[np.float32]:
        """Activations of θ + factor · ε z_p."""
        self.move(round_, p, factor, probe_step)
        activations = self.activations(batch)
        self.move(round_, p, -factor, probe_step)
        return activations

    def loss(self, batch: TextBatch) -> float:
        return self.trainer.evaluate(self.activations(batch), batch.lengths_B, batch.labels_N).loss


@pytest.mark.parametrize(("train", "held_sets"), [("blocks", 0), ("blocks", 1), ("blocks", 3), ("norm:-1", 1)])
def test_a_round_of_ho_sfl_is_what_the_paper_says(
    make_bundle: MakeBundle, tiny_model: Path, tmp_path: Path, train: str, held_sets: int
) -> None:
    bundle = make_bundle(train, 2)
    manifest = load_manifest(bundle)
    config = configure(manifest, "ho-sfl", directions=3, client={"learning_rate": 0.5})
    trainer = TailTrainer(bundle, manifest, config)
    batches = {f"device-{n}": make_batch(bundle, manifest, config, tmp_path, 8 * n) for n in range(2)}
    reference = Reference(bundle, manifest, tiny_model, TailTrainer(bundle, manifest, config))

    expected = np.zeros(3)
    for batch in batches.values():
        clean = reference.activations(batch)
        lambda_TD = reference.trainer.forward_backward(clean, batch.lengths_B, batch.labels_N).cut_gradient_TD
        assert lambda_TD is not None
        for p in range(3):
            reference.move(1, p, +1, config.probe_step)
            expected[p] += np.sum(lambda_TD.astype(np.float64) * (reference.activations(batch) - clean)) / 2
            reference.move(1, p, -1, config.probe_step)
    expected *= -0.5 / (3 * config.probe_step)

    devices = {
        name: Device(bundle, manifest, config.wire_settings(), batch, held_sets) for name, batch in batches.items()
    }
    outcome = run_round(rounds.ho_sfl_round(context(config, trainer, devices)), devices)
    assert outcome.update.coefficients == pytest.approx(expected, rel=2e-2, abs=2e-5)
    assert np.abs(expected).max() > 1e-3, "the comparison must not be one of zeros"


@pytest.mark.parametrize(("train", "held_sets"), [("blocks", 0), ("blocks", 1), ("norm:-1", 1)])
def test_a_round_of_hosl_is_what_the_paper_says(
    make_bundle: MakeBundle, tiny_model: Path, tmp_path: Path, train: str, held_sets: int
) -> None:
    bundle = make_bundle(train, 2)
    manifest = load_manifest(bundle)
    config = configure(manifest, "hosl", directions=2, probe_step=4e-3, client={"learning_rate": 0.5})
    trainer = TailTrainer(bundle, manifest, config)
    batch = make_batch(bundle, manifest, config, tmp_path)
    reference = Reference(bundle, manifest, tiny_model, trainer)

    expected = []
    for q in range(2):
        reference.move(1, q, +1, config.probe_step)
        plus = reference.loss(batch)
        reference.move(1, q, -2, config.probe_step)
        minus = reference.loss(batch)
        reference.move(1, q, +1, config.probe_step)
        expected.append(-0.5 * (plus - minus) / (2 * config.probe_step * 2))

    device = Device(bundle, manifest, config.wire_settings(), batch, held_sets)
    before = device.weights.digest()
    outcome = run_round(rounds.hosl_round(context(config, trainer, {"d": device})), {"d": device})
    assert outcome.update.coefficients == pytest.approx(expected, rel=2e-2, abs=2e-5)
    assert max(map(abs, expected)) > 1e-3
    assert device.weights.digest() == before, "probes must leave the same bits"


@pytest.mark.parametrize("held_sets", [0, 1, 3])
def test_a_round_of_ho_sfl_with_central_differences(
    make_bundle: MakeBundle, tiny_model: Path, tmp_path: Path, held_sets: int
) -> None:
    bundle = make_bundle("blocks", 2)
    manifest = load_manifest(bundle)
    config = configure(manifest, "ho-sfl", directions=3, anchor="midpoint", client={"learning_rate": 0.5})
    trainer = TailTrainer(bundle, manifest, config)
    batch = make_batch(bundle, manifest, config, tmp_path)
    reference = Reference(bundle, manifest, tiny_model, TailTrainer(bundle, manifest, config))

    pairs = [[reference.at(batch, 1, p, sign, config.probe_step) for sign in (+1, -1)] for p in range(3)]
    midpoint = (pairs[0][0] + pairs[0][1]) / 2
    result = reference.trainer.forward_backward(midpoint, batch.lengths_B, batch.labels_N)
    assert result.cut_gradient_TD is not None
    lambda_TD = result.cut_gradient_TD.astype(np.float64)
    expected = [-0.5 / (3 * config.probe_step) * np.sum(lambda_TD * (plus - minus)) / 2 for plus, minus in pairs]

    device = Device(bundle, manifest, config.wire_settings(), batch, held_sets)
    outcome = run_round(rounds.ho_sfl_round(context(config, trainer, {"d": device})), {"d": device})
    assert outcome.update.coefficients == pytest.approx(expected, rel=2e-2, abs=2e-5)
    assert outcome.loss == pytest.approx(result.loss, rel=1e-6)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("held_sets", [0, 1])
def test_a_round_of_hosl_with_the_midpoint_takes_the_tails_step_at_the_mean_of_the_probes(
    make_bundle: MakeBundle, tiny_model: Path, tmp_path: Path, held_sets: int
) -> None:
    bundle = make_bundle("blocks", 2)
    manifest = load_manifest(bundle)
    tail = {"learning_rate": 1e-2, "clip_norm": 0.0, "optimizer": "sgd"}
    config = configure(manifest, "hosl", directions=2, anchor="midpoint", probe_step=4e-3, tail=tail)
    trainer, plain = (TailTrainer(bundle, manifest, config) for _ in range(2))
    batch = make_batch(bundle, manifest, config, tmp_path)
    reference = Reference(bundle, manifest, tiny_model, plain)
    probes = [reference.at(batch, 1, q, sign, config.probe_step) for q in range(2) for sign in (+1, -1)]
    result = plain.forward_backward(np.mean(probes, axis=0), batch.lengths_B, batch.labels_N)

    devices = {name: Device(bundle, manifest, config.wire_settings(), batch, held_sets) for name in ("d", "e")}
    outcome = run_round(rounds.hosl_round(context(config, trainer, devices)), devices)
    assert outcome.devices == ("d", "e")
    assert outcome.loss == pytest.approx(result.loss, rel=1e-6)
    for name, value in plain.parameters.items():
        if value.grad is not None:
            moved = value.data - 1e-2 * value.grad
            torch.testing.assert_close(trainer.parameters[name].data, moved, rtol=1e-5, atol=1e-7)


def test_the_tail_takes_the_first_order_step_that_torch_would_take(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle("norm", 2)
    manifest = load_manifest(bundle)
    config = configure(manifest, "frozen", tail={"learning_rate": 1e-2, "clip_norm": 0.0, "optimizer": "sgd"})
    batches = [make_batch(bundle, manifest, config, tmp_path, 8 * n) for n in range(2)]
    trainer, plain = (TailTrainer(bundle, manifest, config) for _ in range(2))
    devices = {
        f"device-{n}": Device(bundle, manifest, config.wire_settings(), batch) for n, batch in enumerate(batches)
    }
    run_round(rounds.frozen_round(context(config, trainer, devices)), devices)

    for name, device in devices.items():
        batch = devices[name].batch
        sets = device.shard.activations(batch, np.empty((batch.tokens, manifest.width), np.float32))
        plain.forward_backward(sets, batch.lengths_B, batch.labels_N)
    for name, value in plain.parameters.items():
        if value.grad is not None:
            moved = value.data - 1e-2 * value.grad / 2
            torch.testing.assert_close(trainer.parameters[name].data, moved, rtol=1e-5, atol=1e-7)


def autograd_gradient(reference: Reference, batch: TextBatch) -> npt.NDArray[np.float64]:
    """∂loss/∂θ_c by backpropagation through both halves, all trainable tensors in order."""
    clean = reference.activations(batch)
    lambda_TD = reference.trainer.forward_backward(clean, batch.lengths_B, batch.labels_N).cut_gradient_TD
    reference.trainer.discard()
    assert lambda_TD is not None
    parameters = dict(reference.half.model.named_parameters())
    for value in parameters.values():
        value.requires_grad_(True)
    h_BLD = reference.half(torch.from_numpy(batch.ids_BL))
    packed = torch.cat([h_BLD[row, :length] for row, length in enumerate(batch.lengths_B.tolist())])
    packed.backward(torch.from_numpy(lambda_TD))
    gradients = [parameters[entry.name].grad for entry in reference.manifest.trainable]
    for value in parameters.values():
        value.requires_grad_(False)
    return np.concatenate([g.numpy().ravel() for g in gradients if g is not None]).astype(np.float64)


@pytest.mark.parametrize(
    ("algorithm", "directions", "anchor"),
    [("ho-sfl", 500, "clean"), ("ho-sfl", 500, "midpoint"), ("hosl", 500, "clean")],
)
def test_the_mean_of_many_estimates_is_the_gradient(
    make_bundle: MakeBundle, tiny_model: Path, tmp_path: Path, algorithm: str, directions: int, anchor: str
) -> None:
    bundle = make_bundle("norm", 2)
    manifest = load_manifest(bundle)
    config = configure(manifest, algorithm, directions=directions, anchor=anchor, client={"learning_rate": 1.0})
    trainer = TailTrainer(bundle, manifest, config)
    batch = make_batch(bundle, manifest, config, tmp_path)
    gradient = autograd_gradient(Reference(bundle, manifest, tiny_model, trainer), batch)
    device = Device(bundle, manifest, config.wire_settings(), batch)
    outcome = run_round(rounds.ROUNDS[algorithm](context(config, trainer, {"d": device})), {"d": device})

    estimate = np.zeros_like(gradient)
    for p, coefficient in enumerate(outcome.update.coefficients):
        parts = [
            direction(SEED, 1, p, index, tensor.values.size) for index, tensor in enumerate(device.weights.tensors)
        ]
        estimate -= float(coefficient) * np.concatenate(parts)
    cosine = estimate @ gradient / np.linalg.norm(estimate) / np.linalg.norm(gradient)
    # P directions in d dimensions: the expected cosine is sqrt(P / (P + d)).
    expected = np.sqrt(directions / (directions + gradient.size))
    assert cosine > expected - 0.03
    assert estimate @ gradient / (gradient @ gradient) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("algorithm", "fall"), [("ho-sfl", 0.10), ("hosl", 0.10), ("first-order", 0.10)])
def test_the_device_learns_where_the_tail_is_frozen(
    make_bundle: MakeBundle, tmp_path: Path, algorithm: str, fall: float
) -> None:
    losses = train_client_only(make_bundle, tmp_path, algorithm, sign=+1)
    assert losses[-1] < losses[0] - fall


@pytest.mark.parametrize("algorithm", ["ho-sfl", "hosl", "first-order"])
def test_an_update_of_the_wrong_sign_would_be_noticed(make_bundle: MakeBundle, tmp_path: Path, algorithm: str) -> None:
    losses = train_client_only(make_bundle, tmp_path, algorithm, sign=-1)
    assert losses[-1] > losses[0]


def train_client_only(make_bundle: MakeBundle, folder: Path, algorithm: str, sign: int) -> list[float]:
    """Losses over 40 rounds on one batch, d_c = 128 (norms), the tail's rate next to nothing."""
    bundle = make_bundle("norm", 2)
    manifest = load_manifest(bundle)
    tail = {"optimizer": "sgd", "learning_rate": 1e-30}
    config = configure(manifest, algorithm, directions=8, rounds=40, client={"learning_rate": 0.05}, tail=tail)
    trainer = TailTrainer(bundle, manifest, config)
    device = Device(bundle, manifest, config.wire_settings(), make_batch(bundle, manifest, config, folder))
    losses = []
    for round_ in range(1, config.rounds + 1):
        outcome = run_round(rounds.ROUNDS[algorithm](context(config, trainer, {"d": device}, round_)), {"d": device})
        losses.append(outcome.loss)
        update = outcome.update
        device.weights.apply([dataclasses.replace(update, coefficients=sign * update.coefficients)])
    return losses


def test_clients_that_probed_and_clients_that_only_replay_hold_the_same_bits(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle = make_bundle("lora", 2)
    manifest = load_manifest(bundle)
    for optimizer in ("sgd", "adamw"):
        client = {"optimizer": optimizer, "learning_rate": 1e-2}
        config = configure(manifest, "ho-sfl", directions=2, client=client)
        trainer = TailTrainer(bundle, manifest, config)
        batch = make_batch(bundle, manifest, config, tmp_path)
        prober, watcher = (Device(bundle, manifest, config.wire_settings(), batch) for _ in range(2))
        updates = []
        for round_ in (1, 2, 3):
            outcome: RoundResult = run_round(
                rounds.ho_sfl_round(context(config, trainer, {"d": prober}, round_)), {"d": prober}
            )
            prober.weights.apply([outcome.update])
            updates.append(outcome.update)
        base = watcher.weights.digest()
        watcher.weights.apply(updates)
        assert watcher.weights.digest() == prober.weights.digest() != base


def context(config: RunConfig, trainer: TailTrainer, devices: dict[str, Device], round_: int = 1) -> CloudRound:
    settings, manifest = config.wire_settings(), next(iter(devices.values())).shard.manifest
    layout = gradient_layout(settings, manifest) if settings.traits.sends_gradient else None
    return CloudRound("run", 0, round_, config, trainer, sorted(devices), layout=layout)
