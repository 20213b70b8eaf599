"""Data at hand as the file that a device would have: a list of dicts, columns, a frame, a `datasets.Dataset`, images.

Of an example the fields that the task reads are written, and the names of the others, so that an error can list them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hosl_edge.data.images import fit
from hosl_edge.data.pictures import MODES
from hosl_edge.exceptions import DataError
from hosl_protocol.run.manifest import ImageEntry, Manifest
from hosl_protocol.run.tasks import Task, label_of

Data: TypeAlias = Any
"""A path (of a file or folder that `hosl-edge --data` reads), a list of dicts, a dict of columns, a pandas frame, a
`datasets.Dataset`; of images also a dict of the arrays `images` and `labels`."""

_IMAGES, _LABELS = ("images", "image", "img"), ("labels", "label")
"""What columns of pictures and classes are called."""


class DataFile:
    """Data as a file, and the name by which its owner knows it."""

    def __init__(self, name: str, data: Data, task: Task, manifest: Manifest, folder: Path) -> None:
        """Find the file, or write it into `folder`. Raises DataError for what cannot be one."""
        self._name = name
        self._is_written = not isinstance(data, (str, os.PathLike))
        if isinstance(data, (str, os.PathLike)):
            self.path = Path(data)
        elif manifest.image is None:
            self.path = folder / f"{name}.jsonl"
            _write_texts(self.path, name, data, task)
        else:
            self.path = folder / f"{name}.npz"
            _write_images(self.path, name, data, task, manifest.image)

    def rename(self, error: DataError) -> DataError:
        """Say of an error in a file that was written here what it is to who gave the data."""
        if not self._is_written or error.path != self.path:
            return error
        place = "" if error.line is None else f"example {error.line - 1}: "
        return DataError(Path(self._name), None, f"{place}{error.problem}")


@contextlib.contextmanager
def named(*files: DataFile | None) -> Iterator[None]:
    """Let errors in files that were written here name the data as its owner knows it."""
    try:
        yield
    except DataError as error:
        for file in filter(None, files):
            if (renamed := file.rename(error)) is not error:
                raise renamed from None
        raise


def _write_texts(path: Path, name: str, data: Data, task: Task) -> None:
    read = set(task.fields) | {field.partition(".")[0] for field in task.fields}
    with path.open("w", encoding="utf-8") as file:
        for place, row in enumerate(_rows(name, data)):
            if not isinstance(row, Mapping):
                raise DataError(
                    Path(name), None, f"example {place} is of type {type(row).__name__}: give a dict for each"
                )
            try:
                plain = {str(key): _plain(value) if key in read else None for key, value in row.items()}
            except TypeError as error:
                raise DataError(Path(name), None, f"example {place}: {error}") from None
            # One line for each example, whatever is in it: by its line an error finds it again.
            file.write(json.dumps(plain) + "\n")


def _rows(name: str, data: Data) -> Iterable[Any]:
    """Go through the examples, whatever holds them."""
    if hasattr(data, "itertuples") and hasattr(data, "to_dict"):  # a frame of pandas
        rows: Iterable[Any] = data.to_dict("records")
        return rows
    if isinstance(data, Mapping):
        lengths = {column: len(values) for column, values in data.items() if _is_column(values)}
        if len(lengths) < len(data) or len(set(lengths.values())) > 1 or _has_parts(data):
            raise DataError(Path(name), None, _no_columns(data))
        return (dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True))
    if isinstance(data, Iterable):
        return data
    raise DataError(Path(name), None, f"is of type {type(data).__name__}: give a list of dicts, a frame, or a path")


def _is_column(values: Any) -> bool:
    return isinstance(values, Sized) and isinstance(values, Iterable) and not isinstance(values, (str, Mapping))


def _has_parts(data: Mapping[Any, Any]) -> bool:
    """Tell whether it is a `datasets.DatasetDict`."""
    return bool(data) and all(hasattr(part, "column_names") for part in data.values())


def _no_columns(data: Mapping[Any, Any]) -> str:
    if _has_parts(data):
        return f"has several parts ({', '.join(map(str, data))}): give one of them"
    return "is a dict whose values are no columns of one length: give a list with a dict for each example"


def _plain(value: Any) -> Any:
    """Make a value of JSON. Raises TypeError for one that is none."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a number of numpy, or of torch
        return _plain(value.item())
    if type(value).__name__ == "NAType":  # pandas' own None
        return None
    raise TypeError(f"a field that the task reads is of type {type(value).__name__}: make text or a number of it")


def _write_images(path: Path, name: str, data: Data, task: Task, image: ImageEntry) -> None:
    columns = _columns_of_images(name, data)
    labels = np.array([_class_of(name, place, value, task) for place, value in enumerate(columns[1])], np.int64)
    pictures = columns[0] if isinstance(columns[0], np.ndarray) else _stack(name, columns[0], image)
    np.savez(path, images=pictures, labels=labels)


def _columns_of_images(name: str, data: Data) -> tuple[Any, Any]:
    """Find the pictures and their classes."""
    if isinstance(data, Mapping):
        columns = data
    else:
        rows = list(_rows(name, data))
        if not rows or not all(isinstance(row, Mapping) for row in rows):
            raise DataError(Path(name), None, "give a dict with an image and a label for each example")
        columns = {key: [row.get(key) for row in rows] for key in rows[0]}
    found = [next((key for key in keys if key in columns), None) for keys in (_IMAGES, _LABELS)]
    if None in found:
        there = ", ".join(map(repr, columns)) or "nothing"
        raise DataError(
            Path(name), None, f"needs images in one of {_IMAGES} and classes in one of {_LABELS}; has {there}"
        )
    pictures, labels = (columns[key] for key in found if key is not None)
    if len(pictures) != len(labels):
        raise DataError(Path(name), None, f"has {len(pictures)} images and {len(labels)} labels")
    return pictures, labels


def _class_of(name: str, place: int, value: Any, task: Task) -> int:
    """Tell the number of a class, which may be given by its name."""
    if isinstance(value, str):
        try:
            return label_of(task, {task.label_field: value})
        except ValueError as error:
            raise DataError(Path(name), None, f"example {place}: the label {error}") from None
    try:
        return int(value)
    except (TypeError, ValueError):
        problem = f"example {place}: the label should be a number or a name, it is of type {type(value).__name__}"
        raise DataError(Path(name), None, problem) from None


def _stack(name: str, pictures: Iterable[Any], image: ImageEntry) -> npt.NDArray[np.uint8]:
    """Bring pictures of any size, pillow's or arrays, into one array of the model's size, as the device would."""
    stacked = []
    for place, picture in enumerate(pictures):
        if hasattr(picture, "convert"):
            picture = picture.convert(MODES[image.channels])
        pixels = np.asarray(picture)
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
            problem = f"example {place}: the image should be uint8 [H, W] or [H, W, C], or one of Pillow's"
            raise DataError(Path(name), None, f"{problem}; it is {pixels.dtype} {list(pixels.shape)}")
        stacked.append(fit(pixels, image, Path(name)))
    return np.stack(stacked)
