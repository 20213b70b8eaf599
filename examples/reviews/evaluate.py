"""Accuracy of a causal language model on reviews, with plain transformers code and nothing of hosl.

python examples/reviews/evaluate.py MODEL HELD_OUT.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

PROMPT = "{text} It was"
ANSWERS = (" terrible", " great")


def accuracy(model_path: Path, held_out: Path) -> float:
    """Share of reviews whose right answer is the likelier next token. `model_path`: a folder, or a .gguf file."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(model_path)}
    if model_path.suffix == ".gguf":
        source = {"pretrained_model_name_or_path": str(model_path.parent), "gguf_file": model_path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    answers = [tokenizer(answer, add_special_tokens=False).input_ids for answer in ANSWERS]
    assert all(len(ids) == 1 for ids in answers)
    examples = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    right = 0
    with torch.inference_mode():
        for example in examples:
            inputs = tokenizer(PROMPT.format(text=example["text"]), return_tensors="pt")
            logits = model(**inputs, logits_to_keep=1).logits[0, -1]
            right += int(logits[[ids[0] for ids in answers]].argmax()) == example["label"]
    return right / len(examples)


if __name__ == "__main__":
    print(f"{100 * accuracy(Path(sys.argv[1]), Path(sys.argv[2])):.1f} %")
