"""A Llama and a BERT of four blocks with random weights, and their tokenizer, as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import WORDS


def save_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> dict[str, Any]:
    """Write a tokenizer of these words; what a model's configuration must say to fit it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return {"vocab_size": len(vocabulary), "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def save_tiny_llama(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """Write a Llama of 4 blocks, width 32, random weights, with a word-level tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(exist_ok=True)
    said = save_tokenizer(folder, words)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = LlamaConfig(**SIZES, **said, num_key_value_heads=2, tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_tiny_bert(folder: Path) -> Path:
    """Write it."""
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir()
    words = save_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        BertModel(BertConfig(**SIZES, **words)).save_pretrained(folder)
    return folder
