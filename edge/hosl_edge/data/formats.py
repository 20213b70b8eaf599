"""Files of examples as they lie: JSON Lines, JSON arrays, CSV and Parquet, packed or in parts, as examples.

A folder is its parts, by name, or what `datasets.save_to_disk` wrote. No file is
read as a whole: of Parquet a group of rows. Errors name the file and the place, never the text.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from hosl_edge.data.pictures import some_of, visible_files
from hosl_edge.exceptions import DataError
from hosl_protocol.program.installing import install_line

_PIECE_CHARACTERS = 1 << 16
_TABLE_ROWS = 256
_SAVED = "state.json"
"""What `datasets.save_to_disk` writes beside its parts."""
_SPLITS = "dataset_dict.json"
"""What it writes beside the folders of several splits."""

Example = Mapping[str, Any]


class Place(NamedTuple):
    """Where an example stands."""

    path: Path
    line: int
    """From 1; of Parquet and `save_to_disk` the row."""

    def error(self, problem: str) -> DataError:
        """Make the error that names it."""
        return DataError(self.path, self.line, problem)

    def within(self, path: Path) -> str:
        """Name it in a sentence about `path`."""
        return f"line {self.line}" if path == self.path else f"line {self.line} of {self.path.name}"


class Places:
    """Where the examples of a large file or folder stand, at eight bytes each."""

    def __init__(self) -> None:
        """Make an empty list."""
        self._paths: list[Path] = []
        self._firsts: list[int] = []
        self._lines = array("q")

    def append(self, place: Place) -> None:
        """Add the next example's."""
        if not self._paths or place.path != self._paths[-1]:
            self._paths.append(place.path)
            self._firsts.append(len(self._lines))
        self._lines.append(place.line)

    def __getitem__(self, index: int) -> Place:
        """Give an example's place. Raises IndexError."""
        line = self._lines[index]
        return Place(self._paths[bisect_right(self._firsts, index) - 1], line)


def read_examples(path: Path) -> Iterator[tuple[Place, Example]]:
    """Yield places and examples of a file, or of the parts in a folder. Raises DataError."""
    for part in parts_of(path):
        with _named_errors(part):
            for line, example in _reader_of(part)(part):
                yield Place(part, line), example


def is_examples(path: Path) -> bool:
    """Whether a path's name is that of a file of examples."""
    return _ending(path) in _READERS


def parts_of(path: Path) -> list[Path]:
    """The files that a path stands for, in order. Raises DataError for a folder of something else."""
    if not path.is_dir():
        return [path]
    try:
        if (path / _SPLITS).exists():
            splits = sorted(each.name for each in path.iterdir() if each.is_dir())
            problem = f"holds the splits {', '.join(splits)}: name one of them, such as {path / splits[0]}"
            raise DataError(path, None, problem if splits else "holds no split")
        if (path / _SAVED).exists():
            return _saved_parts(path)
        files = [file for file in visible_files(path)[1] if file.name.lower() not in ("readme.md", "license")]
    except OSError as error:
        raise DataError(path, None, error.strerror or "cannot be read") from error

    others = [file for file in files if not is_examples(file)]
    if others:
        raise DataError(path, None, f"holds other files than examples: {some_of(others, path)}; take them out")
    if not files:
        raise DataError(path, None, f"holds no file of examples ({_ENDINGS})")
    return files


