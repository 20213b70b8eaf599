"""The device's data: JSON Lines or CSV in, token ids out. Errors name the file and the line, never the text.

Images have a module of their own, `images`; what the rest of the device knows of either kind is at the top here.

Shapes: B examples, T tokens of a batch without padding, L longest example.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from hosl_edge.data.long_texts import LongTexts
from hosl_edge.data.pictures import visible_files
from hosl_edge.exceptions import ConsentError, DataError, UnservedError
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import Task, is_blank, label_of, preset_fields, render

log = logging.getLogger(__name__)

PORTION_TEXTS = 256
PORTION_CHARACTERS = 200_000
"""Of texts that are tokenized together; their encodings take a hundred times the bytes."""


class AnyBatch(Protocol):
    """Some examples, texts or images, neighbours alike in length."""

    @property
    def lengths_B(self) -> npt.NDArray[np.int32]:
        """Tokens, or positions at the cut layer, of each example."""
        ...

    @property
    def labels_N(self) -> npt.NDArray[np.int32]:
        """What the cloud scores them against."""
        ...

    @property
    def tokens(self) -> int:
        """T: the lengths' sum."""
        ...

    def inputs(self, rows: slice) -> dict[str, npt.NDArray[Any]]:
        """What a graph may take of these examples, by name, contiguous."""
        ...


class AnyDataset(Protocol):
    """Examples of either kind."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, indices: npt.NDArray[np.int64]) -> AnyBatch:
        """The examples at `indices` [B], as they are."""
        ...

    def training_batch(
        self, indices: npt.NDArray[np.int64], settings: RunSettings, round_: int, device: str
    ) -> AnyBatch:
        """The examples at `indices` [B] as `device` trains on them in a round; no state but the data decides."""
        ...

    def evaluation_order(self) -> npt.NDArray[np.int64]:
        """All places, in the order in which held-out data is sent."""
        ...

    def subset(self, places: npt.NDArray[np.int64]) -> AnyDataset:
        """The examples at `places` alone, as data of their own."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int32] | None:
        """Class per example; None where the text is its own label."""
        ...


@dataclass(frozen=True)
class Batch:
    """Some texts, padded on the right, shortest first."""

    ids_BL: npt.NDArray[np.int64]
    lengths_B: npt.NDArray[np.int32]
    labels_N: npt.NDArray[np.int32]
    """Class per example; for `lm` the T token ids themselves."""

    @property
    def tokens(self) -> int:
        """T: tokens without padding."""
        return int(self.lengths_B.sum())

    def inputs(self, rows: slice) -> dict[str, npt.NDArray[Any]]:
        """Token ids and the mask of real ones [b, L], padded to the longest of these rows."""
        lengths_B = self.lengths_B[rows]
        ids_BL = np.ascontiguousarray(self.ids_BL[rows, : int(lengths_B.max())])
        mask_BL = np.arange(ids_BL.shape[1]) < lengths_B[:, None]
        return {"input_ids": ids_BL, "attention_mask": mask_BL.astype(np.int64)}


