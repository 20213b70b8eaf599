"""What a merged folder says of itself: code that answers as the two halves do, and the facts that are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from hosl_cloud.exceptions import AdapterError
from hosl_cloud.storage.evaluations import ClassFigures
from hosl_cloud.tail.card import f_string
from hosl_cloud.tail.checkpoint import CheckpointScore, record_score, save_checkpoint
from hosl_cloud.tail.merge import Targets, merge_run
from hosl_export.sources.origin import Origin, write_origin
from hosl_protocol.run.tasks import Task, load_preset, preset_names, render
from support import run_card

SHORT = ("w1 w9 good w4", "bad w3", "w17 w2 w2 w8 w5 w30 w31 good", "w6", "w40 w41 bad", "w11 w12 w13")
CLASSES = (
    ClassFigures(name="a|b", examples=6, predicted=5, right=5, accuracy=5 / 6, precision=1.0, f1=10 / 11),
    ClassFigures(name="c", examples=0, predicted=0, right=0, accuracy=None, precision=None, f1=None),
)
LONG = tuple(f"{first} " * 40 + f"{last} " * 40 for first in SHORT[:3] for last in SHORT[3:])
TEXTS = (*SHORT, *LONG)


def merged(bundle: Any, kind: str, tail_train: str, folder: Path, *, has_adapter: bool = False) -> Any:
    """Merge after a few steps; the trainer."""
    trainer = bundle.trainer(kind, train=tail_train, optimizer="adamw", learning_rate=0.05)
    for round_ in (1, 2, 3):
        trainer.forward_backward(*bundle.batch(kind).sent)
        trainer.step(round_, 1.0)
    checkpoint = save_checkpoint(folder / "checkpoints", 3, 1, trainer, trainer.config)
    record_score(checkpoint, CheckpointScore(loss=0.25, correct=7, scored=8, macro_f1=0.75))
    adapter = folder / "adapter" if has_adapter else None
    targets = Targets(out=folder / "out", adapter=adapter)
    merge_run(bundle.path, bundle.manifest, bundle.client_weights(), checkpoint, targets, "run-7", CLASSES)
    return trainer


def answers(bundle: Any, trainer: Any, tokenizer: Any, cut_from: str) -> list[str]:
    """What the two halves answer to texts that are cut from the left or from the right."""
    labels, given = trainer.config.task.labels, []
    tokenizer.truncation_side = cut_from
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=trainer.config.max_length).input_ids])
        with torch.no_grad():
            logits = trainer.tail(bundle.client(ids), torch.ones_like(ids))
        given.append(labels[int(logits.reshape(-1, len(labels))[-1].argmax())])
    return given


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "prompt-classification"),
        ("gpt2", "prompt-classification"),
        ("llama", "sequence-classification"),
        ("bert", "sequence-classification"),
    ],
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_the_code_of_the_cards_answers_as_the_halves_do(
    make_bundle: Callable[..., Any], tmp_path: Path, family: str, kind: str
) -> None:
    bundle = make_bundle(family, "lora", "card")
    bundle.save_uncut(tmp_path / "base")
    AutoTokenizer.from_pretrained(bundle.path / "tail").save_pretrained(tmp_path / "base")
    write_origin(bundle.path, Origin(model=str(tmp_path / "base")))
    trainer = merged(bundle, kind, "lora", tmp_path, has_adapter=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    sides = ("left", "right") if kind == "prompt-classification" else ("right", "left")
    expected, other = (answers(bundle, trainer, tokenizer, side) for side in sides)
    assert len(set(expected)) > 1, "a constant answer would prove nothing"
    assert expected != other, "a card that cuts from the wrong side would not show"
    for folder in ("out", "adapter"):
        classify = run_card(tmp_path / folder)["classify"]
        assert [classify({"text": text}) for text in TEXTS] == expected
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_name_or_path == str(tmp_path / "base")
    assert not (tmp_path / "out" / "origin.json").exists()


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (Origin(model="/models/tiny", license="mit"), {"license": "mit"}),
        (Origin(model="maker/tiny", is_hub_id=True, revision="v2"), {"base_model": "maker/tiny"}),
    ],
)
def test_a_card_names_what_is_known_and_nothing_else(
    make_bundle: Callable[..., Any], tmp_path: Path, origin: Origin, expected: dict[str, str]
) -> None:
    bundle = make_bundle("llama", "lora", "card")
    write_origin(bundle.path, origin)
    merged(bundle, "prompt-classification", "full", tmp_path)
    _, front, text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    common = {"library_name": "transformers", "pipeline_tag": "text-classification", "tags": ["hosl"]}
    assert yaml.safe_load(front) == common | expected
    for line in (
        "what it generates freely may be another word",
        "| cut | after block 1 of 3 |",
        "| algorithm | ho-sfl |",
        "| rounds | 3 of 10 |",
        "| held-out data | accuracy 87.5 % (7 of 8 right), loss 0.2500, macro F1 0.750 |",
        "\n| `a\\|b` | 6 | 83.3 % | 100.0 % | 0.909 |\n| `c` | 0 | - | - | - |\n",
        "| run | `run-7` |",
    ):
        assert line in text
    task = json.loads((tmp_path / "out" / "hosl_task.json").read_text(encoding="utf-8"))
    assert task["verbalizers"] == [" bad", " good"]
    assert task["verbalizer_tokens"] == [2, 3]


def test_an_adapter_on_an_adapter_is_refused(make_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = make_bundle("llama", "lora", "card")
    write_origin(bundle.path, Origin(model="/models/adapter", is_adapter=True))
    with pytest.raises(AdapterError, match="the exported model was an adapter on its base itself"):
        merged(bundle, "prompt-classification", "lora", tmp_path, has_adapter=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


EXAMPLE = {"a": 'one "two"', "b": {"c": "{a}\\n"}, "y": "ß"}


@pytest.mark.parametrize(
    "template", ["{a}", 'say "{a}" \\ {b.c}\n', "it's {y}:\t{a}{a}", "``` {y} ```", "\u2028{y}\U0001f600"]
)
def test_a_template_becomes_python_that_fills_it_in_alike(template: str) -> None:
    task = Task(name="x", kind="lm", template=template)
    assert eval(f_string(template), {"example": EXAMPLE}) == render(task, EXAMPLE)


def test_the_first_field_that_an_example_has_counts() -> None:
    code = f_string("{x|b.c|y}")
    assert eval(code, {"example": EXAMPLE}) == EXAMPLE["b"]["c"]  # type: ignore[index]
    assert eval(code, {"example": {"y": "1"}}) == "1"


def test_every_shipped_template_becomes_python() -> None:
    for name in preset_names():
        compile(f_string(load_preset(name).get("template", "")), name, "eval")
