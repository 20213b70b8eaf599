"""Accuracy of a causal language model on reviews, with plain transformers code and nothing of hosl.

python examples/reviews/evaluate.py MODEL HELD_OUT.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve their neighbours

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

PROMPT = "{text} It was"
ANSWERS = (" terrible", " great")
BATCH = 10


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
    examples = [json.loads(line) for line in held_out.read_text(encoding="utf-8-sig").splitlines()]
    examples.sort(key=lambda example: len(example["text"]))
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    right = 0
    with torch.inference_mode():
        for start in range(0, len(examples), BATCH):
            batch = examples[start : start + BATCH]
            prompts = [PROMPT.format(text=example["text"]) for example in batch]
            inputs = tokenizer(prompts, padding=True, return_tensors="pt")
            last = inputs.attention_mask.sum(dim=1) - 1
            logits = model(**inputs).logits[torch.arange(len(batch)), last]
            choices = logits[:, [ids[0] for ids in answers]].argmax(dim=1).tolist()
            right += sum(choice == example["label"] for choice, example in zip(choices, batch, strict=True))
    return right / len(examples)


def main() -> int:
    """Measure one model."""
    parser = argparse.ArgumentParser(description="Accuracy of a causal language model on held-out reviews.")
    parser.add_argument("model", type=Path, help="a Hugging Face folder, or a .gguf file")
    parser.add_argument("held_out", type=Path, help="reviews as .jsonl, with the fields text and label")
    options = parser.parse_args()
    for path in (options.model, options.held_out):
        if not path.exists():
            parser.error(f"{path} does not exist: python examples/reviews/prepare.py makes the reviews")
    print(f"{100 * accuracy(options.model, options.held_out):.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