@dataclass(frozen=True)
class Dataset:
    """Examples as token ids."""

    ids: npt.NDArray[np.int32]
    """All examples, one after the other."""
    offsets: npt.NDArray[np.int64]
    """Where each example starts, and the end: [examples + 1]."""
    labels: npt.NDArray[np.int32] | None
    """[examples]; None for `lm`."""
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """The examples at `indices` [B], sorted by length so that micro-batches carry little padding."""
        lengths = np.diff(self.offsets)[indices]
        order = np.argsort(lengths, kind="stable")
        indices, lengths = indices[order], lengths[order]
        rows = [self.ids[self.offsets[i] : self.offsets[i + 1]] for i in indices]
        ids_BL = np.full((len(rows), int(lengths.max())), self.pad_token_id, np.int64)
        for target, row in zip(ids_BL, rows, strict=True):
            target[: row.size] = row
        labels = np.concatenate(rows) if self.labels is None else self.labels[indices]
        return Batch(ids_BL, lengths.astype(np.int32), labels.astype(np.int32))

    def training_batch(self, indices: npt.NDArray[np.int64], settings: RunSettings, round_: int, device: str) -> Batch:
        """The same as `batch`: texts do not vary."""
        return self.batch(indices)

    def evaluation_order(self) -> npt.NDArray[np.int64]:
        """By length: neighbours make batches with little padding, and the order does not matter."""
        return np.argsort(np.diff(self.offsets), kind="stable")

    def subset(self, places: npt.NDArray[np.int64]) -> Dataset:
        """The examples at `places` [n], copied."""
        rows = [self.ids[self.offsets[place] : self.offsets[place + 1]] for place in places]
        offsets = np.concatenate([[0], np.cumsum(np.diff(self.offsets)[places])]).astype(np.int64)
        labels = None if self.labels is None else self.labels[places]
        return Dataset(np.concatenate(rows), offsets, labels, self.pad_token_id)


def load_dataset(path: Path, task: Task, tokenizer: Tokenizer, max_length: int, manifest: Manifest) -> Dataset:
    """Read and tokenize a file; `max_length` counts the soft prompt.

    Raises DataError with file and line, and UnservedError where `max_length` has no room for a text.
    """
    prompt_tokens, pad_token_id = manifest.prompt_tokens, manifest.pad_token_id
    if max_length < (fewest := prompt_tokens + tokenizer.num_special_tokens_to_add(is_pair=False)):
        remedy = f"the tokenizer's special tokens and the soft prompt take {fewest} places: use more"
        raise UnservedError(SettingsError("max_length", max_length, remedy))
    lines, labels, blank = [], [], []

    def texts() -> Iterator[str]:
        for line, example in read_examples(path):
            text = _text_of(task, example, path, line)
            if task.kind != "lm":
                labels.append(_label_of(task, example, path, line))
            lines.append(line)
            if is_blank(task, text):
                blank.append(line)
            yield text

    rows = tokenize(tokenizer, texts(), max_length - prompt_tokens, keep_end=task.kind == "prompt-classification")
    if not rows:
        raise DataError(path, None, "holds no examples")
    if _ends_before_padding(task, manifest):
        rows = [without_end_padding(row, pad_token_id) for row in rows]
    for line, row in zip(lines, rows, strict=True):
        if row.size < (2 if task.kind == "lm" else 1):
            raise DataError(path, line, f"the text comes to {row.size} tokens, which is too few to learn from")
    _check_tokens(path, lines, rows, tokenizer, manifest)
    if blank:
        warn_once(f"{path}: examples without text: {len(blank)}, the first in line {blank[0]}")
    warn_of_absent(path, task, labels)
    # The graph puts its prompt in the place of these.
    places = np.full(prompt_tokens, pad_token_id, np.int32)
    rows = [np.concatenate([places, row]) for row in rows] if prompt_tokens else rows
    offsets = np.concatenate([[0], np.cumsum([row.size for row in rows])]).astype(np.int64)
    label_array = None if task.kind == "lm" else np.array(labels, np.int32)
    return Dataset(np.concatenate(rows), offsets, label_array, pad_token_id)


def warn_of_absent(path: Path, task: Task, labels: Iterable[int]) -> None:
    """Say which classes of the task no example has: a device may lack some, and should know of it."""
    held = set(labels)
    absent = [label for place, label in enumerate(task.labels) if place not in held]
    if held and absent:
        warn_once(f"{path}: no example of {', '.join(absent)}")


@lru_cache
def warn_once(sentence: str) -> None:
    """Say what data lacks: a device may read it several times."""
    log.warning("%s", sentence)


