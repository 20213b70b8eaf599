"""The device's data as a whole: whether it can be read, its digest, and what it lacks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from hosl_edge.data.pictures import visible_files
from hosl_edge.exceptions import DataError
from hosl_protocol.run.tasks import Task

log = logging.getLogger(__name__)


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
    """Compute the SHA-256 of a data file; of a folder, over its files' names and contents. Raises DataError.

    In a folder with pictures only they count.
    """
    try:
        return _digest_of(path).hex()
    except OSError as error:
        raise DataError(path, None, error.strerror or "cannot be read") from error


def _digest_of(path: Path) -> bytes:
    digest = hashlib.sha256()
    # By names in order: the order in which a file system lists them is its own.
    if path.is_dir():
        pictures, others = visible_files(path)
        for file_path in pictures or others:
            digest.update(file_path.relative_to(path).as_posix().encode() + b"\0" + _digest_of(file_path))
    else:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.digest()
