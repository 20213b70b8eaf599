"""The device's data files as they lie: JSON Lines or CSV in, examples out, and the digest of all of it.

Errors name the file and the line, never the text.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from hosl_edge.data.pictures import visible_files
from hosl_edge.exceptions import DataError
from hosl_protocol.run.tasks import Task

log = logging.getLogger(__name__)


def read_examples(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield line numbers (from 1) and examples of a `.jsonl` or `.csv` file. Raises DataError."""
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
    """Tell semicolons or tabs from commas by the first line: spreadsheets of half of the world write them."""
    bare = re.sub(r'"[^"]*"', "", header)
    return next((delimiter for delimiter in ",;\t" if delimiter in bare), ",")


def check_readable(*paths: Path | None) -> None:
    """Raise DataError for the first that is not there, or may not be read."""
    for path in paths:
        if path is not None:
            try:
                next(path.iterdir(), None) if path.is_dir() else path.open("rb").close()
            except OSError as error:
                raise DataError(path, None, error.strerror or "cannot be read") from error


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


def digest_of_data(path: Path) -> str:
    """Compute the SHA-256 of a data file; of a folder, over its pictures' names and contents. Raises DataError."""
    try:
        return _digest_of(path).hex()
    except OSError as error:
        raise DataError(path, None, error.strerror or "cannot be read") from error


def _digest_of(path: Path) -> bytes:
    digest = hashlib.sha256()
    # By names in order: the order in which a file system lists them is its own.
    if path.is_dir():
        for file_path in visible_files(path)[0]:
            digest.update(file_path.relative_to(path).as_posix().encode() + b"\0" + _digest_of(file_path))
    else:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.digest()
