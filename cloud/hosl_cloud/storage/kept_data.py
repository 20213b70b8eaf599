"""The folder of kept activations: which files are there, what they may take of the disk, and who goes first.

A file was used last when its time says so: it is set whenever a run opens the file or adds to it. Of the files that the
run itself does not have open the least recently used goes first. Slow, off the event loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hosl_cloud.storage.kept_file import SUFFIX, KeptData, KeptFile, read_kept

NAME_CHARACTERS = 32


class KeptFolder:
    """The files of a service, as one run uses them."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder, self._budget = folder, budget_bytes
        self._open: dict[Path, KeptFile] = {}

    def open(self, data: KeptData) -> KeptFile:
        """Open the file of a device's data, or make it. Raises OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / (_name_of(data) + SUFFIX)
        if path not in self._open:
            self._open[path] = KeptFile(path, data)
        os.utime(path)
        return self._open[path]

    def find(self, key: str) -> list[KeptData]:
        """List what is here under a key, the most recently used first."""
        return [each.data for each in reversed(list_kept(self._folder)) if each.data.key == key]

    def make_room(self, size_bytes: int) -> bool:
        """Make room for so many bytes more; False, and nothing goes, where what this run has open fills the budget."""
        if sum(file.size_bytes for file in self._open.values()) + size_bytes > self._budget:
            return False
        files = list_kept(self._folder)
        excess = sum(each.size_bytes for each in files) + size_bytes - self._budget
        for each in files:
            if excess <= 0:
                break
            if each.path not in self._open:
                each.path.unlink(missing_ok=True)
                excess -= each.size_bytes
        return True

    def close(self) -> None:
        """Let all files go."""
        for file in self._open.values():
            file.close()
        self._open.clear()


@dataclass(frozen=True)
class KeptEntry:
    """A file in the folder."""

    path: Path
    data: KeptData
    size_bytes: int
    used_at: float
    """Unix time."""

    @property
    def name(self) -> str:
        """By which people call it."""
        return self.path.stem[:12]


def list_kept(folder: Path) -> list[KeptEntry]:
    """List the files, the least recently used first; what cannot be read is none."""
    entries = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):  # one that goes meanwhile
            data, about = read_kept(path), path.stat()
            if data is not None:
                entries.append(KeptEntry(path, data, about.st_size, about.st_mtime))
    return sorted(entries, key=lambda entry: (entry.used_at, entry.path.name))


def remove_kept(folder: Path, which: Collection[str]) -> list[KeptEntry]:
    """Delete the files of these names, devices or bundles; which they were. Raises OSError."""
    wanted = set(which)
    gone = [each for each in list_kept(folder) if wanted & {each.name, each.data.device, each.data.bundle}]
    for each in gone:
        each.path.unlink(missing_ok=True)
    return gone


def _name_of(data: KeptData) -> str:
    # Its name stands for what the numbers are of; a file whose line says anything else is made anew.
    facts = [data.key, data.device, data.data_digest, data.part]
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:NAME_CHARACTERS]
