"""The way back: halves to a Hugging Face model, adapters to PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from hosl_export.bundle.reading import full_config, load_tail
from hosl_export.model.families import find_family
from hosl_export.model.joining import join_state
from hosl_export.model.lora import fold_lora, inject_lora, is_lora, load_plain_state, plain_state
from hosl_export.model.peft_files import peft_adapter
from hosl_export.tensor_files import write_tensors
from tiny import CONFIGS, largest_difference, make_batch, run_shard, uncut_class

LABELS = 3

# peft asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def _with_random_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with other values in its adapters, B among them, which starts at zero."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.3 if is_lora(name) else tensor
        for name, tensor in state.items()
    }


def _write_model(case: Any, state: dict[str, Tensor], out: Path, num_labels: int | None = None) -> Path:
    out.mkdir()
    full_config(case.bundle, case.manifest, num_labels=num_labels).save_pretrained(out)
    write_tensors(out / "model.safetensors", state)
    return out


def _load_strictly(auto: Any, folder: Path) -> Any:
    model, report = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_joined_halves_are_the_uncut_model(exported, tmp_path: Path, kind: str) -> None:
    case = exported(kind)
    client = fold_lora(case.weights, case.manifest.lora, find_family(case.manifest.family))
    tail = plain_state(load_tail(case.bundle, case.manifest).model)
    joined = _load_strictly(
        uncut_class(kind), _write_model(case, join_state(case.manifest, client, tail), tmp_path / "out")
    )
    assert joined.config.tie_word_embeddings is False
    expected = case.model.state_dict()
    for name, tensor in joined.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "bert"])
def test_folded_adapters_compute_what_the_halves_compute(exported, tmp_path: Path, kind: str) -> None:
    case = exported(kind)
    family = find_family(case.manifest.family)
    client, tail = _with_random_adapters(case.weights), load_tail(case.bundle, case.manifest)
    inject_lora(tail.model, case.manifest.lora, family, seed=1)
    load_plain_state(tail.model, _with_random_adapters(plain_state(tail.model)))
    ids, mask = make_batch(3, 11)
    halves = tail(run_shard(case.bundle, client, ids, mask), mask)

    folded = [fold_lora(state, case.manifest.lora, family) for state in (client, plain_state(tail.model))]
    joined = _load_strictly(uncut_class(kind), _write_model(case, join_state(case.manifest, *folded), tmp_path / "out"))
    got = joined(input_ids=ids, attention_mask=mask)[0]
    assert largest_difference(got, halves, mask) < 2e-5
    assert largest_difference(case.model(input_ids=ids, attention_mask=mask)[0], halves, mask) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_adapter_loads_with_peft_and_computes_what_the_halves_compute(exported, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    case = exported(kind)
    client, tail = _with_random_adapters(case.weights), load_tail(case.bundle, case.manifest)
    inject_lora(tail.model, case.manifest.lora, find_family(case.manifest.family), seed=1)
    load_plain_state(tail.model, _with_random_adapters(plain_state(tail.model)))
    ids, mask = make_batch(3, 11)
    halves = tail(run_shard(case.bundle, client, ids, mask), mask)

    tensors, config = peft_adapter(case.manifest, client, plain_state(tail.model))
    write_tensors(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = PeftModel.from_pretrained(case.model, tmp_path).eval()
    assert len(tensors) == 2 * len(case.manifest.lora.targets) * case.manifest.blocks
    assert largest_difference(model(input_ids=ids, attention_mask=mask)[0], halves, mask) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_classifier_tail_computes_what_the_joined_classifier_computes(exported, tmp_path: Path, kind: str) -> None:
    case = exported(kind)
    tail = load_tail(case.bundle, case.manifest, num_labels=LABELS, seed=4)
    ids, mask = make_batch(3, 11)
    logits = tail(run_shard(case.bundle, case.weights, ids, mask), mask)
    assert logits.shape == (3, LABELS)

    client = fold_lora(case.weights, case.manifest.lora, find_family(case.manifest.family))
    state = join_state(case.manifest, client, plain_state(tail.model))
    out = _write_model(case, state, tmp_path / "out", num_labels=LABELS)
    joined = _load_strictly(hf.AutoModelForSequenceClassification, out)
    got = joined(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(got, logits, atol=1e-5 * float(logits.abs().max()))


@torch.no_grad()
def test_classifiers_adapter_brings_its_head(exported, tmp_path: Path) -> None:
    from peft import PeftModel

    case = exported("bert")
    tail = load_tail(case.bundle, case.manifest, num_labels=LABELS, seed=4)
    inject_lora(tail.model, case.manifest.lora, find_family("bert"), seed=1)
    load_plain_state(tail.model, _with_random_adapters(plain_state(tail.model)))
    client, (ids, mask) = _with_random_adapters(case.weights), make_batch(3, 11)
    logits = tail(run_shard(case.bundle, client, ids, mask), mask)

    tensors, config = peft_adapter(case.manifest, client, plain_state(tail.model))
    write_tensors(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = hf.AutoModelForSequenceClassification.from_pretrained(case.source, num_labels=LABELS)
    model = PeftModel.from_pretrained(base, tmp_path).eval()
    got = model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(got, logits, atol=1e-5 * float(logits.abs().max()))


def test_classification_head_is_drawn_from_its_seed_and_leaves_the_global_generator_alone(exported) -> None:
    case = exported("llama")

    def draw(seed: int) -> Tensor:
        return load_tail(case.bundle, case.manifest, num_labels=LABELS, seed=seed).model.score.weight

    state = torch.random.get_rng_state()
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_adapters_take_plain_names(exported) -> None:
    case = exported("llama")
    tail = load_tail(case.bundle, case.manifest)
    before = set(plain_state(tail.model))
    inject_lora(tail.model, case.manifest.lora, find_family("llama"), seed=1)
    added = {
        f"model.layers.{block}.self_attn.{target}.{matrix}.weight"
        for block in range(case.manifest.blocks - case.manifest.split)
        for target in ("q_proj", "v_proj")
        for matrix in ("lora_A", "lora_B")
    }
    assert set(plain_state(tail.model)) == before | added
    assert {name for name, tensor in tail.model.named_parameters() if tensor.requires_grad} == {
        name.replace(".weight", ".default.weight") for name in added
    }


def test_a_tail_without_adapters_makes_no_adapter(exported) -> None:
    case = exported("llama")
    tail = plain_state(load_tail(case.bundle, case.manifest).model)
    with pytest.raises(ValueError, match="tail has no adapters"):
        peft_adapter(case.manifest, case.weights, tail)


def test_overlapping_halves_are_refused(exported) -> None:
    case = exported("llama")
    with pytest.raises(ValueError, match="both halves hold"):
        join_state(case.manifest, {"lm_head.weight": torch.zeros(1)}, {"lm_head.weight": torch.zeros(1)})
