"""The agent's settings: from the command line, from a TOML file, or both (the command line wins)."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from hosl_edge.trust import Token, parse_token
from hosl_protocol import SettingsError, convert, read_toml

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def _default_name() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip(".")[:64] or "device"


def _xdg(variable: str, fallback: str) -> str:
    return str(Path(os.environ.get(variable) or Path.home() / fallback) / "hosl")


class EdgeSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Settings of `hosl-edge`; the TOML file uses the same names."""

    server: str
    """Address of the cloud, `wss://host:port` or `ws://host:port`."""
    token_file: str
    """File that holds the device's token, or on the cloud's own machine the join token."""
    data: str
    """Training data: `.jsonl` or `.csv`; of images a `.npz` file, or a folder with a folder for each class."""
    eval: str | None = None
    """Held-out data of the same form; without it the device takes no part in evaluations."""
    memory_budget: int | str | None = None
    """Bytes, or a number with K, M, G, Ki, Mi, Gi: most anonymous memory that the agent may take."""
    threads: int = 0
    """Compute threads; 0 takes one per CPU that the process may use."""
    name: str = ""
    """The device's name, 1 to 64 characters of `A-Za-z0-9._-`, which it keeps for life; empty takes the name of its
    token, or with a service's join token the host name."""
    fields: tuple[str, ...] | None = None
    """Fields of the data that a run may use; default: those that the shipped task of the same name reads."""
    share_text: bool = False
    """Allow tasks (`lm`) whose labels are the text itself."""
    state_dir: str = msgspec.field(default_factory=lambda: _xdg("XDG_STATE_HOME", ".local/state"))
    """Where the journal lives."""
    sync_interval_s: float = 30.0
    """Seconds for which updates may be in the kernel's memory only; what a power cut takes comes again from the cloud.
    Twice as long writes half as much to the disk."""
    cache_dir: str = msgspec.field(default_factory=lambda: _xdg("XDG_CACHE_HOME", ".cache"))
    """Where fetched shards live."""
    insecure: bool = False
    """Allow plain text (`ws://`) to a host that is not this one."""

    @property
    def memory_budget_bytes(self) -> int | None:
        """The budget in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    @property
    def compute_threads(self) -> int:
        """The number of threads to use."""
        return self.threads or len(os.sched_getaffinity(0))


def parse_bytes(text: int | str) -> int:
    """`400M` as 400,000,000; `400Mi` as 419,430,400."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?|)B?", str(text).strip().upper())
    if not match or not float(match.group(1)):
        raise SettingsError("memory_budget", text, "use a number of bytes such as 400M or 1.5G")
    return int(float(match.group(1)) * _UNITS[match.group(2)])


def load_settings(options: dict[str, Any], config: Path | None) -> EdgeSettings:
    """Settings from the options that were given, over those in the file. Raises SettingsError."""
    data = read_toml(config, "--config") if config is not None else {}
    data |= options
    for required in ("server", "token_file", "data"):
        if required not in data:
            raise SettingsError(required, None, f"give --{required.replace('_', '-')}, or set it in the --config file")
    settings: EdgeSettings = convert(data, EdgeSettings, str(config) if config else "options")
    _check(settings)
    return settings


def _check(settings: EdgeSettings) -> None:
    url = urlsplit(settings.server)
    if url.scheme not in ("ws", "wss") or not url.hostname:
        raise SettingsError("server", settings.server, "use wss://host:port (or ws://127.0.0.1:port on one machine)")
    is_loopback = url.hostname in ("localhost", "127.0.0.1", "::1")
    if url.scheme == "ws" and not is_loopback and not settings.insecure:
        raise SettingsError("server", settings.server, "use wss://, or --insecure to send everything as plain text")
    if settings.name and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", settings.name):
        raise SettingsError("name", settings.name, "use 1 to 64 characters of A-Za-z0-9._-, not starting with a dot")
    if settings.threads < 0:
        raise SettingsError("threads", settings.threads, "use 0 (all) or more")
    if not 0.0 <= settings.sync_interval_s < 1e9:
        raise SettingsError("sync_interval_s", settings.sync_interval_s, "use a number of seconds from 0 on")
    if settings.memory_budget is not None:
        parse_bytes(settings.memory_budget)


def read_token(path: Path) -> Token:
    """The token in a file. Raises SettingsError."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError("token_file", str(path), error.strerror or "cannot be read") from error
    except UnicodeDecodeError:
        text = ""
    token = parse_token(text) if re.fullmatch(r"[!-~]+", text) else None
    if token is None:
        raise SettingsError("token_file", str(path), "it should hold one token and nothing else: copy it again")
    return token


def device_name(settings: EdgeSettings, token: Token) -> str:
    """What the device is called."""
    return settings.name or token.name or _default_name()
