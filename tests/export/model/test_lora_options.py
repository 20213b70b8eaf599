"""Rank, scale and targets of adapters: what may be asked for, and what then trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hosl_export.__main__ import main
from hosl_export.bundle.reading import load_tail
from hosl_export.model.families import FAMILIES, find_family
from hosl_export.model.lora import choose_lora
from hosl_protocol.exceptions import ExitCode, SettingsError
from hosl_protocol.run.manifest import LoraEntry, load_manifest
from pictures import make_image_model
from tiny import CONFIGS, make_model

LINEAR = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "bert": {"query", "key", "value", "dense"},
    "vit": {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"},
}
"""Every matrix of a block, by its name."""


def choose(kind: str, rank: int | None = None, alpha: int | None = None, *targets: str) -> LoraEntry:
    model = make_image_model(kind) if kind == "vit" else make_model(kind)
    return choose_lora(model, find_family(model.config.model_type), rank, alpha, targets)


@pytest.mark.parametrize("kind", LINEAR)
def test_all_linear_is_every_matrix_of_a_block(kind: str) -> None:
    entry = choose(kind, None, None, "all-linear")
    assert set(entry.targets) == LINEAR[kind]
    assert (entry.r, entry.alpha) == (8, 16)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind in FAMILIES])
def test_a_familys_own_targets_are_those_of_its_blocks(kind: str) -> None:
    assert choose(kind, 2).targets == FAMILIES[kind].lora_targets


def test_a_target_may_be_the_end_of_a_path() -> None:
    assert choose("bert", 2, 4, "attention.output.dense").targets == ("attention.output.dense",)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((0, None), "lora-rank is 0: use 1 to 8, the smallest dimension of a matrix that is adapted"),
        ((9, None), "lora-rank is 9: use 1 to 8, the smallest"),
        ((17, None, "o_proj"), "lora-rank is 17: use 1 to 16, the smallest"),
        ((None, 0), "lora-alpha is 0: use 1 to 65536"),
        (
            (None, None, "q_proj", "c_attn"),
            "lora-targets is 'c_attn': no block has such a matrix: use down_proj, gate_pro",
        ),
        ((None, None, "proj"), "no block has such a matrix"),
        ((None, None, "embed_tokens"), "no block has such a matrix"),
        ((None, None, ""), "no block has such a matrix"),
        ((None, None, "q_proj", "all-linear"), "lora-targets is 'all-linear': no block .* or all-linear alone"),
    ],
)
def test_what_the_blocks_cannot_have_is_refused(options: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        choose("llama", *options)


@pytest.mark.parametrize(
    ("option", "value", "train"),
    [("rank", "4", "norm"), ("alpha", "4", "blocks"), ("targets", "q_proj", "none"), ("rank", "0", "prompt")],
)
def test_options_of_adapters_need_adapters(
    tmp_path: Path, model_folder: Any, capsys: pytest.CaptureFixture[str], option: str, value: str, train: str
) -> None:
    command = ["--model", str(model_folder("llama")), "--split", "2", "--train", train, "--out", str(tmp_path / "b")]
    assert main([*command, f"--lora-{option}", value]) == ExitCode.SETTINGS
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"lora-{option} is " in last
    assert f"--train {train} has no adapters: use --train lora or lora-b" in last


def test_seven_projections_train_with_the_rank_and_scale_that_were_asked_for(tmp_path: Path, model_folder: Any) -> None:
    command = ["--model", str(model_folder("llama")), "--split", "1", "--train", "lora", "--out", str(tmp_path / "b")]
    options = ["--lora-rank", "3", "--lora-alpha", "5", "--lora-targets", "all-linear"]
    assert main([*command, *options]) == 0
    manifest = load_manifest(tmp_path / "b")
    assert manifest.lora is not None
    assert (manifest.lora.r, manifest.lora.alpha, set(manifest.lora.targets)) == (3, 5, LINEAR["llama"])
    assert len(manifest.trainable) == 2 * 7
    assert {min(entry.shape) for entry in manifest.trainable} == {3}
    assert len(manifest.gradients[0].gradients) == 2 * 7
    assert load_tail(tmp_path / "b", manifest)
