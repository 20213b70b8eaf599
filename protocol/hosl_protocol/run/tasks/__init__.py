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

TaskKind = Literal[
    "prompt-classification", "sequence-classification", "lm", "completion", "chat", "image-classification"
]

TOKEN_KINDS: tuple[TaskKind, ...] = ("lm", "completion", "chat")
"""Whose labels are tokens of the texts themselves, instead of classes."""

UNSCORED = -1
"""In the place of a token's label: it is part of the text, and not of what the model is to write."""

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
    `completion`: next token, of what is to follow a prompt; `chat`: next token, of the assistant's messages;
    `image-classification`: a trained head scores the classes of an image."""
    template: str = ""
    """Text of an example, with field names in braces, of `completion` the prompt; empty for images and `chat`."""
    completion: str = ""
    """Text that follows the prompt, with field names in braces; only `completion`."""
    messages_field: str = "messages"
    """Field that holds the messages of a conversation; only `chat`."""
    label_field: str = "label"
    """Field that holds the class; only classifications of text."""
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
    def scores_tokens(self) -> bool:
        """Whether the labels are tokens of the text itself, instead of classes."""
        return self.kind in TOKEN_KINDS

    @property
    def scores_answers(self) -> bool:
        """Whether only some of the tokens are labels: a completion's, or an assistant's."""
        return self.kind in ("completion", "chat")

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """The fields whose text goes to the cloud as labels."""
        if self.kind == "chat":
            return (self.messages_field,)
        return _named(self.completion if self.kind == "completion" else self.template) if self.scores_tokens else ()

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field of an example that the task reads, in order, without repetition."""
        if self.is_image:
            return IMAGE_FIELDS
        last = self.shared_fields if self.scores_tokens else (self.label_field,)
        return tuple(dict.fromkeys((*_named(self.template), *last)))


def _named(template: str) -> tuple[str, ...]:
    """The fields that a template names."""
    return tuple(dict.fromkeys(name for names in _FIELD.findall(template) for name in names.split("|")))


def check_task(task: Task) -> None:
    """Raise SettingsError where the task contradicts itself."""
    needed = {"template": not (task.is_image or task.kind == "chat"), "completion": task.kind == "completion"}
    for name, is_needed in needed.items():
        template = getattr(task, name)
        if is_needed and not _FIELD.search(template):
            raise SettingsError(f"task.{name}", template, "name at least one field in braces, such as {text}")
        if template and not is_needed:
            raise SettingsError(f"task.{name}", template, f"the kind {task.kind} has none: leave it out")
        if re.search(r"[{}]", _FIELD.sub("", template)):
            raise SettingsError(f"task.{name}", template, "braces may only enclose a field name")
    if task.kind == "chat" and not re.fullmatch(FIELD_NAME, task.messages_field):
        raise SettingsError("task.messages_field", task.messages_field, "give the name of a field")
    if task.scores_tokens:
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
    """Make the example's text, or its prompt. Raises as `fill` does."""
    return fill(task.template, example)


def fill(template: str, example: Mapping[str, Any]) -> str:
    """Put an example's fields into a template.

    Raises KeyError with the name of a missing field, TypeError for one that is no text.
    """
    return _FIELD.sub(lambda match: _text_of(example, match.group(1)), template)


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
    """Look a field up by name, or by dots through objects and lists; never attributes. Raises KeyError(field)."""
    # A flat table may have a dot in a column's name.
    if field in example:
        return example[field]
    value: Any = example
    for part in field.split("."):
        if isinstance(value, list) and re.fullmatch("[0-9]{1,9}", part) and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            raise KeyError(field)
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
