"""The join token: made at the first start, kept in a file that only its owner can read, never printed or logged."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from pathlib import Path

from hosl_cloud.exceptions import ServiceError

TOKEN_FILE = "join-token"


def load_or_make_token(data_dir: Path) -> tuple[str, Path]:
    """The service's join token and its file (mode 0600). Raises ServiceError where others may read the file."""
    path = data_dir / TOKEN_FILE
    if not path.exists():
        _make(path)
    try:
        token = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise ServiceError(f"{path} cannot be read: {error.strerror}: mend or delete it") from None
    if path.stat().st_mode & 0o077:
        raise ServiceError(f"{path} can be read by others: run chmod 600 {path}")
    if not re.fullmatch(r"[!-~]{32,}", token):
        raise ServiceError(f"{path} holds no token: delete it, and a new one is made")
    return token, path


def _make(path: Path) -> None:
    """The file appears with its token in it: a service that is killed here must not leave one without."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="ascii") as file:  # mode 0600
        file.write(secrets.token_urlsafe(32) + "\n")
        file.flush()
        os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another service was faster
            os.link(file.name, path)
