"""The join token: made at the first start, kept in a file that only its owner can read, never printed or logged."""

from __future__ import annotations

import os
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
        if path.stat().st_mode & 0o077:
            raise ServiceError(f"{path} can be read by others: run chmod 600 {path}") from None
        token = path.read_text(encoding="utf-8", errors="replace").strip()
        if len(token) < 32 or not token.isascii() or any(character.isspace() for character in token):
            raise ServiceError(f"{path} holds no token: delete it, and a new one is made") from None
        return token, path
    token = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token + "\n")
    return token, path
