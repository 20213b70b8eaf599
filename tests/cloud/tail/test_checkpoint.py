"""A checkpoint continues with the same bits, and a damaged one is never taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hosl_cloud.exceptions import CheckpointDamaged, CheckpointMismatch, CheckpointMissing
from hosl_cloud.storage.client_state import write_snapshot
from hosl_cloud.tail.checkpoint import (
    CheckpointScore,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    quarantine,
    read_client,
    read_info,
    record_score,
    save_checkpoint,
    verify,
)
from hosl_cloud.tail.trainer import TailTrainer
from hosl_protocol.run.manifest import Manifest, TensorEntry
from hosl_protocol.weights.state import ClientState
from hosl_protocol.wire.messages import Snapshot

PROMPTS, CLASSES, TEXT = "prompt-classification", "sequence-classification", "lm"


def train(trainer: TailTrainer, bundle: Any, rounds: range) -> None:
    for round_ in rounds:
        trainer.forward_backward(*bundle.batch(trainer.kind, seed=round_).sent)
        trainer.step(round_, 1.0)


def save(
    folder: Path, trainer: TailTrainer, round_: int, metrics: CheckpointScore | None = None, epoch: int = 1
) -> Path:
    return save_checkpoint(folder, round_, epoch, trainer, trainer.config, metrics)


STATE = ClientState(3, {"w": np.arange(6, dtype=np.float32)}, {"w": -20})
MANIFEST = Manifest(
    model="m",
    family="llama",
    architecture="LlamaForCausalLM",
    split=1,
    blocks=2,
    width=4,
    max_length=64,
    pad_token_id=0,
    train="lora",
    tensors=(TensorEntry(name="w", shape=(2, 3), trainable=True, exponent=-20),),
    files=(),
)


def save_with_client(folder: Path, trainer: TailTrainer, round_: int = 3) -> Path:
    def write(path: Path) -> Snapshot:
        return write_snapshot(path, "run-1", 1, STATE, {"w": (2, 3)})

    return save_checkpoint(folder, round_, 1, trainer, trainer.config, None, write)


def test_the_devices_weights_lie_beside_where_a_checkpoint_holds_them(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS, train="head")
    path = save_with_client(tmp_path, trainer)
    state = read_client(path, MANIFEST)
    assert state is not None
    assert (state.round, state.digest(), state.exponents) == (3, STATE.digest(), STATE.exponents)
    record_score(path, metrics(9))
    assert read_client(path, MANIFEST) is not None
    assert read_client(save(tmp_path, trainer, 4), MANIFEST) is None
    assert len(list(tmp_path.iterdir())) == 3 + 2


@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_a_checkpoint_whose_devices_weights_are_damaged_counts_no_more(
    bundle: Any, tmp_path: Path, damage: str
) -> None:
    path = save_with_client(tmp_path, bundle.trainer(PROMPTS, train="head"))
    client = path.with_suffix(".client.safetensors")
    assert verify(path).round == 3
    if damage == "gone":
        client.unlink()
    else:
        data = bytearray(client.read_bytes())
        data[-1] ^= 1
        client.write_bytes(data)
    for read in (lambda: verify(path), lambda: read_client(path, MANIFEST)):
        with pytest.raises((CheckpointDamaged, CheckpointMissing), match=r"client\.safetensors"):
            read()


def test_what_belongs_to_a_checkpoint_goes_with_it(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS, train="head")
    for round_ in (3, 4, 5):
        save_with_client(tmp_path, trainer, round_)
    prune_checkpoints(tmp_path, 2)
    quarantine(tmp_path / "epoch-0001-round-000004.safetensors")
    names = sorted(path.name.removeprefix("epoch-0001-round-00000") for path in tmp_path.iterdir())
    kinds = ("client.safetensors", "json", "safetensors")
    assert names == [*(f"4.{kind}.aside" for kind in kinds), *(f"5.{kind}" for kind in kinds)]


def metrics(correct: int, loss: float = 1.0) -> CheckpointScore:
    return CheckpointScore(loss=loss, correct=correct, scored=10)


@pytest.mark.parametrize("train_", ["full", "lora", "head"])
@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "adamw", "learning_rate": 0.01}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "sgd"}],
)
def test_a_run_that_stops_and_loads_ends_with_the_same_bits(
    bundle: Any, tmp_path: Path, train_: str, settings: dict[str, Any]
) -> None:
    settings = {**settings, "train": train_, "schedule": "cosine", "clip_norm": 0.5}
    unbroken, first, second = (bundle.trainer(PROMPTS, **settings) for _ in range(3))
    train(unbroken, bundle, range(1, 6))
    train(first, bundle, range(1, 4))
    info = load_checkpoint(save(tmp_path, first, 3), second)
    train(second, bundle, range(info.round + 1, 6))
    got, expected = second.state(), unbroken.state()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert not all(torch.equal(got[name], tensor) for name, tensor in first.state().items())


def test_only_what_trains_is_stored(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS, train="head", optimizer="adamw")
    train(trainer, bundle, range(1, 2))
    assert save(tmp_path, trainer, 1).stat().st_size < 3 * (2 * 32 * 4) + 1000


def test_effective_settings_and_metrics_lie_beside(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS)
    path = save(tmp_path, trainer, 7, metrics(6), epoch=2)
    info = read_info(path)
    assert (info.round, info.epoch, info.head_rows, info.metrics) == (7, 2, (2, 3), metrics(6))
    assert info.config == trainer.config
    assert json.loads(path.with_suffix(".json").read_text())["config"]["tail"]["clip_norm"] == 0.0
    record_score(path, metrics(9))
    assert read_info(path).metrics == metrics(9)
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.with_suffix(".json").name, path.name]


@pytest.mark.parametrize("place", [20, -1])
def test_a_flipped_bit_is_found_and_the_trainer_stays(bundle: Any, tmp_path: Path, place: int) -> None:
    trainer = bundle.trainer(PROMPTS, optimizer="adamw")
    path = save(tmp_path, trainer, 1)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    before = {name: tensor.clone() for name, tensor in trainer.state().items()}
    with pytest.raises(CheckpointDamaged, match="SHA-256"):
        load_checkpoint(path, trainer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state().items())


def test_a_shortened_file_is_found(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS)
    path = save(tmp_path, trainer, 1)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointDamaged):
        load_checkpoint(path, trainer)


def test_weights_without_their_json_do_not_count(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS)
    save(tmp_path, trainer, 1)
    path = save(tmp_path, trainer, 2)
    path.with_suffix(".json").unlink()
    assert [each.info.round for each in list_checkpoints(tmp_path)] == [1]
    with pytest.raises(CheckpointMissing):
        load_checkpoint(path, trainer)


def test_damaged_json_is_skipped(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS)
    save(tmp_path, trainer, 1)
    path = save(tmp_path, trainer, 2)
    path.with_suffix(".json").write_text("{")
    assert find_checkpoint(tmp_path, "last").info.round == 1
    with pytest.raises(CheckpointDamaged):
        load_checkpoint(path, trainer)


def test_a_checkpoint_of_another_way_of_training_is_refused(bundle: Any, tmp_path: Path) -> None:
    path = save(tmp_path, bundle.trainer(PROMPTS, train="lora"), 1)
    with pytest.raises(CheckpointMismatch, match="this run's tail trains"):
        load_checkpoint(path, bundle.trainer(PROMPTS, train="full"))
    with pytest.raises(CheckpointMismatch, match=r"lm_head.weight is absent, this run's tail trains \[48, 32\]"):
        load_checkpoint(save(tmp_path, bundle.trainer(CLASSES, train="head"), 2), bundle.trainer(TEXT, train="head"))


def test_best_is_the_most_accurate_then_of_least_loss(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS)
    for round_, scored in enumerate((metrics(5), metrics(8, 0.5), metrics(8, 0.4), metrics(8, 0.6), None), start=1):
        save(tmp_path, trainer, round_, scored)
    assert find_checkpoint(tmp_path).info.round == 3
    assert find_checkpoint(tmp_path, "last").info.round == 5
    assert find_checkpoint(tmp_path, 2).info.round == 2
    with pytest.raises(CheckpointMissing, match="none of round 9"):
        find_checkpoint(tmp_path, 9)


def test_an_evaluation_that_a_device_left_half_way_does_not_choose_the_best(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS)
    whole = save(tmp_path, trainer, 1, CheckpointScore(loss=0.5, correct=52, scored=60, examples=60, of_examples=60))
    save(tmp_path, trainer, 2, CheckpointScore(loss=0.1, correct=11, scored=12, examples=12, of_examples=60))
    assert find_checkpoint(tmp_path, "best").path == whole


def of(examples: int, correct: int, known: int, whose: str = "", loss: float = 0.5) -> CheckpointScore:
    """What so many examples scored, of those that are known, and whose they were."""
    return CheckpointScore(
        loss=loss, correct=correct, scored=examples, examples=examples, of_examples=known, held_out=whose
    )


def test_best_is_chosen_among_evaluations_of_the_most_held_out_data(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS)
    # One device is there, then two, then one is away at times: 58 of its own 60 say nothing beside 66 of all 120.
    scores = [of(60, 50, 60, "a"), of(120, 62, 120, "ab"), of(120, 66, 120, "ab"), of(60, 58, 120, "b")]
    for round_, scored in enumerate(scores, start=1):
        save(tmp_path, trainer, round_, scored)
    assert find_checkpoint(tmp_path).info.round == 3
    assert prune_checkpoints(tmp_path, keep_last=1)
    assert [each.info.round for each in list_checkpoints(tmp_path)] == [3, 4]


def test_where_not_all_were_ever_scored_the_best_is_of_the_most_that_were(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS)
    for round_, scored in enumerate([of(60, 50, 120, "a"), of(60, 40, 120, "a"), of(12, 12, 120, "b")], start=1):
        save(tmp_path, trainer, round_, scored)
    assert find_checkpoint(tmp_path).info.round == 1


def test_as_much_other_held_out_data_begins_the_choice_anew(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS)
    for round_, scored in enumerate([of(60, 60, 60, "a"), of(60, 30, 60, "b"), of(60, 29, 60, "b")], start=1):
        save(tmp_path, trainer, round_, scored)
    assert find_checkpoint(tmp_path).info.round == 2


def test_best_of_a_language_model_is_the_least_loss(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(TEXT)
    for round_, scored in enumerate((metrics(9, 0.5), metrics(8, 0.4), metrics(8, 0.6)), start=1):
        save(tmp_path, trainer, round_, scored)
    assert find_checkpoint(tmp_path).info.round == 2


def test_without_an_evaluation_best_is_last_and_an_empty_folder_says_so(bundle: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match="the run has made none yet; hosl-cloud run show"):
        find_checkpoint(tmp_path)
    trainer = bundle.trainer(PROMPTS)
    for round_ in (1, 2):
        save(tmp_path, trainer, round_)
    assert find_checkpoint(tmp_path).info.round == 2


def test_a_later_epoch_comes_after_a_later_round(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS)
    save(tmp_path, trainer, 9, epoch=1)
    save(tmp_path, trainer, 4, epoch=2)
    assert find_checkpoint(tmp_path, "last").info.round == 4


def test_pruning_keeps_the_best_and_the_last(bundle: Any, tmp_path: Path) -> None:
    trainer = bundle.trainer(PROMPTS)
    paths = [save(tmp_path, trainer, round_, metrics(9 if round_ == 2 else 5)) for round_ in range(1, 6)]
    (tmp_path / "epoch-0001-round-000006.safetensors.part").write_bytes(b"half")
    assert prune_checkpoints(tmp_path, keep_last=2) == [paths[0], paths[2]]
    assert [each.info.round for each in list_checkpoints(tmp_path)] == [2, 4, 5]
    assert len(list(tmp_path.iterdir())) == 6
