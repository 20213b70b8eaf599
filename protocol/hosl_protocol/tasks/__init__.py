"""Tasks: what an example's text or image and its label are. Presets are the TOML files beside this module.

A template holds field names in braces, `{premise}` or dotted `{target.span1_text}`; fields are looked up strictly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal

import msgspec

from hosl_protocol.exceptions import SettingsError

TaskKind = Literal["prompt-classification", "sequence-classification", "lm", "image-classification"]

IMAGE_FIELDS = ("images", "labels")
"""What image tasks read of a device's data."""

_FIELD = re.compile(r"\{([A-Za-z_][\w.]*)\}")


class Task(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What an example's text or image is, and what its label means."""

    name: str
    kind: TaskKind
    """`prompt-classification`: the tail scores one verbalizer token per class after the prompt;
    `sequence-classification`: a trained head scores the classes; `lm`: next token, the text is its own label;
    `image-classification`: a trained head scores the classes of an image."""
    template: str = ""
    """Text of an example, with field names in braces; empty for images."""
    label_field: str = "label"
    """Field that holds the label; unused by `lm` and for images."""
    labels: tuple[str, ...] = ()
    """Label values as text, in class order; for images the names of the classes."""
    verbalizers: tuple[str, ...] = ()
    """One token per class, its leading space included; only `prompt-classification`."""

    @property
    def is_image(self) -> bool:
        """Whether examples are images instead of texts."""
        return self.kind == "image-classification"

    @property
    def has_class_head(self) -> bool:
        """Whether a trained head scores the classes, instead of a language model's own."""
        return self.kind in ("sequence-classification", "image-classification")

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field of an example that the task reads, in order, without repetition."""
        if self.is_image:
            return IMAGE_FIELDS
        label = () if self.kind == "lm" else (self.label_field,)
        return tuple(dict.fromkeys((*_FIELD.findall(self.template), *label)))


def check_task(task: Task) -> None:
    """Raise SettingsError where the task contradicts itself."""
    if task.is_image:
        if task.template:
            raise SettingsError("task.template", task.template, "images have no template: leave it out")
    elif not _FIELD.search(task.template):
        raise SettingsError("task.template", task.template, "name at least one field in braces, such as {text}")
    if re.search(r"[{}]", _FIELD.sub("", task.template)):
        raise SettingsError("task.template", task.template, "braces may only enclose a field name")
    if task.kind == "lm":
        return
    if len(task.labels) < 2 or len(set(task.labels)) != len(task.labels):
        raise SettingsError("task.labels", list(task.labels), "list two or more different label values")
    if task.kind == "prompt-classification" and len(task.verbalizers) != len(task.labels):
        raise SettingsError("task.verbalizers", list(task.verbalizers), f"give one for each of {list(task.labels)}")


def render(task: Task, example: Mapping[str, Any]) -> str:
    """The example's text. Raises KeyError with the name of a missing field, TypeError for one that is no text."""
    return _FIELD.sub(lambda match: _text_of(example, match.group(1)), task.template)


def _text_of(example: Mapping[str, Any], field: str) -> str:
    value = look_up(example, field)
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"field {field!r} should be text or a number, it is {type(value).__name__}")
    return str(value)


def label_of(task: Task, example: Mapping[str, Any]) -> int:
    """The example's class index. Raises KeyError (missing field) or ValueError (unknown label, the value)."""
    value = look_up(example, task.label_field)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if text not in task.labels:
        raise ValueError(text)
    return task.labels.index(text)


def look_up(example: Mapping[str, Any], field: str) -> Any:
    """A field by name, or by dots through nested objects; never attributes. Raises KeyError(field)."""
    if field in example:
        return example[field]
    value: Any = example
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(field)
        value = value[part]
    return value


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_preset(name: str) -> dict[str, Any]:
    """A shipped preset as a mapping that a run's own `[task]` may override. Raises SettingsError."""
    if name not in preset_names():
        raise SettingsError("task.preset", name, f"use one of {', '.join(preset_names())}")
    text = (resources.files(__name__) / f"{name}.toml").read_text(encoding="utf-8")
    preset: dict[str, Any] = msgspec.toml.decode(text)
    return {"name": name, **preset}


def preset_fields(name: str) -> tuple[str, ...] | None:
    """The fields that the shipped preset `name` reads; None where no such preset exists."""
    if name not in preset_names():
        return None
    return msgspec.convert(load_preset(name), Task).fields
