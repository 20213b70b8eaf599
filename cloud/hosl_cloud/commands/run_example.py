"""The run.toml that `hosl-cloud config --example` prints: it works when it is saved, and explains itself."""

from __future__ import annotations

import json
from typing import Any, get_args

import msgspec

from hosl_cloud.commands.own_data import OwnData
from hosl_cloud.settings import convert_config
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.tasks import TOKEN_KINDS, TaskKind, load_preset, preset_names

DEFAULT_KIND = "sequence-classification"
"""What most people want of their own texts: a class for each."""

OWN_LABELS = ("account", "billing", "delivery", "technical")

_HEAD = """\
# Settings of a run, for: hosl-cloud serve --bundle bundle/ --config run.toml
# What has a # before it is the default. All settings: cloud/run-toml.md.

"""

_RUN = """\
name = "first"          # what the run's name begins with
rounds = 200            # in each round every device computes on one batch
# batch_size = 16       # examples of a device in a round
{length}# algorithm = "ho-sfl"  # or "first-order": the exact gradient; "frozen": only the cloud's part learns

"""

_LENGTH = """\
# max_length = 128      # tokens of an example; the rest is cut off
"""

_REST = """\

[tail]                  # the cloud's part of the model
learning_rate = {rate}

[evaluation]            # on what devices name with --eval
# every = 50            # rounds from one to the next; the best one is what hosl-cloud merge takes

[devices]
# start_with = 1        # devices that must be there before the first round
"""

_RATES: dict[TaskKind, str] = {
    "prompt-classification": "2e-5",
    "sequence-classification": "1e-4",
    "lm": "2e-5",
    "completion": "2e-5",
    "chat": "2e-5",
    "image-classification": "1e-3",
}
"""What suits a tail that trains whole: more where its head is new."""


def example_config(task: str = "", own: OwnData | None = None) -> str:
    """Write a run.toml for a task's kind, a preset, or the user's own data. Raises SettingsError for another name."""
    name = task or DEFAULT_KIND
    if name in get_args(TaskKind) and name not in TOKEN_KINDS:
        lines = _own_task(name, own)
    elif own is not None:
        raise SettingsError("--data", name, "a preset has its fields and labels: leave --data out, or name a kind")
    elif name in preset_names():
        lines = _preset(name)
    else:
        known = sorted({*get_args(TaskKind), *preset_names()})
        raise SettingsError("--example", name, f"use one of {', '.join(known)}")

    text = "\n".join(lines) + "\n"
    kind = convert_config(msgspec.toml.decode(text), "--example").task.kind
    length = "" if kind == "image-classification" else _LENGTH
    return _HEAD + _RUN.replace("{length}", length) + text + _REST.replace("{rate}", _RATES[kind])


def _own_task(kind: str, own: OwnData | None) -> list[str]:
    if kind == "image-classification":
        return [
            "[task]                  # pictures: a folder with a folder for each class, or an .npz file",
            f"kind = {_toml(kind)}",
            f"labels = {_toml(own.labels if own else ('cat', 'dog'))}  # the folders' names",
        ]

    text, label = (own.text_field, own.label_field) if own else ("text", "label")
    labels = own.labels if own else OWN_LABELS
    is_prompt = kind == "prompt-classification"
    template = "{" + text + "}" + ("\nTopic:" if is_prompt else "")
    lines = [
        f"[task]                  # a device allows its columns with: hosl-edge --fields {text},{label}",
        f"kind = {_toml(kind)}",
        f"template = {_toml(template)}  # the text of an example; a column's name stands in braces",
        f"label_field = {_toml(label)}  # the column with the class",
        f"labels = {_toml(labels)}  # what stands in it",
    ]
    if is_prompt:
        lines += ["# For each label a word of one token, which the model compares after the template:"]
        lines += [f"verbalizers = {_toml([f' {name}' for name in labels])}"]
    return lines


def _preset(name: str) -> list[str]:
    task = convert_config({"task": {"preset": name}}, name).task
    lines = ["[task]", f"preset = {_toml(name)}", f"# The data's fields: {', '.join(task.fields)}."]
    if task.scores_tokens:
        shown = "--share-text" if task.kind == "lm" else f"--share-fields {','.join(task.shared_fields)}"
        lines.append(f"# Text itself is the label, so a device must agree: hosl-edge {shown}")
        if task.kind == "lm":
            return lines
        own = {name: value for name, value in load_preset(task.name).items() if name not in ("name", "kind")}
        return lines + [f"# {field} = {_toml(value)}" for field, value in own.items()]
    spelled = f", or {', '.join(task.label_names)}" if task.label_names else ""
    lines.append(f"# Labels: {', '.join(task.labels)}{spelled}. Any field below overrides the preset's:")
    return lines + [f"# {field} = {_toml(value)}" for field, value in load_preset(name).items() if field != "name"]


def _toml(value: Any) -> str:
    """A text or a list of texts, as TOML writes it: JSON's strings are TOML's."""
    # Letters as they are: JSON's escapes of those beyond 16 bits are none of TOML's.
    return json.dumps(value, ensure_ascii=False)


def describe_presets() -> list[dict[str, Any]]:
    """Every preset with what a device's data needs, and what an evaluation tells."""
    tasks = [convert_config({"task": {"preset": name}}, name).task for name in preset_names()]
    return [
        {
            "preset": task.name,
            "kind": task.kind,
            "fields": list(task.fields),
            "labels": list(task.labels),
            "label_names": list(task.label_names),
            "metric": "accuracy" if not task.scores_tokens else "accuracy of the next token",
        }
        for task in tasks
    ]
