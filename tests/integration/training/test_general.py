"""Architectures without an entry of their own, from the export to the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import hosl
from support import write_reviews
from tiny import VOCABULARY, make_tokenizer

_BERT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
_COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 48, "pad_token_id": 0}


def roberta() -> Any:
    """Its classifier has a head of two layers, and no pooler."""
    return hf.RobertaModel(hf.RobertaConfig(**_BERT, **_COMMON))


def modernbert() -> Any:
    """Its classifier has a norm in its head."""
    marks = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    return hf.ModernBertModel(hf.ModernBertConfig(**_BERT, **_COMMON, **marks))


@pytest.mark.parametrize(("make", "train"), [(roberta, "lora"), (modernbert, "norm")])
def test_a_classifier_of_an_encoder_is_trained_and_merged(
    traced_once: None, tmp_path: Path, make: Any, train: Any
) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    bundle = hosl.export(str(tmp_path / "model"), split=2, out=tmp_path / "bundle", train=train, gradients=False)
    held_out = write_reviews(tmp_path / "eval.jsonl", 20, 400)
    run = hosl.simulate(
        bundle,
        data=write_reviews(tmp_path / "train.jsonl", 40),
        eval=held_out,
        task={"preset": "sequence-classification"},
        rounds=3,
        batch_size=4,
        max_length=16,
        threads=1,
        client={"learning_rate": 1e-2},
        tail={"learning_rate": 1e-2, "device": "cpu"},
    )
    last = [round_ for round_ in run if round_.evaluation is not None][-1].evaluation
    assert last is not None

    # The folder's own classifier gives what the halves gave.
    run.merge(tmp_path / "merged")
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "merged")
    right = 0
    for line in held_out.read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        with torch.no_grad():
            ids = tokenizer(example["text"], return_tensors="pt", truncation=True, max_length=16).input_ids
            right += int(model(input_ids=ids).logits.argmax()) == int(example["label"])
    assert (right, 20) == (last.right, last.scored)
