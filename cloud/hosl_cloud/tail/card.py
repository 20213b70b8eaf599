"""What a merged folder says of itself: `hosl_task.json`, and a model card with code that answers as the run did."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hosl_cloud.sentences import digits, figures_text, percent, score_text
from hosl_cloud.storage.evaluations import ClassFigures
from hosl_cloud.storage.records import perplexity
from hosl_cloud.tail.checkpoint import CheckpointInfo
from hosl_export.sources.origin import Origin
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.tasks import Task

CARD = "README.md"
TASK = "hosl_task.json"

_MOST_CLASSES = 100
"""Of a task whose classes have a row each."""

_PIPELINES = {
    "prompt-classification": "text-classification",
    "sequence-classification": "text-classification",
    "lm": "text-generation",
    "completion": "text-generation",
    "chat": "text-generation",
    "image-classification": "image-classification",
}
_AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
_NAMES = {
    "prompt-classification": "the token of a word for each label, compared at the end of a prompt",
    "sequence-classification": "a classification head",
    "lm": "the next token",
    "completion": "the tokens that follow a prompt",
    "chat": "the tokens of the assistant's messages",
    "image-classification": "a classification head",
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts that a card is written from."""

    manifest: Manifest
    info: CheckpointInfo
    origin: Origin
    run: str
    """The run's id; empty where it is not known."""
    prompt_folder: str | None
    """Where the folder has its soft prompt, as a PEFT adapter."""
    class_names: Sequence[str] = ()
    """Of a classification head, as the config has them."""
    pad_token_id: int | None = None
    """What the config of a classifier of texts has."""
    classes: Sequence[ClassFigures] = ()
    """How the held-out examples of each class fared, where that is known."""

    @property
    def task(self) -> Task:
        """The run's task."""
        return self.info.config.task

    @property
    def title(self) -> str:
        """What the card is headed."""
        return f"{self.manifest.model}, fine-tuned for {self.task.name}"

    @property
    def text_tokens(self) -> int:
        """Tokens of the longest text, without a soft prompt."""
        return self.info.config.max_length - self.manifest.prompt_tokens


