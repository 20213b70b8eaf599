"""Checkpoints that are not plain: adapters, float8, a tokenizer.model, scaled rotary embeddings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hosl_export import ExportSettings, export_bundle
from hosl_export.exceptions import ModelError
from hosl_export.sources.loading import find_source, load_model, load_source_config, load_tokenizer
from hosl_protocol.run.manifest import load_manifest
from tiny import SCALINGS, make_batch, make_model, save_scaled, save_with_sentencepiece

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own

IDS, _ = make_batch(2, 9)


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_rotary_embeddings_are_cut_or_kept_to_where_their_angles_stay(tmp_path: Path, kind: str) -> None:
    """The parity check compares the halves with the uncut model."""
    save_scaled(tmp_path / "m", kind)
    out = tmp_path / "bundle"
    summary = export_bundle(ExportSettings(model=str(tmp_path / "m"), split=1, out=out, train="none"))
    assert summary.checked_length == load_manifest(out).max_length == (24 if kind == "longrope" else 48)


def adapted(base: Any, config: Any, folder: Path, base_name: str) -> Any:
    """Write an adapter whose every matrix is random; the model with it."""
    model = get_peft_model(base, config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0.0, 0.3)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(folder, save_embedding_layers=False)  # else it asks the hub for the base
    return model.eval()


@pytest.mark.parametrize("place", ["path", "beside", "same folder"])
def test_an_adapter_is_merged_into_its_base(model_folder: Callable[[str], Path], tmp_path: Path, place: str) -> None:
    base = shutil.copytree(model_folder("llama"), tmp_path / "base")
    folder = base if place == "same folder" else tmp_path / "adapter"
    name = str(base) if place == "path" else "base"
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    expected = adapted(make_model("llama"), lora, folder, name)
    source = find_source(str(folder))
    model = load_model(source)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, atol=1e-5, rtol=1e-4)
    assert sorted(model.state_dict()) == sorted(make_model("llama").state_dict())
    assert load_tokenizer(source).vocab_size == 64
    assert source.name == folder.name


def test_an_adapter_of_a_classifier_brings_its_head(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    config = load_source_config(find_source(str(model_folder("llama"))))
    config.num_labels = 5
    base = hf.LlamaForSequenceClassification.from_pretrained(model_folder("llama"), config=config)
    lora = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    expected = adapted(base, lora, tmp_path / "adapter", str(model_folder("llama")))
    model = load_model(find_source(str(tmp_path / "adapter")))
    assert type(model).__name__ == "LlamaForSequenceClassification"
    with torch.no_grad():
        logits = model(IDS[:1]).logits
        torch.testing.assert_close(logits, expected(IDS[:1]).logits, atol=1e-5, rtol=1e-4)
    assert logits.shape == (1, 5)


def test_an_adapter_without_its_base_says_what_to_do(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted(make_model("llama"), lora, tmp_path / "adapter", "gone")
    with pytest.raises(ModelError, match="a PEFT adapter, and its base 'gone' is not there: merge it into its base"):
        find_source(str(tmp_path / "adapter"))


def test_an_adapter_that_is_no_part_of_the_weights_is_refused(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted(make_model("llama"), prompt, tmp_path / "adapter", str(model_folder("llama")))
    with pytest.raises(ModelError, match="a PEFT adapter of kind PROMPT_TUNING is no part of the weights"):
        load_model(find_source(str(tmp_path / "adapter")))


def test_a_float8_checkpoint_becomes_float32(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = hf.Qwen3Config(**sizes, num_hidden_layers=2, head_dim=64, vocab_size=64, max_position_embeddings=32)
    whole = hf.Qwen3ForCausalLM(config)
    whole.save_pretrained(tmp_path)
    state = {}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        if "proj" in name:
            scale = value.abs().max() / 448
            state[name] = (value / scale).to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = scale.reshape(1, 1)
        else:
            state[name] = value.to(torch.bfloat16)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((tmp_path / "config.json").read_text())
    facts = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({**said, "quantization_config": facts}))
    model = load_model(find_source(str(tmp_path)))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert "quantization_config" not in model.config.to_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], atol=5e-3, rtol=0.07)


def test_a_tokenizer_model_alone_is_converted(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = find_source(str(save_with_sentencepiece(model_folder("llama"), tmp_path / "m")))
    assert load_tokenizer(source).tokenize("a film") == ["▁", "a", "▁", "f", "i", "l", "m"]
