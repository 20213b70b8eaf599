"""Data from standard input: kept on the disk for as long as the process lives, for a run reads it more than once."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hosl_edge.exceptions import DataError

STANDARD_INPUT = "-"
_NAME = Path("standard input")
_PREFIX = "piped-"
_PIECE_BYTES = 1 << 20


@contextlib.contextmanager
def spooled(folder: Path, stream: BinaryIO | None = None) -> Iterator[Path]:
    """Write standard input to a file in `folder` that nobody else may read, and that goes with the process.

    Its ending says what is in it: Parquet, a JSON array, JSON Lines or CSV, packed or not. Raises DataError.
    """
    stream = sys.stdin.buffer if stream is None else stream
    if stream.isatty():
        raise DataError(_NAME, None, "is a terminal: pipe the examples in, or name a file")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_left(folder)

    # mkstemp's files are for their owner alone.
    descriptor, name = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            # Held for as long as it is in use: another start removes what nobody holds.
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                while piece := stream.read(_PIECE_BYTES):
                    file.write(piece)
                file.flush()
            except OSError as error:
                raise DataError(_NAME, None, f"cannot be kept in {folder}: {error.strerror}") from error
            path = path.rename(path.with_name(path.name + _ending(path)))
            yield path
    finally:
        path.unlink(missing_ok=True)


def _remove_left(folder: Path) -> None:
    """Remove what a process that was killed has left."""
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _ending(path: Path) -> str:
    """Tell by its first bytes what a file holds."""
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        return ".parquet"
    packed = ".gz" if head[:2] == b"\x1f\x8b" else ""
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            first = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(_NAME, None, f"is damaged gzip ({error})") from error
    if not first:
        raise DataError(_NAME, None, "is empty")
    return {b"[": ".json", b"{": ".jsonl"}.get(first, ".csv") + packed