def write_card(folder: Path, facts: Facts, *, is_adapter: bool = False) -> None:
    """Write the task and the card of a merged model, or of a PEFT adapter for the model that it was made from."""
    (folder / TASK).write_text(json.dumps(_task_facts(facts), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CARD).write_text(_card(facts, is_adapter=is_adapter), encoding="utf-8")


def _task_facts(facts: Facts) -> dict[str, Any]:
    """Collect the task, and what else must be known to put a question as the run did."""
    task = {name: value for name, value in msgspec.to_builtins(facts.task).items() if value}
    if facts.info.head_rows:
        task["verbalizer_tokens"] = list(facts.info.head_rows)
    if not facts.task.is_image:
        task |= {"max_length": facts.text_tokens, "truncation_side": _cut_side(facts.task)}
    return task


def _cut_side(task: Task) -> str:
    return "left" if task.kind == "prompt-classification" else "right"


def _card(facts: Facts, *, is_adapter: bool) -> str:
    code = _code_for(facts, is_adapter=is_adapter)
    parts = [
        _front_matter(facts, is_adapter=is_adapter),
        f"# {facts.title}\n",
        _opening(facts, is_adapter=is_adapter),
        "## How to use it\n",
        f"{_remark(facts)}\n",
        _fenced(code, "python"),
        "## Training\n",
        _table(facts),
    ]
    if 0 < len(facts.classes) <= _MOST_CLASSES:
        parts += ["## Held-out data, class by class\n", _class_table(facts.classes)]
    return "\n".join(parts)


def _front_matter(facts: Facts, *, is_adapter: bool) -> str:
    """Write YAML, of which JSON's strings are a part. A license stands here only where the source names one."""
    lines = [f"library_name: {'peft' if is_adapter else 'transformers'}"]
    lines.append(f"pipeline_tag: {_PIPELINES[facts.task.kind]}")
    if facts.origin.is_hub_id:
        lines.append(f"base_model: {json.dumps(facts.origin.model)}")
    if facts.origin.license is not None:
        lines.append(f"license: {json.dumps(facts.origin.license)}")
    return "\n".join(["---", *lines, "tags:", "- hosl", "---", ""])


def _opening(facts: Facts, *, is_adapter: bool) -> str:
    manifest, version = facts.manifest, importlib.metadata.version("hosl")
    what = f"A PEFT adapter for `{manifest.model}`" if is_adapter else f"`{manifest.model}`"
    split = f"its first {manifest.split} of {manifest.blocks} blocks on the devices that hold the data"
    return f"{what}, trained by hosl {version}: {split}, the others in the cloud.\n"


def _remark(facts: Facts) -> str:
    if facts.task.kind == "prompt-classification":
        words = ", ".join(f"{_code(label)}: {_code(repr(word))}" for label, word in _words(facts.task))
        remark = (
            f"The words for the labels are {words}. Training compared these words alone, after the template of the "
            "task. Nothing taught the model to prefer them to all others: what it generates freely may be another word."
        )
    elif facts.task.has_class_head:
        remark = "The labels are " + ", ".join(_code(name) for name in facts.class_names) + "."
    else:
        remark = "It goes on with a text, as its base model does."

    if facts.task.template not in ("", "{text}"):
        remark += f" The template is in `{TASK}`; its fields are given as text."
    if facts.prompt_folder is not None:
        remark += f" Its soft prompt is a PEFT adapter in `{facts.prompt_folder}/`, without which it is another model."
    return remark


def _words(task: Task) -> list[tuple[str, str]]:
    return list(zip(task.labels, task.verbalizers, strict=True))


def _table(facts: Facts) -> str:
    manifest, config, origin = facts.manifest, facts.info.config, facts.origin
    revision = f", revision {_code(origin.revision)}" if origin.revision else ""
    rows = {
        "base model": f"{_code(manifest.model)}{revision}",
        "task": f"{_code(facts.task.name)}: {_NAMES[facts.task.kind]}",
        "cut": f"after block {manifest.split} of {manifest.blocks}",
        "algorithm": config.algorithm,
        "trained on the devices": manifest.train,
        "trained in the cloud": config.tail.train,
        "rounds": f"{facts.info.round} of {config.rounds}",
        "held-out data": _score(facts),
        "run": _code(facts.run) if facts.run else "",
        "trained by": f"hosl {importlib.metadata.version('hosl')}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _class_table(classes: Sequence[ClassFigures]) -> str:
    rows = [
        f"| {_code(each.name)} | {each.examples} | {percent(each.accuracy)} | {percent(each.precision)} "
        f"| {digits(each.f1)} |"
        for each in classes
    ]
    return "\n".join(["| class | examples | accuracy | precision | F1 |", "|---|---|---|---|---|", *rows, ""])


def _score(facts: Facts) -> str:
    metrics = facts.info.metrics
    if metrics is None or not metrics.scored:
        return "not evaluated at this round"
    share = score_text(metrics.correct, metrics.scored, metrics.examples, metrics.of_examples)
    what = "next tokens right" if facts.task.scores_tokens else "accuracy"
    more = figures_text(metrics.macro_f1, perplexity(metrics.loss, facts.task.kind))
    return f"{what} {share}, loss {metrics.loss:.4f}{more}"


def _code(text: str) -> str:
    """Quote text as inline code, also in a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _fenced(code: str, language: str) -> str:
    fence = "`" * max(3, max(map(len, re.findall("`+", code)), default=0) + 1)
    return f"{fence}{language}\n{code}\n{fence}\n"


def _code_for(facts: Facts, *, is_adapter: bool) -> str:
    """Write a program that answers an example as the run's evaluation did, to be run where the card is."""
    imports, load = _loading(facts, is_adapter=is_adapter)
    if facts.task.is_image:
        body = _IMAGE if not is_adapter else _IMAGE_ADAPTER
    elif facts.task.kind == "chat":
        body = _CHAT
    elif facts.task.scores_tokens:
        body = _LM
    elif facts.task.kind == "prompt-classification":
        answers = dict(zip(facts.task.labels, facts.info.head_rows, strict=True))
        body = _PROMPT.replace("ANSWERS", json.dumps(answers, ensure_ascii=False))
    else:
        body = _CLASSES if is_adapter or facts.prompt_folder is not None else _PIPELINE
    body = body.replace("LENGTH", str(facts.text_tokens)).replace("TEXT", f_string(facts.task.template))
    return "\n".join([*imports, "", 'folder = "."  # where this card is', *load, body.strip("\n")])


def _loading(facts: Facts, *, is_adapter: bool) -> tuple[list[str], list[str]]:
    """Write the imports, and the lines that load the model and its tokenizer."""
    kind, auto = facts.task.kind, _AUTO.get(facts.task.kind, "AutoModelForCausalLM")
    if facts.task.has_class_head and not is_adapter and facts.prompt_folder is None:
        return ["from transformers import pipeline"], []

    place, more = "folder", ""
    if is_adapter:
        place, more = "base", facts.origin.loading_options
        if facts.task.has_class_head:
            # A head of another size makes room for the adapter's.
            more += f", num_labels={len(facts.class_names)}, ignore_mismatched_sizes=True"
            more += "" if facts.pad_token_id is None else f", pad_token_id={facts.pad_token_id}"

    side = ', truncation_side="left"' if kind == "prompt-classification" else ""
    reader = "AutoImageProcessor" if facts.task.is_image else "AutoTokenizer"
    name = "processor" if facts.task.is_image else "tokenizer"
    read = f"{name} = {reader}.from_pretrained({place}{facts.origin.loading_options if is_adapter else ''}{side})"
    load = [f"base = {json.dumps(facts.origin.model)}"] if is_adapter else []
    load += [read, f"model = {auto}.from_pretrained({place}{more})"]
    imports = ["import torch", f"from transformers import {', '.join(sorted((auto, reader)))}"]

    adapter = (
        "folder" if is_adapter else None if facts.prompt_folder is None else f'f"{{folder}}/{facts.prompt_folder}"'
    )
    if adapter is not None:
        imports.insert(1, "from peft import PeftModel")
        load.append(f"model = PeftModel.from_pretrained(model, {adapter})")
    if is_adapter and facts.task.has_class_head:
        load.append(f"labels = {json.dumps(list(facts.class_names), ensure_ascii=False)}")
    elif facts.task.has_class_head:
        load.append("labels = list(model.config.id2label.values())")
    return imports, [*load, "model.eval()"]


_PROMPT = """
answers = ANSWERS  # each label's word, as a token


def classify(example):
    text = TEXT
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=LENGTH, return_token_type_ids=False)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    return max(answers, key=lambda label: logits[answers[label]].item())
"""

_PIPELINE = """
pipe = pipeline("text-classification", model=folder)


def classify(example):
    text = TEXT
    return pipe(text, truncation=True, max_length=LENGTH)[0]["label"]
"""

_CLASSES = """

def classify(example):
    text = TEXT
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=LENGTH, return_token_type_ids=False)
    with torch.no_grad():
        return labels[model(**inputs).logits[0].argmax().item()]
"""

_IMAGE = """
pipe = pipeline("image-classification", model=folder)


def classify(image):  # a file's name, or an image of Pillow's
    return pipe(image)[0]["label"]
"""

_IMAGE_ADAPTER = """

def classify(image):  # an image of Pillow's
    inputs = processor(image, return_tensors="pt")
    with torch.no_grad():
        return labels[model(**inputs).logits[0].argmax().item()]
"""

_LM = """

def go_on(example, tokens=40):
    text = TEXT
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return tokenizer.decode(model.generate(**inputs, max_new_tokens=tokens)[0], skip_special_tokens=True)
"""

_CHAT = """

def answer(messages, tokens=200):
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=tokens)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)
"""

_FIELD = re.compile(r"\{([^{}]*)\}")


def f_string(template: str) -> str:
    """Python that fills in a task's template from `example`."""
    pieces, end = [], 0
    for match in _FIELD.finditer(template):
        pieces += [json.dumps(template[end : match.start()], ensure_ascii=False)[1:-1], "{" + _look_up(match[1]) + "}"]
        end = match.end()
    return f'f"{"".join(pieces)}{json.dumps(template[end:], ensure_ascii=False)[1:-1]}"'


def _look_up(names: str) -> str:
    """The first of the fields `one|other.inner` that an example has."""
    name, _, others = names.partition("|")
    parts = name.split(".")
    found = "example" + "".join(f"['{part}']" for part in parts)
    return f"{found} if '{parts[0]}' in example else {_look_up(others)}" if others else found
