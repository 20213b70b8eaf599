"""The join token: made at the first start, kept in a file that only its owner can read, never printed or logged."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from hosl_cloud.exceptions import ServiceError

TOKEN_FILE = "join-token"


def load_or_make_token(data_dir: Path) -> tuple[str, Path]:
    """The service's join token and its file (mode 0600). Raises ServiceError where others may read the file."""
    path = data_dir / TOKEN_FILE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        try:
            token = path.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise ServiceError(f"{path} cannot be read: {error.strerror}: mend or delete it") from None
        if path.stat().st_mode & 0o077:
            raise ServiceError(f"{path} can be read by others: run chmod 600 {path}") from None
        if not re.fullmatch(r"[!-~]{32,}", token):
            raise ServiceError(f"{path} holds no token: delete it, and a new one is made") from None
        return token, path
    token = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token + "\n")
    return token, path
