"""Tasks: what an example's text or image and its label are. Presets are the TOML files beside this module.

A template holds field names in braces: `{premise}`, dotted `{target.span1_text}`, or `{answer|reply}` for the first of
them that an example has. Fields are looked up strictly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from importlib import resources
from itertools import zip_longest
from typing import Any, Literal

import msgspec

from hosl_protocol.exceptions import SettingsError

TaskKind = Literal["prompt-classification", "sequence-classification", "lm", "image-classification"]

IMAGE_FIELDS = ("images", "labels")
"""What image tasks read of a device's data."""

FIELD_NAME = r"[A-Za-z_][\w.]*"
"""A field's name, as a template takes it."""
_FIELD = re.compile(rf"\{{({FIELD_NAME}(?:\|{FIELD_NAME})*)\}}")


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
    label_names: tuple[str, ...] = ()
    """The same labels as other data spells them, in class order; none, or one for each of `labels`."""

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
        named = (name for names in _FIELD.findall(self.template) for name in names.split("|"))
        return tuple(dict.fromkeys((*named, *label)))


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
    names = (*task.labels, *task.label_names)
    if task.label_names and (len(names) != 2 * len(task.labels) or len(set(names)) != len(names)):
        remedy = f"give another name for each of {list(task.labels)}, or none"
        raise SettingsError("task.label_names", list(task.label_names), remedy)
    if task.kind == "prompt-classification" and len(task.verbalizers) != len(task.labels):
        raise SettingsError("task.verbalizers", list(task.verbalizers), f"give one for each of {list(task.labels)}")


def render(task: Task, example: Mapping[str, Any]) -> str:
    """Make the example's text. Raises KeyError with the name of a missing field, TypeError for one that is no text."""
    return _FIELD.sub(lambda match: _text_of(example, match.group(1)), task.template)


def sample_text(task: Task) -> str:
    """A text of the task, with a word in the place of each field."""
    return _FIELD.sub("text", task.template)


def is_blank(task: Task, text: str) -> bool:
    """Whether a rendered text holds nothing but the template's own words."""
    own = "".join(_FIELD.sub("", task.template).split())
    written = (character for character in text if not character.isspace())  # a text may be long: no copy of it
    return all(mine == other for mine, other in zip_longest(own, written))


def _text_of(example: Mapping[str, Any], names: str) -> str:
    """The first of the fields that the example has, as text."""
    first, *others = names.split("|")
    try:
        field, value = first, look_up(example, first)
    except KeyError:
        if not others:
            raise
        return _text_of(example, "|".join(others))

    text = text_of_value(value)
    if text is None:
        raise TypeError(f"field {field!r} should be text or a number, it is {_kind_of(value)}")
    return text


def text_of_value(value: Any) -> str | None:
    """Make text of a text, a boolean or a finite number; None for all else (protocol/README.md, Run settings).

    A number counts by its value and not by how it was written: 1.0 is `1`, and 1e-7 is `0.0000001`.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        # repr has the fewest digits that give the number back; adding zero takes the sign of -0.0 away.
        return f"{Decimal(repr(value + 0.0)):f}".removesuffix(".0")
    return None


def _kind_of(value: Any) -> str:
    """What JSON calls a value that is no text and no number."""
    if value is None:
        return "null"
    if isinstance(value, float):
        return "a number that is not finite"
    return "an object" if isinstance(value, Mapping) else "a list"


def label_of(task: Task, example: Mapping[str, Any]) -> int:
    """Find the example's class index. Raises KeyError (missing field), or ValueError that says what is wrong."""
    value = look_up(example, task.label_field)
    text = text_of_value(value)
    if text is None:
        raise ValueError(f"should be one of {', '.join(task.labels)}, it is {_kind_of(value)}")

    # A table that had gaps writes 1.0 where 1 was meant.
    for spelling in (text, text.partition(".")[0] if re.fullmatch(r"-?[0-9]+\.0+", text) else text):
        for names in (task.labels, task.label_names):
            if spelling in names:
                return names.index(spelling)

    known = [*task.labels, *task.label_names]
    alike = next((name for name in known if name.casefold() == text.strip().casefold()), None)
    if isinstance(value, bool):
        remedy = ", it is a boolean: name false and true in task.label_names"
    else:
        remedy = f"; it differs from {alike} in case or blanks alone" if alike is not None else ""
    raise ValueError(f"is not one of {', '.join(known)}{remedy}")


def look_up(example: Mapping[str, Any], field: str) -> Any:
    """Look a field up by name, or by dots through nested objects; never attributes. Raises KeyError(field)."""
    # A flat table may have a dot in a column's name.
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
    """Read a shipped preset as a mapping that a run's own `[task]` may override. Raises SettingsError."""
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
