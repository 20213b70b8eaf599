"""Whole runs of the tasks beside prompts, cloud and devices in this process, up to the merged folder."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hosl_cloud.__main__ import main as cloud_main
from hosl_cloud.storage.records import Evaluation
from hosl_edge import ConsentError, EdgeSettings, Summary, run_agent
from hosl_protocol.run.manifest import load_manifest
from services import Service, serving
from support import count_right_by_card, run_card, write_reviews

NAMES = ("pi-1", "pi-2")
ROUNDS = 40


def configure(task: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "task": task,
        "rounds": ROUNDS,
        "seed": 5,
        "batch_size": 8,
        "max_length": 16,
        "report_every": 10,
        "client": {"learning_rate": 0.01},
        "tail": {"learning_rate": 3e-3, "device": "cpu"},
        "devices": {"start_with": 2},
        **more,
    }


def device_settings(service: Service, name: str, change: Callable[[Path], None], **more: Any) -> EdgeSettings:
    number = int(name[-1])
    folder = service.folder.parent
    data = write_reviews(folder / f"{name}-train.jsonl", 40, 40 * number)
    held_out = write_reviews(folder / f"{name}-eval.jsonl", 10, 400 + 10 * number)
    for path in (data, held_out):
        change(path)
    return EdgeSettings(
        server=service.address,
        token_file=str(service.token_file),
        data=str(data),
        eval=str(held_out),
        name=name,
        threads=1,
        state_dir=str(folder / "state"),
        cache_dir=str(folder / "cache"),
        **more,
    )


def train(
    bundle: Path,
    folder: Path,
    settings: dict[str, Any],
    change: Callable[[Path], None] = lambda path: None,
    **device: Any,
) -> tuple[list[Summary], list[Evaluation]]:
    """A run of two devices to its end, whose files of reviews were changed; what they say, and the evaluations."""

    async def run() -> tuple[list[Summary], list[Evaluation]]:
        async with serving(bundle, folder / "cloud", settings) as service:
            agents = [run_agent(device_settings(service, name, change, **device)) for name in NAMES]
            summaries = await asyncio.wait_for(asyncio.gather(*agents), 60.0)
            assert await service.serving == "completed"
            return summaries, await asyncio.to_thread(service.coordinator.store.evaluations, "run-1")

    summaries, evaluations = asyncio.run(run())
    assert len({evaluation.held_out for evaluation in evaluations}) == 1, "all score the same data"
    return summaries, [dataclasses.replace(evaluation, held_out="") for evaluation in evaluations]


def merge(folder: Path) -> Path:
    options = ["--data-dir", str(folder / "cloud"), "--out", str(folder / "merged"), "--checkpoint", "last"]
    assert cloud_main(["merge", "run-1", *options]) == 0
    return folder / "merged"


def held_out(folder: Path) -> list[dict[str, Any]]:
    files = [folder / f"{name}-eval.jsonl" for name in NAMES]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def score(
    logits_and_targets: list[tuple[torch.Tensor, torch.Tensor]], round_: int, macro_f1: float | None = None
) -> Any:
    """What plain transformers code finds, as an evaluation that may differ in the last digits of the loss."""
    logits = torch.cat([logits for logits, _ in logits_and_targets])
    targets = torch.cat([targets for _, targets in logits_and_targets])
    loss = cross_entropy(logits, targets).item()
    correct = int((logits.argmax(-1) == targets).sum())
    of = len(logits_and_targets)
    loss_ = pytest.approx(loss, rel=1e-3)
    return Evaluation(round_, loss_, correct, len(targets), of, of, macro_f1=macro_f1)  # type: ignore[arg-type]


def test_a_language_model_learns_the_devices_texts_and_merges(
    export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    bundle = export_bundle(tiny_model, "lora", 2)
    summaries, evaluations = train(bundle, tmp_path, configure({"preset": "lm"}), share_text=True)
    assert [summary.rounds for summary in summaries] == [ROUNDS, ROUNDS]
    assert summaries[0].weights_digest == summaries[1].weights_digest != ""
    assert evaluations[-1].loss < evaluations[0].loss - 0.5
    merged = merge(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged).eval(), AutoTokenizer.from_pretrained(merged)
    scored = []
    for example in held_out(tmp_path):
        ids = tokenizer(example["text"], return_tensors="pt").input_ids
        with torch.no_grad():
            scored.append((model(input_ids=ids).logits[0, :-1], ids[0, 1:]))
    assert evaluations[-1] == score(scored, ROUNDS)
    assert run_card(merged)["go_on"]({"text": "the film was"}, tokens=3).startswith("the film was ")


def test_a_completion_is_learned_behind_its_prompt(
    export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    bundle = export_bundle(tiny_model, "lora", 2)
    task = {"name": "mine", "kind": "completion", "template": "the film {label}", "completion": " {text}"}
    consent = {"fields": ("label", "text"), "share_fields": ("text",)}
    summaries, evaluations = train(bundle, tmp_path, configure(task), **consent)
    assert summaries[0].weights_digest == summaries[1].weights_digest != ""
    assert evaluations[-1].loss < evaluations[0].loss - 0.5

    merged = merge(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged).eval(), AutoTokenizer.from_pretrained(merged)
    scored = []
    for example in held_out(tmp_path):
        prompt = tokenizer(f"the film {example['label']}").input_ids
        answer = [*tokenizer(" " + example["text"]).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        scored.append((logits[len(prompt) - 1 : -1], torch.tensor(answer)))
    assert evaluations[-1] == score(scored, ROUNDS)
    assert run_card(merged)["go_on"]({"label": 1}, tokens=3).startswith("the film ")


TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' if m.role == 'user' else ' the ' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' </s> ' }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %} the {% endif %}"
)


def test_of_conversations_the_assistants_answers_are_learned(
    export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    speaking = tmp_path / "speaking"
    shutil.copytree(tiny_model, speaking)
    tokenizer = AutoTokenizer.from_pretrained(speaking)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(speaking)
    bundle = export_bundle(speaking, "lora", 2)

    def converse(path: Path) -> None:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        talks = [
            [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["text"].split()[-1]}]
            for row in rows
        ]
        path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")

    summaries, evaluations = train(bundle, tmp_path, configure({"preset": "chat"}), converse, share_text=True)
    assert summaries[0].weights_digest == summaries[1].weights_digest != ""
    assert evaluations[-1].loss < evaluations[0].loss - 0.5

    merged = merge(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged).eval(), AutoTokenizer.from_pretrained(merged)
    scored = []
    for example in held_out(tmp_path):
        found = tokenizer.apply_chat_template(
            example["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(input_ids=found["input_ids"]).logits[0, :-1]
        is_answer = torch.as_tensor(found["assistant_masks"]).reshape(-1)[1:].bool()
        scored.append((logits[is_answer], found["input_ids"][0, 1:][is_answer]))
    assert evaluations[-1] == score(scored, ROUNDS)
    messages = [{"role": "user", "content": "the film was very good"}]
    assert isinstance(run_card(merged)["answer"](messages, tokens=3), str)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # peft's, when it generates
def test_a_soft_prompt_learns_the_devices_texts_and_merges(
    export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    bundle = export_bundle(tiny_model, "prompt", 2)
    prompt = load_manifest(bundle).prompt_tokens
    settings = configure({"preset": "lm"}, max_length=16 + prompt)
    summaries, evaluations = train(bundle, tmp_path, settings, share_text=True)
    assert summaries[0].weights_digest == summaries[1].weights_digest != ""
    assert evaluations[-1].loss < evaluations[0].loss - 0.5
    merged = merge(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(merged), merged / "prompt").eval()
    scored = []
    for example in held_out(tmp_path):
        ids = tokenizer(example["text"], return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        # The last place of the prompt tells the first token.
        scored.append((logits[0, prompt - 1 : -1], ids[0]))
    assert evaluations[-1] == score(scored, ROUNDS)
    assert run_card(merged)["go_on"]({"text": "the film was"}, tokens=3).startswith("the film was ")


def test_an_encoder_learns_to_classify_and_merges(
    export_bundle: Callable[..., Path], tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = export_bundle(tiny_encoder, "lora", 2)
    task = {"preset": "sequence-classification", "labels": ["0", "1"]}
    summaries, evaluations = train(bundle, tmp_path, configure(task, algorithm="hosl"))
    assert summaries[0].weights_digest == summaries[1].weights_digest != ""
    assert evaluations[-1].accuracy >= 0.8 > evaluations[0].accuracy
    said = capsys.readouterr().err
    for own in summaries:
        share = f"{100 * own.right / 10:.1f} % ({own.right} of 10 right)"  # type: ignore[operator]
        assert f"; accuracy on its own held-out data {share} at round {ROUNDS}; peak memory" in said
    assert sum(own.right for own in summaries) == evaluations[-1].correct  # type: ignore[misc]
    merged = merge(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    scored = []
    for example in held_out(tmp_path):
        inputs = tokenizer(example["text"], return_tensors="pt")
        with torch.no_grad():
            scored.append((model(input_ids=inputs.input_ids).logits, torch.tensor([example["label"]])))
    given = [(int(target), int(logits.argmax())) for logits, target in scored]
    f1 = [2 * given.count((k, k)) / sum((label == k) + (said == k) for label, said in given) for k in (0, 1)]
    assert evaluations[-1] == score(scored, ROUNDS, pytest.approx(sum(f1) / 2))
    assert model.config.id2label == {0: "0", 1: "1"}
    files = [tmp_path / f"{name}-eval.jsonl" for name in NAMES]
    assert count_right_by_card(merged, files) == (evaluations[-1].correct, evaluations[-1].scored)


def test_a_device_that_was_not_told_to_share_its_text_does_not(
    export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    async def run() -> None:
        bundle = export_bundle(tiny_model, "lora", 2)
        async with serving(bundle, tmp_path / "cloud", configure({"preset": "lm"})) as service:
            with pytest.raises(ConsentError, match="start hosl-edge with --share-text"):
                await asyncio.wait_for(run_agent(device_settings(service, "pi-1", lambda path: None)), 20.0)
            assert not list((tmp_path / "cache").rglob("*.safetensors")), "it asks before it fetches anything"

    asyncio.run(run())
