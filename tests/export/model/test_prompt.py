"""A soft prompt computes what PEFT's prompt tuning does, and says what it has no room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from hosl_export import ExportSettings, export_bundle
from hosl_export.__main__ import main
from hosl_export.bundle.parity import TOLERANCE
from hosl_export.bundle.reading import load_client, load_tail
from hosl_export.model.families import find_family
from hosl_export.model.prompt import add_prompt, draw_prompt
from hosl_export.tensor_files import read_tensors
from hosl_protocol.exceptions import ExitCode, SettingsError
from hosl_protocol.run.manifest import SHARD_WEIGHTS, load_manifest
from pictures import save_image_model
from tiny import make_batch, make_model, run_shard

TOKENS, LENGTH = 3, 9


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "opt-350m", "gpt2", "bert"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_the_halves_compute_what_peft_computes_with_the_same_prompt(tmp_path: Path, model_folder, kind: str) -> None:
    settings = ExportSettings(
        model=str(model_folder(kind)),
        split=1,
        out=tmp_path / "bundle",
        train="prompt",
        prompt_tokens=TOKENS,
        gradients=False,
    )
    summary = export_bundle(settings)
    assert summary.parity_error < TOLERANCE
    manifest, weights = load_manifest(settings.out), read_tensors(settings.out / SHARD_WEIGHTS)
    (entry,) = manifest.trainable
    assert (entry.shape[0], manifest.prompt_tokens) == (TOKENS, TOKENS)
    weights[entry.name] = torch.randn(entry.shape, generator=torch.Generator().manual_seed(3))
    ids, _ = make_batch(1, LENGTH)
    # What stands in the prompt's place is never seen.
    longer, mask = (
        torch.cat([torch.zeros(1, TOKENS, dtype=torch.long), ids], dim=1),
        torch.ones(1, TOKENS + LENGTH, dtype=torch.long),
    )
    h_BTD = run_shard(settings.out, weights, longer, mask)
    with torch.no_grad():
        again = load_client(settings.out, manifest, weights)(longer, mask)
        got = load_tail(settings.out, manifest)(h_BTD, mask)
    np.testing.assert_allclose(again, h_BTD, atol=1e-5 * float(h_BTD.abs().max()))
    expected = run_peft(make_model(kind), weights[entry.name], ids)
    assert got.shape == expected.shape == (1, TOKENS + LENGTH, got.shape[2])
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(expected.abs().max()))


def test_a_prompt_may_take_all_positions_but_two(tmp_path: Path, model_folder) -> None:
    settings = ExportSettings(
        model=str(model_folder("bert")),
        split=1,
        out=tmp_path / "bundle",
        train="prompt",
        prompt_tokens=46,
        gradients=False,
    )
    assert export_bundle(settings).parity_error < TOLERANCE


def run_peft(model: Any, prompt: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    is_encoder = find_family(model.config.model_type).is_encoder
    task = peft.TaskType.FEATURE_EXTRACTION if is_encoder else peft.TaskType.CAUSAL_LM
    config = peft.PromptTuningConfig(
        task_type=task, num_virtual_tokens=len(prompt), token_dim=prompt.shape[1], num_transformer_submodules=1
    )
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        adapted.prompt_encoder["default"].embedding.weight.copy_(prompt)
        outputs = adapted(input_ids=ids, attention_mask=torch.ones_like(ids))
    return outputs.last_hidden_state if is_encoder else outputs.logits  # type: ignore[no-any-return]


def test_a_prompt_begins_as_tokens_of_the_vocabulary_by_its_seed() -> None:
    model = make_model("gemma3_text")
    prompt = add_prompt(model, TOKENS)
    draw_prompt(model, 1)
    first = prompt.detach().clone()
    embedding = model.get_input_embeddings()
    words = embedding.forward(torch.arange(embedding.num_embeddings))
    assert [bool((words == row).all(dim=1).any()) for row in first] == [True] * TOKENS
    assert len(first.unique(dim=0)) == TOKENS
    draw_prompt(model, 2)
    assert not torch.equal(prompt, first)
    draw_prompt(model, 1)
    assert torch.equal(prompt, first)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"prompt_tokens": 0}, "prompt-tokens is 0"),
        ({"prompt_tokens": 15, "max_length": 16}, "prompt-tokens is 15: use 1 to 14"),
        ({"max_length": 2}, "max-length is 2: a soft prompt and a text have no room in it"),
        ({"train": "norm", "prompt_tokens": 4}, "prompt-tokens is 4: --train norm has no soft prompt"),
        ({"train_blocks": 1}, "train-blocks is 1: --train prompt trains no block"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(tmp_path: Path, model_folder, more: dict[str, int], field: str) -> None:
    settings = {"model": str(model_folder("llama")), "split": 2, "out": tmp_path / "bundle", "train": "prompt"}
    with pytest.raises(SettingsError, match=field):
        export_bundle(ExportSettings(**{**settings, **more}))
    assert list(tmp_path.iterdir()) == []


def test_images_have_no_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_image_model("vit", tmp_path / "model")
    command = ["--model", str(model), "--split", "1", "--train", "prompt", "--out", str(tmp_path / "bundle")]
    assert main(command) == ExitCode.SETTINGS
    assert "a model of images has no prompt: use --train norm, blocks or all" in capsys.readouterr().err