def tokenize(
    tokenizer: Tokenizer, texts: Iterable[str], max_length: int, *, keep_end: bool
) -> list[npt.NDArray[np.int32]]:
    """Token ids of each text, special tokens included, cut to `max_length`.

    `keep_end` drops from the left, for a prompt whose question stands at the end. Memory is that of a portion of
    texts, or of one text that must be tokenized whole.
    """
    long_texts = LongTexts(tokenizer, max_length, keep_end=keep_end)
    rows: list[npt.NDArray[np.int32]] = []

    def flush(portion: list[str]) -> None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length, direction="left" if keep_end else "right")
        rows.extend(np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch_fast(portion))
        portion.clear()

    portion: list[str] = []
    for text in texts:
        portion.append(long_texts.shorten(text))
        if sum(map(len, portion)) >= PORTION_CHARACTERS or len(portion) == PORTION_TEXTS:
            flush(portion)
    flush(portion)
    return rows


def _check_tokens(
    path: Path, lines: list[int], rows: list[npt.NDArray[np.int32]], tokenizer: Tokenizer, manifest: Manifest
) -> None:
    """Raise DataError for a text with a token that the model has no embedding for: a special one, written out."""
    tokens = manifest.tokens
    if tokens is None or int(np.concatenate(rows).max()) < tokens:
        return
    line, worst = next((line, int(row.max())) for line, row in zip(lines, rows, strict=True) if row.max() >= tokens)
    token = tokenizer.id_to_token(worst)
    problem = f"the text has the special token {token!r}, and the model has no embedding for it: leave it out"
    raise DataError(path, line, problem)


def _ends_before_padding(task: Task, manifest: Manifest) -> bool:
    """Whether the merged model looks for a text's last token by its id, as transformers' causal classifiers do.

    After a soft prompt, whose texts PEFT hands over as embeddings, they take the last one whatever it is.
    """
    is_causal = "attention_mask" not in manifest.inputs
    return task.kind == "sequence-classification" and is_causal and not manifest.prompt_tokens


def without_end_padding(row: npt.NDArray[np.int32], pad_token_id: int) -> npt.NDArray[np.int32]:
    """The tokens up to the last that is not the padding's, or the first alone: what comes after changes nothing."""
    real = np.flatnonzero(row != pad_token_id)
    return row[: real[-1] + 1 if real.size else 1]


