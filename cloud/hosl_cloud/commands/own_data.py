"""What a file of the user's own says about the task: which column is the text, which the label, and which labels."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hosl_edge.data.formats import read_examples
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.tasks import FIELD_NAME, text_of_value

LABEL_NAMES = ("label", "category", "class", "topic", "intent", "sentiment", "target")
TEXT_NAMES = ("text", "message", "sentence", "review", "content", "body", "question")

MOST_LABELS = 100
"""A column with more values is none of labels."""
MOST_ROWS = 100_000
"""Rows that are looked at."""


@dataclass(frozen=True)
class OwnData:
    """A file's two columns that matter, and the labels in it, in order."""

    text_field: str
    label_field: str
    labels: tuple[str, ...]
    rows: int


def look_at(path: Path) -> OwnData:
    """Find the text and the label in a file of examples. Raises DataError, and SettingsError for a doubt."""
    values: dict[str, Counter[str]] = {}
    rows = 0
    for _, example in itertools.islice(read_examples(path), MOST_ROWS):
        rows += 1
        for name, value in example.items():
            if (text := text_of_value(value)) is not None:
                values.setdefault(name, Counter())[text] += 1

    label = _pick_label(values, rows)
    if label is None:
        raise SettingsError("--data", str(path), f"no column of {', '.join(values) or 'none'} holds labels")
    text = _pick_text({name: found for name, found in values.items() if name != label})
    if text is None:
        raise SettingsError("--data", str(path), f"no column beside {label} holds text")
    if not re.fullmatch(FIELD_NAME, text):
        remedy = "its first line should name the columns, that of the text with letters, digits and _ alone"
        raise SettingsError("--data", str(path), remedy)
    return OwnData(text, label, tuple(sorted(values[label])), rows)


def _pick_label(values: dict[str, Counter[str]], rows: int) -> str | None:
    """The column whose name says so, or else the one with the fewest values that come again."""
    few = [name for name, found in values.items() if 2 <= len(found) <= MOST_LABELS]
    named = [name for known in LABEL_NAMES for name in few if name.casefold() == known]
    again = sorted((name for name in few if len(values[name]) <= rows / 2), key=lambda name: len(values[name]))
    return next(iter(named or again), None)


def _pick_text(values: dict[str, Counter[str]]) -> str | None:
    """The column whose name says so, or else the one with the longest texts."""
    named = [name for known in TEXT_NAMES for name in values if name.casefold() == known]
    by_length = sorted(values, key=lambda name: -sum(len(text) * count for text, count in values[name].items()))
    return next(iter(named or by_length), None)
