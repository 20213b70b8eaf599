"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from hosl_protocol.exceptions import SettingsError


def check_output(out: Path, option: str = "out") -> None:
    """Raise SettingsError, naming `option`, where something is in the way of the folder."""
    if out.exists() or out.is_symlink():
        raise SettingsError(option, str(out), "it exists already; choose another folder or remove it")
    parent = nearest_folder(out)
    if not parent.is_dir():
        raise SettingsError(option, str(out), f"{parent} is no folder")


def nearest_folder(out: Path) -> Path:
    """Find the closest parent of `out` that exists."""
    return next(parent for parent in out.absolute().parents if parent.exists())


@contextlib.contextmanager
def staging(out: Path, option: str = "out") -> Iterator[Path]:
    """Make a folder beside `out` that becomes `out` if the block ends well, and disappears if it does not."""
    out = out.absolute()
    check_output(out, option)
    out.parent.mkdir(parents=True, exist_ok=True)

    # Named before it is made: a signal may come between any two steps, and what has a name can be removed.
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        folder.mkdir()
        folder.chmod(0o755)
        yield folder
        check_output(out, option)  # an export takes minutes, in which somebody else may have made it
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