def read_examples(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers (from 1) and examples of a `.jsonl` or `.csv` file. Raises DataError."""
    ending = path.suffix.lower()
    if ending not in (".jsonl", ".csv"):
        raise DataError(path, None, "the name should end in .jsonl or .csv")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _read_csv(file, path) if ending == ".csv" else _read_json_lines(file, path)
    except OSError as error:
        raise DataError(path, None, error.strerror or "cannot be read") from error
    except UnicodeDecodeError as error:
        raise DataError(path, None, "is not UTF-8: save it with that encoding") from error


def _read_json_lines(file: Any, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            example = json.loads(text.rstrip())
        except json.JSONDecodeError as error:
            raise DataError(path, line, f"is not JSON ({error.msg} at column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise DataError(path, line, "is JSON with a number too long, or nested too deeply, to be read") from error
        if not isinstance(example, dict):
            raise DataError(path, line, "should be a JSON object")
        yield line, example


def _read_csv(file: Any, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(sys.maxsize)  # a text may be a whole book
    delimiter = _delimiter_of(file.readline())
    file.seek(0)
    reader = csv.DictReader(file, strict=True, delimiter=delimiter)
    try:
        names = reader.fieldnames or ()
        if len(set(names)) != len(names):
            raise DataError(path, reader.line_num, "names two columns alike: the first line should name each column")
        for example in reader:
            if None in example or None in example.values():
                raise DataError(path, reader.line_num, f"should have {len(names)} columns, as the first line has")
            yield reader.line_num, example
    except csv.Error as error:
        shown = {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter]
        raise DataError(path, reader.line_num, f"is not CSV with {shown} ({error})") from error


def _delimiter_of(header: str) -> str:
    """Semicolons or tabs where the first line has them and no comma, as spreadsheets write in half of the world."""
    bare = re.sub(r'"[^"]*"', "", header)
    return next((delimiter for delimiter in ",;\t" if delimiter in bare), ",")


def check_files(*paths: Path | None) -> None:
    """Raise DataError for the first that is not there, or may not be read."""
    for path in paths:
        if path is not None:
            try:
                next(path.iterdir(), None) if path.is_dir() else path.open("rb").close()
            except OSError as error:
                raise DataError(path, None, error.strerror or "cannot be read") from error


def check_first_example(path: Path, task: Task | None) -> int:
    """How many fields the first example has. Raises DataError where it, or `task`, has no use for it."""
    line, example = next(read_examples(path), (0, None))
    if example is None:
        raise DataError(path, None, "holds no examples")
    if task is not None:
        _text_of(task, example, path, line)
        if task.kind != "lm":
            _label_of(task, example, path, line)
    return len(example)


def _text_of(task: Task, example: Mapping[str, Any], path: Path, line: int) -> str:
    try:
        text = render(task, example)
        text.encode()
    except KeyError as error:
        raise _missing(error, example, path, line) from None
    except UnicodeEncodeError:
        raise DataError(path, line, "holds half of a surrogate pair, which is no character") from None
    except TypeError as error:
        raise DataError(path, line, str(error)) from None
    return text


def _label_of(task: Task, example: Mapping[str, Any], path: Path, line: int) -> int:
    try:
        return label_of(task, example)
    except KeyError as error:
        raise _missing(error, example, path, line) from None
    except ValueError as error:
        raise DataError(path, line, f"the label in {task.label_field!r} {error}") from None


def _missing(error: KeyError, example: Mapping[str, Any], path: Path, line: int) -> DataError:
    """Names that may be data, as the first line of a table without a header is, are not told."""
    field, count = str(error.args[0]), len(example)
    by_folded = {name.strip().casefold(): name for name in example}
    near = difflib.get_close_matches(field.casefold(), by_folded, 1)
    if path.suffix.lower() == ".csv":
        there = f"the first line should name the columns, and names {count} others"
        there += f", of them {by_folded[near[0]]!r}" if near else ""
    else:
        names = [repr(name) for name in example if re.fullmatch(r"[A-Za-z_][\w.-]{0,39}", name)]
        there = f"it has {', '.join(names) or 'none'}" + (" and others" if len(names) < count else "")
    return DataError(path, line, f"has no field {field!r}; {there}")


def check_consent(task: Task, fields: tuple[str, ...] | None, *, share_text: bool) -> None:
    """Raise ConsentError where the task reads more than the device allows."""
    if task.kind == "lm" and not share_text:
        raise ConsentError(
            f"task {task.name!r} sends the text itself as labels: start hosl-edge with --share-text to allow it"
        )
    allowed = fields if fields is not None else preset_fields(task.name)
    if allowed is None:
        raise ConsentError(
            f"task {task.name!r} is not one that hosl ships and reads {', '.join(task.fields)}: "
            "name the fields it may read with --fields"
        )
    refused = [field for field in task.fields if field not in allowed]
    if refused:
        raise ConsentError(
            f"task {task.name!r} reads {', '.join(refused)}, this device allows {', '.join(allowed)}: see --fields"
        )


def digest_of_data(path: Path) -> str:
    """SHA-256 of a data file; of a folder, over its pictures' names and contents. Raises DataError."""
    try:
        return _digest_of(path).hex()
    except OSError as error:
        raise DataError(path, None, error.strerror or "cannot be read") from error


def _digest_of(path: Path) -> bytes:
    digest = hashlib.sha256()
    if path.is_dir():
        for file_path in visible_files(path)[0]:
            digest.update(file_path.relative_to(path).as_posix().encode() + b"\0" + _digest_of(file_path))
    else:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.digest()
