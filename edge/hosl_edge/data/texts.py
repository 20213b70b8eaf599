"""Texts for a run: each example of a file as its task renders it, tokenized.

Errors name the file and the line, never the text.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from hosl_edge.data.answers import AnswerTokenizer
from hosl_edge.data.datasets import TextDataset
from hosl_edge.data.formats import CSV_ENDINGS, Place, Places, read_examples
from hosl_edge.data.long_texts import LongTexts
from hosl_edge.data.records import warn_of_absent, warn_once
from hosl_edge.exceptions import DataError, UnservedError
from hosl_protocol.exceptions import HoslError, SettingsError
from hosl_protocol.run.chat import TextForm, load_form
from hosl_protocol.run.manifest import SHARD_TOKENIZER, SHORTEST_TEXT, BundleError, Manifest
from hosl_protocol.run.tasks import Task, is_blank, label_of, look_up, render

PORTION_TEXTS = 256
PORTION_CHARACTERS = 200_000
"""Of texts that are tokenized together; their encodings take a hundred times the bytes."""


@contextlib.contextmanager
def opened_tokenizer(shard: Path, task: Task) -> Iterator[tuple[Tokenizer, TextForm | None]]:
    """Load a shard's tokenizer, and the form of answers where `task` scores them. Raises BundleError.

    What the tokenizer's library raises within is a BundleError too: its own root, or a panic, which is no Exception.
    """
    path = shard / SHARD_TOKENIZER
    try:
        yield Tokenizer.from_file(str(path)), load_form(shard) if task.scores_answers else None
    except (HoslError, MemoryError, KeyboardInterrupt, SystemExit, OSError):
        raise
    except BaseException as error:
        raise BundleError(f"{path} cannot be used ({error}): delete it and start again to fetch it") from error


@dataclass(frozen=True)
class Texts:
    """A file's examples as a run reads them, and where they come from."""

    dataset: TextDataset
    places: Places
    cut: list[int]
    """Indices of the examples that were longer."""


def load_texts(
    path: Path, task: Task, tokenizer: Tokenizer, max_length: int, manifest: Manifest, text_form: TextForm | None = None
) -> TextDataset:
    """Read and tokenize a file, as `read_texts` does, and say which examples are cut."""
    texts = read_texts(path, task, tokenizer, max_length, manifest, text_form)
    if texts.cut:
        first = texts.places[texts.cut[0]].within(path)
        cut = f"examples of more than {max_length} tokens, which are cut: {len(texts.cut)}"
        warn_once(f"{path}: {cut}, the first in {first}")
    return texts.dataset


def read_texts(
    path: Path, task: Task, tokenizer: Tokenizer, max_length: int, manifest: Manifest, text_form: TextForm | None = None
) -> Texts:
    """Read and tokenize a file; `max_length` counts the soft prompt, and `text_form` says how answers end.

    Raises DataError with file and line, and UnservedError where `max_length` has no room for a text.
    """
    prompt_tokens, pad_token_id = manifest.prompt_tokens, manifest.pad_token_id
    # A tokenizer cannot cut a text to less than the special tokens that it puts around it.
    if max_length < (fewest := prompt_tokens + tokenizer.num_special_tokens_to_add(is_pair=False)):
        remedy = f"the tokenizer's special tokens and the soft prompt take {fewest} places: use more"
        raise UnservedError(SettingsError("max_length", max_length, remedy))
    if task.scores_answers:
        assert text_form is not None
        return _read_answers(path, task, tokenizer, max_length, manifest, text_form)
    places, labels, blank = Places(), [], []

    # A generator: the texts of a large file are never in memory together, their ids are.
    def texts() -> Iterator[str]:
        for place, example in read_examples(path):
            text = _text_of(task, example, place)
            if not task.scores_tokens:
                labels.append(_label_of(task, example, place))
            places.append(place)
            if is_blank(task, text):
                blank.append(place)
            yield text

    keep_end = task.kind == "prompt-classification"
    rows, cut = tokenize(tokenizer, texts(), max_length - prompt_tokens, keep_end=keep_end)
    if not rows:
        raise DataError(path, None, "holds no examples")

    if _ends_before_padding(task, manifest):
        rows = [without_end_padding(row, pad_token_id) for row in rows]
    for index, row in enumerate(rows):
        if row.size < (2 if task.scores_tokens else 1):
            raise places[index].error(f"the text comes to {row.size} tokens, which is too few to learn from")
    _check_tokens(places, rows, tokenizer, manifest)

    if blank:
        warn_once(f"{path}: examples without text: {len(blank)}, the first in {blank[0].within(path)}")
    warn_of_absent(path, task, labels)

    label_array = None if task.scores_tokens else np.array(labels, np.int32)
    return Texts(_dataset(rows, manifest, label_array), places, cut)


