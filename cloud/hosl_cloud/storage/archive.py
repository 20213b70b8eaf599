"""A folder as one tar file that is never on the disk: it is made while somebody downloads it."""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 20


class Archive:
    """The files below a folder, as a tar file of a length that is known before.

    Its files are open from the start, so that the folder may be removed meanwhile. Iterate over it once, or close it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Open all files; in the archive they are below `name`. Raises OSError."""
        self._entries: list[tuple[bytes, int, BinaryIO]] = []
        with contextlib.ExitStack() as opened:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                file = opened.enter_context(path.open("rb"))
                info = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
                facts = os.fstat(file.fileno())
                info.size, info.mtime, info.mode = facts.st_size, int(facts.st_mtime), 0o644
                self._entries.append((info.tobuf(tarfile.PAX_FORMAT), info.size, file))
            self._opened = opened.pop_all()
        blocks = (len(header) + size + _padding(size) for header, size, _ in self._entries)
        self.size_bytes = sum(blocks) + 2 * tarfile.BLOCKSIZE

    def __iter__(self) -> Iterator[bytes]:
        """Yield the archive, and close the files at its end. Raises OSError for a file that has become shorter."""
        with self._opened:
            for header, size, file in self._entries:
                yield header
                left = size
                while left:
                    chunk = file.read(min(CHUNK_BYTES, left))
                    if not chunk:
                        raise OSError(f"{file.name} ends too early")
                    left -= len(chunk)
                    yield chunk
                yield bytes(_padding(size))
            yield bytes(2 * tarfile.BLOCKSIZE)

    def close(self) -> None:
        """Close the files of one that nobody reads."""
        self._opened.close()


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