def _saved_parts(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / _SAVED).read_text(encoding="utf-8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(folder / _SAVED, None, "is not what datasets.save_to_disk writes") from error
    if any(Path(name).name != name for name in names):
        raise DataError(folder / _SAVED, None, "names a file outside its folder")
    return [folder / name for name in names]


def _ending(path: Path) -> str:
    name = path.name.lower()
    return next((ending for ending in _READERS if name.endswith(ending)), "")


def _reader_of(path: Path) -> Callable[[Path], Iterator[tuple[int, Example]]]:
    ending = _ending(path)
    if not ending:
        raise DataError(path, None, f"the name should end in {_ENDINGS}")
    return _READERS[ending]


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Say which file it is that cannot be read, and why."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(path, None, f"is not gzip, or is damaged ({error})") from error
    except OSError as error:
        raise DataError(path, None, error.strerror or "cannot be read") from error
    except UnicodeDecodeError as error:
        raise DataError(path, None, "is not UTF-8: save it with that encoding") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Open a text, packed or not, with or without a byte order mark."""
    with path.open("rb") as file:
        raw: Any = gzip.GzipFile(fileobj=file) if path.name.lower().endswith(".gz") else file
        yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")


def _read_json_lines(path: Path) -> Iterator[tuple[int, Example]]:
    with _opened(path) as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue

            try:
                example = json.loads(text.rstrip())
            except json.JSONDecodeError as error:
                raise DataError(path, line, f"is not JSON ({error.msg} at column {error.colno})") from error
            except (ValueError, RecursionError) as error:
                raise DataError(path, line, _TOO_DEEP) from error
            yield line, _object(path, line, example)


_TOO_DEEP = "is JSON with a number too long, or nested too deeply, to be read"


def _object(path: Path, line: int, example: Any) -> Example:
    if not isinstance(example, dict):
        raise DataError(path, line, "should be a JSON object")
    return example


def _read_json_array(path: Path) -> Iterator[tuple[int, Example]]:
    """Read an array an element at a time: a device may have less memory than the file has bytes."""
    decode = json.JSONDecoder().raw_decode
    with _opened(path) as file:
        text, line, more = file.read(_PIECE_CHARACTERS), 1, _PIECE_CHARACTERS
        place = _skip(_BEFORE, text, 0)
        if not place:
            raise DataError(path, None, "should be a JSON array of objects; with an object a line its name is .jsonl")

        while True:
            start = _skip(_BETWEEN, text, place)
            problem = "it ends within an element"
            try:
                example, end = (None, start) if text[start : start + 1] == "]" else decode(text, start)
            except (ValueError, RecursionError) as error:
                end, problem = len(text), error.msg if isinstance(error, json.JSONDecodeError) else _TOO_DEEP

            if end < len(text):
                line += text.count("\n", place, start)
                if end == start:
                    return
                yield line, _object(path, line, example)
                line += text.count("\n", start, end)
                place, more = end, _PIECE_CHARACTERS
                continue

            # The element may go on. Twice as much each time, so that a long one is not tried again and again.
            piece = file.read(more)
            if not piece:
                raise DataError(path, line + text.count("\n", place, start), f"is not JSON ({problem})")
            text, place, more = text[place:] + piece, 0, 2 * more


_BEFORE, _BETWEEN = re.compile(r"\s*\["), re.compile(r"\s*,?\s*")


def _skip(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    return found.end() if found else place


def _read_csv(path: Path) -> Iterator[tuple[int, Example]]:
    csv.field_size_limit(sys.maxsize)  # a text may be a whole book
    with _opened(path) as file:
        first = file.readline()
        delimiter = "\t" if ".tsv" in path.name.lower() else _delimiter_of(first)
        # Not by seek, which would unpack a packed file from its beginning.
        reader = csv.DictReader(itertools.chain([first], file), strict=True, delimiter=delimiter)
        try:
            names = reader.fieldnames or ()
            if len(set(names)) != len(names):
                problem = "names two columns alike: the first line should name each column"
                raise DataError(path, reader.line_num, problem)
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


def _read_parquet(path: Path) -> Iterator[tuple[int, Example]]:
    yield from _rows(path, lambda arrow: arrow.parquet.ParquetFile(path).iter_batches(batch_size=_TABLE_ROWS))


def _read_arrow(path: Path) -> Iterator[tuple[int, Example]]:
    yield from _rows(path, lambda arrow: arrow.ipc.open_stream(arrow.memory_map(str(path))))


def _rows(path: Path, batches: Callable[[Any], Iterable[Any]]) -> Iterator[tuple[int, Example]]:
    """Take a table's rows, with pyarrow, which is no part of the base installation."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(path, None, f"is read with pyarrow: {install_line('parquet')}") from error

    read = 0
    try:
        for batch in batches(pyarrow):
            for start in range(0, batch.num_rows, _TABLE_ROWS):
                yield from enumerate(batch.slice(start, _TABLE_ROWS).to_pylist(), read + start + 1)
            read += batch.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(path, None, f"cannot be read: {' '.join(str(error).split())}") from error


CSV_ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Example]]]] = {
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".json": _read_json_array,
    ".json.gz": _read_json_array,
    **dict.fromkeys(CSV_ENDINGS, _read_csv),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
"""By the ending of a file's name."""
_ENDINGS = ".jsonl, .json, .csv or .tsv, each also with .gz, .parquet or .arrow"
