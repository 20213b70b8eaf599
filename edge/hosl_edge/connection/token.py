"""The device's token: what it shows to the cloud, and by which name the cloud knows it."""

from __future__ import annotations

import logging
import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import SettingsError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Token:
    """What the device shows, and what it knows of whom it shows it to."""

    name: str
    """The device whose token it is; empty for a service's join token."""
    bearer: str = field(repr=False)
    """What is sent."""
    fingerprint: str = ""
    """SHA-256 of the certificate of the service's own CA, base64url without padding; empty where it has none."""


def read_token(path: Path) -> Token:
    """Read the token in a file. Raises SettingsError."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise SettingsError("token_file", str(path), error.strerror or "cannot be read") from error
    except UnicodeDecodeError:
        text = ""

    # systemd decides the mode of its credentials.
    if path.parent != Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nowhere")) and path.stat().st_mode & 0o044:
        log.warning("%s can be read by others: run chmod 600 %s", path, path)

    token = parse_token(text) if re.fullmatch(r"[!-~]+", text) else None
    if token is None:
        raise SettingsError("token_file", str(path), "it should hold one token and nothing else: copy it again")
    return token


def parse_token(text: str) -> Token | None:
    """Take `NAME~SECRET`, `NAME~SECRET~FINGERPRINT`, or a bare join token apart; None for anything else."""
    parts = text.split("~")
    if len(parts) > 3 or not all(parts[1:]):
        return None
    if len(parts) == 1:
        return Token("", text)
    name, secret = parts[:2]
    return Token(name, f"{name}~{secret}" if name else secret, parts[2] if len(parts) == 3 else "")


def device_name(settings: EdgeSettings, token: Token) -> str:
    """Decide what the device is called. Raises SettingsError where its token has another name, which is refused."""
    if settings.name and token.name and settings.name != token.name:
        remedy = (
            f"the token in {settings.token_file} is that of {token.name!r}: leave the name out, or use its own token"
        )
        raise SettingsError("name", settings.name, remedy)
    return settings.name or token.name or _default_name()


def _default_name() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip(".")[:64] or "device"
