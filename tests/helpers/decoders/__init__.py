"""Tiny decoders whose sizes and tokenizers are those of real models in small: for programs beside transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from tokenizers import models as token_models

from chat_templates import TEMPLATES
from hosl_export.bundle.parity import SAMPLE
from hosl_export.formats.gguf_tokenizer import _LLAMA3, _QWEN2

VOCABULARY = 448
_SIZES = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": VOCABULARY},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "vocab_size": VOCABULARY}

CONFIGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("gpt-2", lambda: hf.LlamaConfig(**_SIZES, tie_word_embeddings=True)),
    "smollm2": ("smollm", lambda: hf.LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True)),
    "llama3": ("llama-bpe", lambda: hf.LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE)),
    "llama2": ("sentencepiece", lambda: hf.LlamaConfig(**_SIZES, rope_parameters=_YARN)),
    "mistral": ("sentencepiece", lambda: hf.MistralConfig(**_SIZES, sliding_window=128)),
    "qwen2": ("qwen2", lambda: hf.Qwen2Config(**_SIZES)),
    "qwen3": ("qwen2", lambda: hf.Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=True)),
    "gemma3_text": (
        "sentencepiece",
        lambda: hf.Gemma3TextConfig(
            **{**_SIZES, "num_hidden_layers": 7},
            **{"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "final_logit_softcapping": 9.0},
        ),
    ),
    "gpt2": ("gpt-2", lambda: hf.GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=2)),
}
"""By name the tokenizer, and the config."""

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    SAMPLE,
    "It's 20% of 1,234,567 -- isn't it?\n\n  Two lines,\tand   blanks. ",
    "Ünïcode: naïve façade, 日本語, Ελληνικά, 🙂🙂",
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
]


def make_decoder(kind: str, seed: int = 0) -> Any:
    """A tiny model whose every weight is random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(CONFIGS[kind][1]()).eval()
        for name, parameter in model.named_parameters():
            parameter.data.normal_(0.0, 0.15 if parameter.dim() > 1 else 0.3)
            if "norm" in name and kind != "gemma3_text":
                parameter.data += 1.0
    return model


def save_decoder(kind: str, folder: Path) -> Any:
    """Write such a model with its tokenizer; the model."""
    model = make_decoder(kind)
    model.save_pretrained(folder)
    decoder_tokenizer(CONFIGS[kind][0]).save_pretrained(folder)
    return model


def decoder_tokenizer(kind: str) -> Any:
    """A tokenizer trained on one sentence, which divides texts as the real ones do."""
    tokenizer = _sentencepiece() if kind == "sentencepiece" else _bytes(kind)
    if kind in ("llama-bpe", "sentencepiece"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    tokenizer.add_tokens([AddedToken("[TOOL]", normalized=False)])
    found = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    found.chat_template = TEMPLATES["chatml"]
    return found


def _bytes(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(token_models.BPE(ignore_merges=kind == "llama-bpe"))
    pattern = {"llama-bpe": _LLAMA3, "smaug-bpe": _LLAMA3, "qwen2": _QWEN2}.get(kind)
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    if kind == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = token_decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS[:2]] * 3, trainer)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(token_models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(TEXTS[:2], trainers.BpeTrainer(vocab_size=160, show_progress=False))
    said = trained.model.__getstate__()
    facts = json.loads(said)
    vocabulary = {token: place for place, token in enumerate([*SPECIAL, *bytes_, *facts["vocab"]])}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in facts["merges"]]
    tokenizer = Tokenizer(token_models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = token_decoders.Sequence(
        [token_decoders.Replace("\u2581", " "), token_decoders.ByteFallback(), token_decoders.Fuse()]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer
