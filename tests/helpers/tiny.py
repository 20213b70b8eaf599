"""Tiny models of every family with random weights, a tiny tokenizer, and small batches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers.convert_slow_tokenizer import import_protobuf

from hosl_export.bundle.parity import SAMPLE
from hosl_export.model.families import find_family
from hosl_protocol.run.manifest import SHARD_GRAPH

VOCABULARY = 64
WINDOW = 8
BLOCKS = 4

_COMMON = {"hidden_size": 16, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "vocab_size": VOCABULARY}
_LLAMA = {**_COMMON, "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 48}
_OPT = {**_COMMON, "ffn_dim": 24, "max_position_embeddings": 48}
_GPT2 = {"n_embd": 16, "n_layer": BLOCKS, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 48}
_MIXED = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS: dict[str, Callable[[], Any]] = {
    "opt": lambda: hf.OPTConfig(**_OPT, word_embed_proj_dim=16, **_TOKENS),
    "opt-350m": lambda: hf.OPTConfig(**_OPT, word_embed_proj_dim=8, do_layer_norm_before=False, **_TOKENS),
    "llama": lambda: hf.LlamaConfig(**_LLAMA, tie_word_embeddings=True, **_TOKENS),
    "mistral": lambda: hf.MistralConfig(**_LLAMA, sliding_window=WINDOW, **_TOKENS),
    "qwen2": lambda: hf.Qwen2Config(**_LLAMA, **_MIXED, **_TOKENS),
    "qwen3": lambda: hf.Qwen3Config(**_LLAMA, **_MIXED, head_dim=8, **_TOKENS),
    "gemma3_text": lambda: hf.Gemma3TextConfig(
        **{**_LLAMA, "num_hidden_layers": 7},
        head_dim=8,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        final_logit_softcapping=5.0,
        **_TOKENS,
    ),
    "gpt2": lambda: hf.GPT2Config(**_GPT2, scale_attn_by_inverse_layer_idx=True, **_TOKENS),
    "bert": lambda: hf.BertConfig(**_COMMON, intermediate_size=24, max_position_embeddings=48, pad_token_id=0),
}
"""One configuration for every family, and one for each trap of a family."""

SPLITS = {kind: 1 + 2 * (index % 2) for index, kind in enumerate(CONFIGS)}
"""Where each model's bundle is cut: after block 1 or 3, so that half of the cuts leave one kind of block on a side."""

WINDOWED = ("mistral", "qwen2", "qwen3", "gemma3_text")
DECODERS = tuple(kind for kind, make_config in CONFIGS.items() if not find_family(make_config().model_type).is_encoder)


def uncut_class(kind: str) -> Any:
    """The Hugging Face class of the uncut model."""
    return hf.AutoModelForCausalLM if kind in DECODERS else hf.AutoModel


def make_model(kind: str, seed: int = 0) -> Any:
    """A tiny uncut model whose every weight is random, biases and norms too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = uncut_class(kind).from_config(CONFIGS[kind]()).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.3)
    return model


def make_batch(rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [rows, length] and a mask with another length in each row, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([max(1, length - 5 * row) for row in range(rows)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator) * mask, mask


def run_shard(bundle: Path, weights: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """Activations [B, T, D] of a bundle's graph with the given weights."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(bundle / SHARD_GRAPH), options)
    given = {"input_ids": ids, "attention_mask": mask, **weights}
    feed = {entry.name: given[entry.name].numpy() for entry in session.get_inputs()}
    return torch.from_numpy(session.run(["activations"], feed)[0])


def largest_difference(got: Tensor, expected: Tensor, mask: Tensor) -> float:
    """Largest difference on real tokens, as a share of the largest magnitude."""
    return float((got - expected)[mask.bool()].abs().max() / expected[mask.bool()].abs().max())


SCALINGS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "linear": {},
    "yarn": {"original_max_position_embeddings": 12},
    "llama3": {"original_max_position_embeddings": 12, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"original_max_position_embeddings": 24, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
}
"""What `rope_scaling` may say; the factor is 4."""


def save_scaled(folder: Path, kind: str) -> Any:
    """Write a tiny Llama with scaled rotary embeddings; the model."""
    config = hf.LlamaConfig(**_LLAMA, **_TOKENS, rope_scaling={"rope_type": kind, "factor": 4.0, **SCALINGS[kind]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def save_with_sentencepiece(source: Path, folder: Path) -> Path:
    """The model of a folder, with a `tokenizer.model` alone: a piece for each letter."""
    pb = import_protobuf()
    proto = pb.ModelProto()
    kinds = pb.ModelProto.SentencePiece
    for piece, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        proto.pieces.add(piece=piece, score=0, type=kind)
    for place, letter in enumerate("\u2581abcdefghijklmnopqrstuvwxyz"):
        proto.pieces.add(piece=letter, score=-float(place), type=kinds.NORMAL)
    proto.trainer_spec.model_type = pb.TrainerSpec.BPE
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.name = "identity"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, folder)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def make_tokenizer() -> Any:
    """A tokenizer of 64 tokens, trained on the sample that the parity check reads."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator([SAMPLE], trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    # Settings of this kind come with real tokenizers, and must not reach the device.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
