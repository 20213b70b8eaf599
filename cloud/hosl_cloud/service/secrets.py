"""The service's own secrets: made at the first start, kept in files that only their owner can read, never printed.

The join token is for devices on this machine, the admin token for who leads the service, the metrics token for
Prometheus.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from pathlib import Path

from hosl_cloud.exceptions import ServiceError

TOKEN_FILE = "join-token"
ADMIN_TOKEN_FILE = "admin-token"
METRICS_TOKEN_FILE = "metrics-token"
SEPARATOR = "~"
"""Between the parts of a token: a name, a secret, a fingerprint; none of them can hold it."""


def load_or_make_token(data_dir: Path, fingerprint: str = "") -> tuple[str, Path]:
    """The join token and its file (mode 0600), which also names the service's own CA where it has one.

    Raises ServiceError where others may read the file.
    """
    path = data_dir / TOKEN_FILE
    token = load_or_make_secret(path)
    text = token_text("", token, fingerprint) if fingerprint else token
    # The same secret stays, with another fingerprint where the service has got a CA, or lost it.
    if path.read_text(encoding="utf-8-sig", errors="replace").strip() != text:
        _write(path, text, replace=True)
    return token, path


def load_or_make_secret(path: Path) -> str:
    """A secret of 256 bits in a file of its own. Raises ServiceError."""
    if not path.exists():
        _write(path, secrets.token_urlsafe(32))
    return read_secret(path)


def read_secret(path: Path) -> str:
    """The secret in a file. Raises ServiceError."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace").strip()
    except OSError as error:
        raise ServiceError(f"{path} cannot be read: {error.strerror}: mend or delete it") from None
    check_private(path)
    secret = text.split(SEPARATOR)[1] if text.startswith(SEPARATOR) else text
    if not re.fullmatch(r"[!-}]{32,}", secret):
        raise ServiceError(f"{path} holds no token: delete it, and a new one is made")
    return secret


def check_private(path: Path) -> None:
    """Raise ServiceError where others can reach a file that holds a secret."""
    if path.stat().st_mode & 0o077:
        raise ServiceError(f"{path} can be read by others: run chmod 600 {path}")


def token_text(name: str, secret: str, fingerprint: str) -> str:
    """A token as people carry it to a device: `NAME~SECRET`, and `~FINGERPRINT` where the service has its own CA."""
    return SEPARATOR.join([name, secret, *([fingerprint] if fingerprint else [])])


def _write(path: Path, text: str, *, replace: bool = False) -> None:
    """The file appears with its token in it: a service that is killed here must not leave one without."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="ascii") as file:  # mode 0600
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
        if replace:
            path.unlink()
        with contextlib.suppress(FileExistsError):  # another service was faster
            os.link(file.name, path)
