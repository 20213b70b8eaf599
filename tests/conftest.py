"""What all tests share: a tiny model with a tokenizer, its bundles, and small data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support import WORDS


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and lose much where cores are few."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 blocks, width 32, random weights, with a word-level tokenizer, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    vocabulary = {word: place for place, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=3,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """A bundle of the tiny model by what trains and where it is cut; made once each."""
    from hosl_export.__main__ import main

    made: dict[tuple[str, int], Path] = {}

    def make(train: str = "lora", split: int = 2) -> Path:
        if (train, split) not in made:
            out = tmp_path_factory.mktemp("bundles") / f"{train}-{split}"
            options = ["--model", str(tiny_model), "--split", str(split), "--train", train, "--max-length", "32"]
            assert main([*options, "--out", str(out)]) == 0
            made[train, split] = out
        return made[train, split]

    return make
