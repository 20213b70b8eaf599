"""Files as a failing disk, a wrong copy or a careless hand leaves them."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

DAMAGES = ("truncated", "flipped", "swapped", "empty", "unreadable", "a directory")


_OTHER = b'PK\x03\x04 something else entirely\n\xff{"a": 1}\n'


def damage(path: Path, how: str, *, swap: bytes = _OTHER, bit: int | None = None) -> None:
    """Damage a file; `bit` is the one that is flipped, else the highest of the byte in the middle."""
    good = path.read_bytes()
    if how == "truncated":
        path.write_bytes(good[: len(good) // 2 - 3])  # within a line
    elif how == "flipped":
        place = len(good) // 2 * 8 + 7 if bit is None else bit
        changed = bytearray(good)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(bytes(changed))
    elif how == "swapped":
        path.write_bytes(swap)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "unreadable":
        path.chmod(0)
    else:
        path.unlink()
        path.mkdir()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for locks."""
    with _Permissions(folder):
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and "lock" not in path.name and not path.name.endswith(("-wal", "-shm"))
        }


class _Permissions:
    """For whoever is not root: what is unreadable can be read meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._closed = [path for path in folder.rglob("*") if path.is_file() and not path.stat().st_mode & 0o400]

    def __enter__(self) -> None:
        for path in self._closed:
            path.chmod(0o600)

    def __exit__(self, *_: object) -> None:
        for path in self._closed:
            path.chmod(0)


_READS_ALL = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read what has no permission; not in here, nor in threads that start in here."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, now = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    now[:] = before[:]
    now[0] &= ~_READS_ALL & 0xFFFFFFFF
    assert libc.capset(header, now) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
