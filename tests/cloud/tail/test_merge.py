"""What merge writes loads with the ordinary tools and computes what the two halves compute."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hosl_cloud.exceptions import AdapterError
from hosl_cloud.tail.checkpoint import save_checkpoint
from hosl_cloud.tail.merge import Targets, merge_run
from hosl_cloud.tail.trainer import TailTrainer
from hosl_edge.data.texts import without_end_padding
from hosl_export import plain_state
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import BundleError

PROMPTS, CLASSES, TEXT = "prompt-classification", "sequence-classification", "lm"
IDS = torch.randint(4, 48, (3, 9), generator=torch.Generator().manual_seed(2))


def trained(bundle: Any, kind: str, train: str, folder: Path) -> tuple[TailTrainer, Path]:
    """A tail after a few steps that moved it visibly, and its checkpoint."""
    trainer = bundle.trainer(kind, train=train, optimizer="adamw", learning_rate=0.02)
    for round_ in (1, 2, 3):
        trainer.forward_backward(*bundle.batch(kind).sent)
        trainer.step(round_, 1.0)
    return trainer, save_checkpoint(folder, 3, 1, trainer, trainer.config)


def move_client(bundle: Any) -> None:
    """Move what the device trains, as a run would have."""
    generator = torch.Generator().manual_seed(4)
    state = plain_state(bundle.client.model)
    names = [name for name in state if "lora" in name] or ([] if bundle.manifest.train == "none" else list(state))
    with torch.no_grad():
        for name in names:
            state[name] += 0.1 * torch.randn(state[name].shape, generator=generator)


def halves(bundle: Any, trainer: TailTrainer, ids: Tensor) -> Tensor:
    """Logits of the two halves, padded nowhere."""
    with torch.no_grad():
        h_BTD = bundle.client(ids)
        return trainer.tail(h_BTD, torch.ones(ids.shape, dtype=torch.long))


@pytest.fixture
def cut(make_bundle: Callable[..., Any]) -> Callable[..., Any]:
    """A bundle whose device moved."""

    def make(family: str, train: str = "lora") -> Any:
        bundle = make_bundle(family, train, "moved")
        if not bundle.moved:
            move_client(bundle)
            bundle.moved.append(True)
        return bundle

    return make


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text"])
@pytest.mark.parametrize(("client_train", "tail_train"), [("lora", "full"), ("lora", "lora"), ("blocks", "full")])
def test_the_merged_language_model_computes_what_the_halves_compute(
    cut: Callable[..., Any], tmp_path: Path, family: str, client_train: str, tail_train: str
) -> None:
    bundle = cut(family, client_train)
    trainer, checkpoint = trained(bundle, TEXT, tail_train, tmp_path / "checkpoints")
    written = merge_run(bundle.path, bundle.manifest, bundle.client_weights(), checkpoint, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = halves(bundle, trainer, IDS)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)
        assert (bundle.uncut(IDS).logits - expected).abs().max() > 1e-2
    # Adapters leave the head and the embedding, which were one tensor, as they were.
    is_tied, width = tail_train == "lora", 16 if family == "opt" else 32
    assert (written.untied_bytes, written.info.round) == (0 if is_tied else 48 * width * 4, 3)
    assert merged.config.tie_word_embeddings is is_tied
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w3 good").input_ids == [7, 3]


@pytest.mark.parametrize("tail_train", ["full", "lora", "head"])
def test_a_prompts_merged_head_has_its_trained_rows_in_place(
    cut: Callable[..., Any], tmp_path: Path, tail_train: str
) -> None:
    bundle = cut("llama")
    trainer, checkpoint = trained(bundle, PROMPTS, tail_train, tmp_path)
    merge_run(bundle.path, bundle.manifest, bundle.client_weights(), checkpoint, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits[..., [2, 3]], halves(bundle, trainer, IDS), atol=1e-4, rtol=1e-4)
    head, untrained = merged.lm_head.weight, bundle.uncut.lm_head.weight
    assert torch.equal(head[4:], untrained[4:])
    assert torch.equal(head[2:4], untrained[2:4]) == (tail_train == "lora")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bert"])
@pytest.mark.parametrize("tail_train", ["full", "lora"])
def test_the_merged_classifier_computes_what_the_halves_compute(
    cut: Callable[..., Any], tmp_path: Path, family: str, tail_train: str
) -> None:
    bundle = cut(family)
    trainer, checkpoint = trained(bundle, CLASSES, tail_train, tmp_path)
    merge_run(bundle.path, bundle.manifest, bundle.client_weights(), checkpoint, tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, halves(bundle, trainer, IDS), atol=1e-4, rtol=1e-4)
        padded = torch.cat([IDS, torch.zeros(3, 4, dtype=torch.long)], dim=1)
        mask = (padded != 0).long()
        logits = merged(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits, merged(IDS).logits, atol=1e-4, rtol=1e-4)
    assert merged.config.id2label == {0: "no", 1: "maybe", 2: "yes"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text"])
def test_the_merged_classifier_reads_a_text_that_ends_with_padding_where_the_device_ends_it(
    cut: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    bundle = cut(family)
    trainer, checkpoint = trained(bundle, CLASSES, "full", tmp_path)
    merge_run(bundle.path, bundle.manifest, bundle.client_weights(), checkpoint, tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    for text in ([5, 6, 7, 0], [5, 0, 7, 0, 0], [0, 0]):
        sent = without_end_padding(np.array(text, np.int32), bundle.manifest.pad_token_id)
        expected = halves(bundle, trainer, torch.tensor(sent[None].astype(np.int64)))
        with torch.no_grad():
            alone = merged(torch.tensor([text])).logits
            batch = torch.tensor([text + [0] * (9 - len(text)), IDS[0].tolist()])
            in_a_batch = merged(batch, attention_mask=torch.tensor([[1] * len(text) + [0] * (9 - len(text)), [1] * 9]))
        torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(in_a_batch.logits[:1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "client_train", "kind"),
    [
        ("llama", "lora", PROMPTS),
        ("llama", "none", PROMPTS),
        ("gpt2", "lora", TEXT),
        ("gpt2", "none", TEXT),
        ("llama", "lora", CLASSES),
        ("bert", "lora", CLASSES),
    ],
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_the_adapter_loads_in_peft_and_computes_the_same(
    cut: Callable[..., Any], tmp_path: Path, family: str, client_train: str, kind: str
) -> None:
    bundle = cut(family, client_train)
    _, checkpoint = trained(bundle, kind, "lora", tmp_path)
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    merge_run(bundle.path, bundle.manifest, bundle.client_weights(), checkpoint, Targets(out=out, adapter=adapter))
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "hosl_task.json"]
    assert sorted(path.name for path in adapter.iterdir()) == names
    os.umask(umask := os.umask(0))
    modes = {path.stat().st_mode & 0o777 for folder in (adapter, tmp_path / "out") for path in folder.iterdir()}
    assert modes == {0o666 & ~umask}, "as the umask gives it"
    bundle.save_uncut(tmp_path / "base")
    auto, arguments = AutoModelForCausalLM, {}
    if kind == CLASSES:
        auto, arguments = AutoModelForSequenceClassification, {"num_labels": 3}
    merged = auto.from_pretrained(out).eval()
    base = auto.from_pretrained(tmp_path / "base", **arguments).eval()
    adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(IDS[:1]).logits, merged(IDS[:1]).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("client_train", "tail_train", "said"),
    [("lora", "full", "the tail trained 'full'"), ("blocks", "lora", "the device trained 'blocks'")],
)
def test_what_is_more_than_an_adapter_says_why(
    cut: Callable[..., Any], tmp_path: Path, client_train: str, tail_train: str, said: str
) -> None:
    bundle = cut("llama", client_train)
    _, checkpoint = trained(bundle, PROMPTS, tail_train, tmp_path)
    targets = Targets(out=tmp_path / "out", adapter=tmp_path / "adapter")
    with pytest.raises(AdapterError, match=said):
        merge_run(bundle.path, bundle.manifest, bundle.client_weights(), checkpoint, targets)
    assert not (tmp_path / "out").exists()


def test_what_exists_is_left_alone(cut: Callable[..., Any], tmp_path: Path) -> None:
    bundle = cut("llama")
    _, checkpoint = trained(bundle, PROMPTS, "lora", tmp_path / "checkpoints")
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    for taken, option in ((out, "--out"), (adapter, "--adapter")):
        taken.mkdir()
        with pytest.raises(SettingsError, match=f"{option} is .* exists already"):
            merge_run(
                bundle.path, bundle.manifest, bundle.client_weights(), checkpoint, Targets(out=out, adapter=adapter)
            )
        assert list(taken.iterdir()) == []
        taken.rmdir()
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_client_half_that_lacks_a_tensor_leaves_nothing_behind(cut: Callable[..., Any], tmp_path: Path) -> None:
    bundle = cut("llama")
    _, checkpoint = trained(bundle, PROMPTS, "full", tmp_path / "checkpoints")
    weights = {name: value for name, value in bundle.client_weights().items() if "k_proj" not in name}
    with pytest.raises(BundleError, match="do not join to a LlamaForCausalLM"):
        merge_run(bundle.path, bundle.manifest, weights, checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_merging_leaves_the_given_weights_alone(cut: Callable[..., Any], tmp_path: Path) -> None:
    bundle = cut("llama")
    _, checkpoint = trained(bundle, PROMPTS, "full", tmp_path / "checkpoints")
    weights = bundle.client_weights()
    before = {name: value.copy() for name, value in weights.items()}
    merge_run(bundle.path, bundle.manifest, weights, checkpoint, tmp_path / "out")
    assert all(np.array_equal(value, before[name]) for name, value in weights.items())
