"""The baselines of a simulation compute what their names say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from hosl_cloud.__main__ import main as cloud_main
from hosl_cloud.runs.run import Run
from hosl_cloud.settings import parse_config
from hosl_cloud.simulation import virtual_devices
from hosl_cloud.simulation.baselines import prepare_config
from hosl_cloud.simulation.partition import Partition
from hosl_cloud.simulation.virtual_devices import simulate
from hosl_cloud.storage.mirror import load_shard_weights
from hosl_cloud.storage.store import Store
from hosl_protocol.exceptions import ExitCode, SettingsError
from hosl_protocol.run.manifest import load_manifest
from hosl_protocol.run.ordering import batch_indices
from support import TASK, write_reviews

ROUNDS, RATE, BATCH, EXAMPLES = 5, 0.02, 6, 20
MakeBundle = Callable[..., Path]


def run_baseline(bundle: Path, folder: Path, **more: Any) -> Store:
    manifest, store = load_manifest(bundle), Store(folder / "hosl.sqlite")
    data = {
        **msgspec.toml.decode(TASK),
        "rounds": ROUNDS,
        "seed": 4,
        "batch_size": BATCH,
        "max_length": 16,
        "client": {"learning_rate": RATE},
        "tail": {"learning_rate": RATE, "optimizer": "sgd", "clip_norm": 0.0, "device": "cpu"},
        "devices": {"start_with": 1},
        **more,
    }
    config = prepare_config(parse_config(data, manifest))
    run = Run("run-1", config, manifest, bundle, folder / "run", store)
    store.create_run("run-1", bundle, manifest.shard_digest, config)
    train, held_out = write_reviews(folder / "train.jsonl", EXAMPLES), write_reviews(folder / "eval.jsonl", 16, 400)
    assert asyncio.run(simulate(run, train, held_out, Partition(), 1, lambda sentence: None)) == "completed"
    return store


def test_first_order_is_training_the_uncut_model(make_bundle: MakeBundle, tiny_model: Path, tmp_path: Path) -> None:
    store = run_baseline(make_bundle("blocks", 2), tmp_path, baseline="first-order")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    # The halves are untied, and the client's embedding stays frozen.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=RATE)
    examples = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = tokenizer.convert_tokens_to_ids(["bad", "good"])
    losses = []
    for round_ in range(1, ROUNDS + 1):
        loss = torch.zeros(())
        for place in batch_indices(4, round_, "device-0", EXAMPLES, BATCH).tolist():
            ids = tokenizer(f"{examples[place]['text']} it was", return_tensors="pt").input_ids
            loss = loss + cross_entropy(
                model(input_ids=ids).logits[0, -1, answers], torch.tensor(examples[place]["label"])
            )
        (loss / BATCH).backward()
        losses.append(loss.item() / BATCH)
        optimizer.step()
        optimizer.zero_grad()
    assert [row.loss for row in store.rounds("run-1")] == pytest.approx(losses, rel=2e-4)
    assert max(losses) > 1.01 * min(losses), "the steps are large enough to tell"
    store.close()


def test_first_order_averages_over_devices_and_counts_what_it_would_send(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle = make_bundle("norm", 2)
    for name in ("plain", "first"):
        (tmp_path / name).mkdir()
    devices = {"devices": {"start_with": 3}, "directions": 1}
    plain = run_baseline(bundle, tmp_path / "plain", **devices)
    trained = run_baseline(bundle, tmp_path / "first", baseline="first-order", **devices)
    sizes = [int(np.prod(entry.shape)) for entry in load_manifest(bundle).trainable]
    extra = [a.wire_bytes - b.wire_bytes for a, b in zip(trained.rounds("run-1"), plain.rounds("run-1"), strict=True)]
    assert extra == [3 * 2 * 4 * sum(sizes)] * ROUNDS
    assert trained.rounds("run-1")[-1].loss != plain.rounds("run-1")[-1].loss
    for store in (plain, trained):
        store.close()


@pytest.mark.parametrize(("train", "rate"), [("lora", 4.0), ("norm", 4.0), ("blocks", 4.0), ("prompt", 0.1)])
def test_the_algorithm_of_that_name_makes_the_step_of_the_baseline(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str, rate: float
) -> None:
    """With numbers that are not compressed, SGD, and devices whose batches weigh unlike."""
    bundle, states = make_bundle(train, 2), list[Any]()
    load = virtual_devices.load_shared_state

    def load_and_keep(*arguments: Any, **more: Any) -> Any:
        states.append(load(*arguments, **more))
        return states[-1]

    monkeypatch.setattr(virtual_devices, "load_shared_state", load_and_keep)
    devices = {"start_with": 3, "weighting": "examples"}
    # A rate at which a step is long beside the lattice, on which the algorithm keeps its weights.
    more = {"rounds": 1, "devices": devices, "client": {"optimizer": "sgd", "learning_rate": rate}, "batch_size": 8}
    losses = []
    for name, how in (("a", {"baseline": "first-order"}), ("b", {"algorithm": "first-order", "gradient_bits": 32})):
        (tmp_path / name).mkdir()
        store = run_baseline(bundle, tmp_path / name, **more, **how)
        losses.append([row.loss for row in store.rounds("run-1")])
        store.close()

    base = load_shard_weights(bundle, load_manifest(bundle), only_trainable=True)
    baseline, algorithm = (
        np.concatenate([(state.shard.weights[name] - base[name]).reshape(-1) for name in base]) for state in states
    )
    assert np.abs(baseline).max() > 1e-3
    assert np.linalg.norm(algorithm - baseline) < 1e-4 * np.linalg.norm(baseline)
    assert losses[0] == losses[1]


def test_zeroth_order_refuses_to_subtract_losses_of_rounded_activations(make_bundle: MakeBundle) -> None:
    manifest = load_manifest(make_bundle("norm", 2))
    data = {**msgspec.toml.decode(TASK), "wire_dtype": "bfloat16", "baseline": "zeroth-order", "max_length": 16}
    with pytest.raises(SettingsError, match=r"wire_dtype is 'bfloat16': this baseline subtracts losses"):
        prepare_config(parse_config(data, manifest))


def test_zeroth_order_learns_a_little_without_any_gradient(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("something backpropagates")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    store = run_baseline(
        make_bundle("blocks", 2),
        tmp_path,
        baseline="zeroth-order",
        rounds=60,
        directions=4,
        client={"learning_rate": 2e-4},
        tail={"learning_rate": 2e-3, "optimizer": "sgd", "device": "cpu"},
    )
    evaluations = store.evaluations("run-1")
    assert evaluations[-1].loss < evaluations[0].loss - 0.01
    updates = store.updates("run-1", 1, 60)
    assert all(np.abs(update.coefficients).min() > 0 for update in updates), "the device's half moves too"
    store.close()


def test_baselines_are_for_simulations(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('baseline = "first-order"\nrounds = 2\nmax_length = 16\n' + TASK, encoding="utf-8")
    bundle, data_dir = make_bundle("lora", 2), str(tmp_path / "data")
    options = ["--bundle", str(bundle), "--config", str(config), "--data-dir", data_dir]
    assert cloud_main(["serve", *options]) == ExitCode.SETTINGS
    assert "baselines are for hosl-cloud simulate" in capsys.readouterr().err
    train = write_reviews(tmp_path / "train.jsonl", 20)
    assert cloud_main(["simulate", *options, "--data", str(train), "--devices", "2"]) == 0
    told = "".join(capsys.readouterr())
    assert "completed at round 2" in told
    assert "hosl-cloud merge" not in told
    run = next((tmp_path / "data" / "runs").iterdir()).name
    assert cloud_main(["merge", run, "--out", str(tmp_path / "m"), "--data-dir", data_dir]) == ExitCode.SETTINGS
    assert "is gone with the simulation" in capsys.readouterr().err
