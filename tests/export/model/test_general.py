"""Architectures without an entry of their own: what is read off them, and what of it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from hosl_export import ExportSettings, export_bundle
from hosl_export.bundle.reading import load_tail
from hosl_export.exceptions import UnknownFamily
from hosl_export.inspection import describe_cuts, inspect_model
from hosl_export.model.families import FAMILIES, find_family
from hosl_export.model.general import derive_family
from hosl_export.model.halves import client_half, tail_half
from hosl_export.tensor_files import read_tensors
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import SHARD_WEIGHTS, load_manifest
from tiny import CONFIGS, VOCABULARY, make_batch, make_model, make_tokenizer, run_shard

_COMMON = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": VOCABULARY}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    **_COMMON,
    **{"num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 48, **_TOKENS},
}
_BERT = {**_COMMON, "intermediate_size": 24, "max_position_embeddings": 48, "pad_token_id": 0}

GENERAL: dict[str, Callable[[], Any]] = {
    # Multiplies embeddings, residuals and logits.
    "granite": lambda: hf.GraniteConfig(
        **_LLAMA, embedding_multiplier=3.0, residual_multiplier=0.7, logits_scaling=4.0, attention_multiplier=0.3
    ),
    # One kernel for queries, keys and values.
    "phi3": lambda: hf.Phi3Config(**_LLAMA, original_max_position_embeddings=48),
    "olmo2": lambda: hf.Olmo2Config(**_LLAMA),
    # Blocks without rotary angles between others.
    "smollm3": lambda: hf.SmolLM3Config(**_LLAMA, no_rope_layers=[1, 0, 1, 0]),
    # Short convolutions between attention.
    "lfm2": lambda: hf.Lfm2Config(
        **_LLAMA, layer_types=["conv", "full_attention", "conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
    # Half of the blocks' input passes by; logits are bounded.
    "gemma2": lambda: hf.Gemma2Config(**_LLAMA, head_dim=8, sliding_window=8, final_logit_softcapping=5.0),
    "cohere": lambda: hf.CohereConfig(**_LLAMA, logit_scale=0.3),
    "stablelm": lambda: hf.StableLmConfig(**_LLAMA),
    # Positions as a slope of attention, and a norm behind the embedding.
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=4, n_head=2, **_TOKENS),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**{**_BERT, **_TOKENS}),
    "roberta": lambda: hf.RobertaConfig(**_BERT),
    "xlm-roberta": lambda: hf.XLMRobertaConfig(**_BERT),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_layers=4, n_heads=2, max_position_embeddings=48, pad_token_id=0
    ),
    # Embeddings narrower than the blocks.
    "electra": lambda: hf.ElectraConfig(**_BERT, embedding_size=8),
    "modernbert": lambda: hf.ModernBertConfig(**_BERT, local_attention=8, bos_token_id=1, eos_token_id=2),
}
"""A small configuration for each, with what of it could go wrong."""


def make_general(kind: str) -> Any:
    """A tiny model whose every weight is random."""
    auto = hf.AutoModel if find_family(kind).is_encoder else hf.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(GENERAL[kind]()).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", GENERAL)
def test_halves_compute_what_the_model_computes(kind: str) -> None:
    assert kind not in FAMILIES
    model = make_general(kind)
    for split in (1, 2, 3):
        client, tail = client_half(model, split), tail_half(model, split)
        for rows, length in ((1, 1), (3, 7), (2, 20)):
            ids, mask = make_batch(rows, length)
            expected = model(input_ids=ids, attention_mask=mask)[0]
            difference = ((tail(client(ids, mask), mask) - expected).abs() * mask[..., None]).max()
            assert difference < 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", GENERAL)
def test_each_half_has_the_weights_of_its_side_alone(kind: str) -> None:
    model = make_general(kind)
    client, tail = client_half(model, 2), tail_half(model, 2)
    sizes = [sum(parameter.numel() for parameter in half.parameters()) for half in (client, tail)]
    # A head that is tied to the token table is on both sides.
    shared = 0 if client.token_table is None or not model.config.tie_word_embeddings else client.token_table.numel()
    shared = shared if not find_family(kind).is_encoder else 0
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters()) + shared


@pytest.mark.parametrize(("kind", "train"), [("granite", "lora"), ("lfm2", "none"), ("modernbert", "norm")])
def test_a_bundle_is_checked_and_computes_what_the_model_computes(kind: str, train: Any, tmp_path: Path) -> None:
    model = make_general(kind)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    summary = export_bundle(
        ExportSettings(model=str(tmp_path / "model"), split=2, out=tmp_path / "bundle", train=train)
    )
    assert summary.parity_error < 1e-5
    if train != "none":
        assert summary.gradient_error is not None
        assert summary.gradient_error < 1e-4

    bundle, (ids, mask) = tmp_path / "bundle", make_batch(3, 17)
    activations = run_shard(bundle, read_tensors(bundle / SHARD_WEIGHTS), ids, mask)
    with torch.no_grad():
        got = load_tail(bundle, load_manifest(bundle))(activations, mask)
        expected = model(input_ids=ids, attention_mask=mask)[0]
    assert ((got - expected).abs() * mask[..., None]).max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_rule_finds_what_the_entries_say(kind: str) -> None:
    """Where it did not, the rule would be wrong of an architecture that is known."""
    model_type = CONFIGS[kind]().model_type
    own, derived = FAMILIES[model_type], derive_family(model_type)
    assert (derived.blocks, derived.head, derived.base_prefix) == (own.blocks, own.head, own.base_prefix)
    assert derived.lora_targets == own.lora_targets
    assert derived.has_transposed_weights == own.has_transposed_weights
    # Of what an entry names, the model need not have all.
    paths = {path for path, _ in make_model(kind).named_modules()}
    for mine, its in ((derived.embeddings, own.embeddings), (derived.final, own.final)):
        if kind not in ("opt", "opt-350m"):  # its projections are defined on the other side
            assert set(mine) & paths == set(its) & paths


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nonesuch", "has no such architecture"),
        ("t5", "neither a causal language model nor an encoder"),
        ("bart", "an encoder with a decoder"),
        ("mixtral", "choose experts for each token"),
        ("albert", "no list of blocks that is as long as its config says"),
        ("wav2vec2", "neither a causal language model nor an encoder of text"),
    ],
)
def test_what_the_rule_does_not_fit_is_refused_by_name(kind: str, reason: str) -> None:
    with pytest.raises(UnknownFamily, match=reason) as caught:
        find_family(kind)
    assert f"'{kind}'" in str(caught.value)


def test_positions_of_a_roberta_begin_behind_its_padding(tmp_path: Path) -> None:
    make_general("roberta").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="use 2 to 47, the model's positions"):
        export_bundle(ExportSettings(model=str(tmp_path), split=2, out=tmp_path / "bundle", max_length=48))


@pytest.mark.parametrize("kind", ["granite", "roberta"])
def test_the_cuts_are_told_without_weights(kind: str, tmp_path: Path) -> None:
    model = make_general(kind)
    config = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    inspection = inspect_model(str(tmp_path), length=32)
    assert [cut.split for cut in inspection.cuts] == [1, 2, 3]
    for cut in inspection.cuts:
        half = client_half(model, cut.split)
        table = half.token_table
        assert table is not None
        assert cut.table_bytes == 4 * table.numel()
        assert cut.weights_bytes + cut.table_bytes == 4 * sum(parameter.numel() for parameter in half.parameters())
        assert (cut.positions, cut.width, cut.activation_bytes) == (32, 16, 4 * 32 * 16)
    shares = [cut.forward_share for cut in inspection.cuts]
    assert 0 < shares[0] < shares[1] < shares[2] < 1
    assert f"{inspection.blocks} blocks" in describe_cuts(inspection)
