"""Output folders and files that appear whole or not at all.

The export makes a bundle so, and a merge on the cloud its model.
"""

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
        raise SettingsError(option, str(out), "it exists already; choose another name or remove it")
    parent = nearest_folder(out)
    if not parent.is_dir():
        raise SettingsError(option, str(out), f"{parent} is no folder")


def nearest_folder(out: Path) -> Path:
    """The closest parent of `out` that exists."""
    return next(parent for parent in out.absolute().parents if parent.exists())


@contextlib.contextmanager
def staging(out: Path, option: str = "out") -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if the block ends well, and disappears if it does not."""
    out = out.absolute()
    check_output(out, option)
    out.parent.mkdir(parents=True, exist_ok=True)

    # Beside `out`, so that the rename stays on one disk. Named before it is made: a signal may come between any two
    # steps, and what has a name can be removed.
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        folder.mkdir()
        folder.chmod(0o755)
        yield folder
        # Somebody may have made it meanwhile, and a rename would take the place of an empty folder.
        check_output(out, option)
        folder.rename(out)
    except BaseException:  # also signals, which come as KeyboardInterrupt or SystemExit
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def staging_file(out: Path, option: str) -> Iterator[Path]:
    """A path beside `out` for a file that becomes `out` if the block ends well, and disappears if it does not."""
    out = out.absolute()
    check_output(out, option)
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        yield path
        check_output(out, option)
        path.rename(out)
    except BaseException:  # as above
        path.unlink(missing_ok=True)
        raise