def _read_answers(
    path: Path, task: Task, tokenizer: Tokenizer, max_length: int, manifest: Manifest, text_form: TextForm
) -> Texts:
    """Read and tokenize a file of prompts with completions, or of conversations; as `read_texts`."""
    if task.kind == "chat" and text_form.chat is None:
        remedy = "the model has no chat template that a device can follow: use the kind 'completion', or another model"
        raise UnservedError(SettingsError("task.kind", task.kind, remedy))
    end_id = None if text_form.end is None else tokenizer.token_to_id(text_form.end)
    answers = AnswerTokenizer(task, tokenizer, max_length - manifest.prompt_tokens, end_id, text_form.chat)

    places, texts = Places(), []
    for place, example in read_examples(path):
        with _named_errors(example, place):
            texts.append(answers.tokenize(example))
        places.append(place)
        if texts[-1].ids.size < SHORTEST_TEXT:
            problem = f"the text comes to {texts[-1].ids.size} tokens, which is too few to learn from"
            raise place.error(problem)
    if not texts:
        raise DataError(path, None, "holds no examples")

    rows = [text.ids for text in texts]
    _check_tokens(places, rows, tokenizer, manifest)
    silent = [index for index, text in enumerate(texts) if not text.is_answer[1:].any()]
    if silent:
        first = places[silent[0]].within(path)
        warn_once(f"{path}: examples with nothing to learn: {len(silent)}, the first in {first}")
    dataset = _dataset(rows, manifest, is_answer=[text.is_answer for text in texts])
    return Texts(dataset, places, [index for index, text in enumerate(texts) if text.is_cut])


def _dataset(
    rows: list[npt.NDArray[np.int32]],
    manifest: Manifest,
    labels: npt.NDArray[np.int32] | None = None,
    is_answer: list[npt.NDArray[np.bool_]] | None = None,
) -> TextDataset:
    """Put the texts together, each behind the places of a soft prompt."""
    # The graph puts its prompt in the place of these.
    places = np.full(manifest.prompt_tokens, manifest.pad_token_id, np.int32)
    if places.size:
        rows = [np.concatenate([places, row]) for row in rows]
    offsets = np.concatenate([[0], np.cumsum([row.size for row in rows])]).astype(np.int64)
    flags = None
    if is_answer is not None:
        flags = np.concatenate([np.concatenate([np.zeros(places.size, bool), row]) for row in is_answer])
    return TextDataset(np.concatenate(rows), offsets, labels, manifest.pad_token_id, flags)


def tokenize(
    tokenizer: Tokenizer, texts: Iterable[str], max_length: int, *, keep_end: bool
) -> tuple[list[npt.NDArray[np.int32]], list[int]]:
    """Make token ids of each text, special tokens included, cut to `max_length`; and tell which texts were longer.

    `keep_end` drops from the left, for a prompt whose question stands at the end. Memory is that of a portion of
    texts, or of one text that must be tokenized whole.
    """
    long_texts = LongTexts(tokenizer, max_length, keep_end=keep_end)
    rows: list[npt.NDArray[np.int32]] = []
    cut: list[int] = []

    def flush(portion: list[str]) -> None:
        # Each time anew, for LongTexts switches truncation off on the same tokenizer.
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length, direction="left" if keep_end else "right")
        for encoding in tokenizer.encode_batch_fast(portion):
            if encoding.overflowing:
                cut.append(len(rows))
            rows.append(np.array(encoding.ids, np.int32))
        portion.clear()

    portion: list[str] = []
    for text in texts:
        portion.append(long_texts.shorten(text))
        if sum(map(len, portion)) >= PORTION_CHARACTERS or len(portion) == PORTION_TEXTS:
            flush(portion)
    flush(portion)
    return rows, cut


def _check_tokens(places: Places, rows: list[npt.NDArray[np.int32]], tokenizer: Tokenizer, manifest: Manifest) -> None:
    """Raise DataError for a text with a token that the model has no embedding for: a special one, written out."""
    # One look at all ids; the row is only searched for where there is one.
    tokens = manifest.tokens
    if tokens is None or int(np.concatenate(rows).max()) < tokens:
        return
    index, worst = next((index, int(row.max())) for index, row in enumerate(rows) if row.max() >= tokens)
    token = tokenizer.id_to_token(worst)
    problem = f"the text has the special token {token!r}, and the model has no embedding for it: leave it out"
    raise places[index].error(problem)


def _ends_before_padding(task: Task, manifest: Manifest) -> bool:
    """Whether the merged model looks for a text's last token by its id, as transformers' causal classifiers do.

    After a soft prompt, whose texts PEFT hands over as embeddings, they take the last one whatever it is.
    """
    is_causal = "attention_mask" not in manifest.inputs
    return task.kind == "sequence-classification" and is_causal and not manifest.prompt_tokens


def without_end_padding(row: npt.NDArray[np.int32], pad_token_id: int) -> npt.NDArray[np.int32]:
    """Drop the padding's tokens at the end, but for a text of nothing else: what comes after changes nothing."""
    real = np.flatnonzero(row != pad_token_id)
    return row[: real[-1] + 1 if real.size else 1]


def check_first_example(path: Path, task: Task | None) -> int:
    """Count the fields of the first example. Raises DataError where there is none, or `task` has no use for it."""
    place, example = next(read_examples(path), (Place(path, 0), None))
    if example is None:
        raise DataError(path, None, "holds no examples")
    if task is not None:
        if task.kind == "chat":
            with _named_errors(example, place):
                look_up(example, task.messages_field)
            return len(example)
        _text_of(task, example, place)
        if not task.scores_tokens:
            _label_of(task, example, place)
    return len(example)


def _text_of(task: Task, example: Mapping[str, Any], place: Place) -> str:
    with _named_errors(example, place):
        text = render(task, example)
        text.encode()
    return text


@contextlib.contextmanager
def _named_errors(example: Mapping[str, Any], place: Place) -> Iterator[None]:
    """Say of what reading an example raises in which file and line it is."""
    try:
        yield
    except KeyError as error:
        raise _missing(error, example, place) from None
    except UnicodeEncodeError:
        raise place.error("holds half of a surrogate pair, which is no character") from None
    except (TypeError, ValueError) as error:
        raise place.error(str(error)) from None


def _label_of(task: Task, example: Mapping[str, Any], place: Place) -> int:
    try:
        return label_of(task, example)
    except KeyError as error:
        raise _missing(error, example, place) from None
    except ValueError as error:
        raise place.error(f"the label in {task.label_field!r} {error}") from None


def _missing(error: KeyError, example: Mapping[str, Any], place: Place) -> DataError:
    """Make the error for a missing field; names that may be data, as a table without a header has, are not told."""
    field, count = str(error.args[0]), len(example)
    by_folded = {name.strip().casefold(): name for name in example}
    near = difflib.get_close_matches(field.casefold(), by_folded, 1)
    if place.path.name.lower().endswith(CSV_ENDINGS):
        there = f"the first line should name the columns, and names {count} others"
        there += f", of them {by_folded[near[0]]!r}" if near else ""
    else:
        names = [repr(name) for name in example if re.fullmatch(r"[A-Za-z_][\w.-]{0,39}", name)]
        there = f"it has {', '.join(names) or 'none'}" + (" and others" if len(names) < count else "")
    return place.error(f"has no field {field!r}; {there}")
