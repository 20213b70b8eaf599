"""The agent's settings: an option wins over the environment, that over the TOML file, and that over the default."""

from __future__ import annotations

import logging
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec

from hosl_protocol.exceptions import MalformedSettings, SettingsError
from hosl_protocol.program.proxies import is_loopback
from hosl_protocol.program.terminal import default_folder
from hosl_protocol.run.settings import convert, nearest, read_toml, wanted
from hosl_protocol.wire.messages import is_device_name

log = logging.getLogger(__name__)

CONFIG = Path("/etc/hosl/edge.toml")
"""Read where no other file is named."""
ENVIRONMENT = "HOSL_EDGE_"
"""Before a field's name in capitals: its variable."""
CREDENTIAL = "hosl-token"
"""The token's name among systemd's credentials."""
TOKEN = Path("/etc/hosl/token")
"""Where install.md puts the token; read where nothing else names one, as by hand beside the service."""
REQUIRED = ("server", "token_file", "data")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def _state_dir() -> str:
    return str(default_folder("XDG_STATE_HOME", ".local/state", "--state-dir") / "hosl")


def _cache_dir() -> str:
    return str(default_folder("XDG_CACHE_HOME", ".cache", "--cache-dir") / "hosl")


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
    skip_broken: bool = False
    """Leave out pictures that cannot be decoded, instead of stopping."""
    state_dir: str = msgspec.field(default_factory=_state_dir)
    """Where the journal lives."""
    sync_interval_s: float = 30.0
    """Seconds for which updates may be in the kernel's memory only; what a power cut takes comes again from the cloud.
    Twice as long writes half as much to the disk."""
    cache_dir: str = msgspec.field(default_factory=_cache_dir)
    """Where fetched shards live."""
    insecure: bool = False
    """Allow plain text (`ws://`) to a host that is not this one."""
    stay: bool = False
    """After a run's end, wait for the next one instead of ending."""
    max_temperature_c: float | None = None
    """Degrees Celsius above which the agent pauses before each round's work. Off, since only the hardware knows its own
    limit; where it says that it is throttled, the agent pauses without this setting."""
    min_available_memory: int | str = "32M"
    """Bytes, or a number with a unit, of the machine's available memory (or of the control group's) below which the
    agent stops, before the kernel kills something; 0 never stops."""
    stall_timeout_s: float = 1800.0
    """Seconds that one piece of work (a forward, a replay, reading the data) may take before systemd's watchdog is left
    to starve."""

    @property
    def memory_budget_bytes(self) -> int | None:
        """The budget in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    @property
    def min_available_bytes(self) -> int:
        """The least available memory in bytes."""
        value = self.min_available_memory
        return 0 if str(value) == "0" else parse_bytes(value, "min_available_memory")

    @property
    def compute_threads(self) -> int:
        """The number of threads to use."""
        return self.threads or len(os.sched_getaffinity(0))


FIELDS = {field.name: field for field in msgspec.structs.fields(EdgeSettings)}


def parse_bytes(text: int | str, field: str = "memory_budget") -> int:
    """`400M` as 400,000,000; `400Mi` as 419,430,400."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?|)B?", str(text).strip().upper())
    if not match or not float(match.group(1)):
        raise SettingsError(field, text, "use a number of bytes such as 400M or 1.5G")
    return int(float(match.group(1)) * _UNITS[match.group(2)])


def split_fields(text: str) -> list[str]:
    """`a, b` as its names."""
    return [field.strip() for field in text.split(",") if field.strip()]


@dataclass(frozen=True)
class Resolved:
    """What each source says; checked by `settings`."""

    values: dict[str, Any]
    """By field, where a source says anything."""
    sources: dict[str, str]
    """Who said it."""
    config: Path | None

    def effective(self) -> dict[str, Any]:
        """The values, and the defaults of the other fields; fields without either are absent."""
        return {name: self.value(name) for name, field in FIELDS.items() if name in self.values or not field.required}

    def value(self, name: str) -> Any:
        """A field's value, or its default. Raises SettingsError for a default that this user has not."""
        return self.values[name] if name in self.values else _default(FIELDS[name])

    def settings(self) -> EdgeSettings:
        """The settings, all checked. Raises SettingsError."""
        for required in REQUIRED:
            if required not in self.values:
                option, variable = f"--{required.replace('_', '-')}", ENVIRONMENT + required.upper()
                remedy = f"give {option} or {variable}, or set it in the --config file"
                if required == "token_file" and TOKEN.exists():
                    remedy += f"; {TOKEN} is the service's, which sudo may read"
                raise SettingsError(required, None, remedy)
        settings: EdgeSettings = convert(self.values, EdgeSettings, str(self.config or "options"))
        _check(settings)
        return settings


def load_settings(options: dict[str, Any], config: Path | None) -> EdgeSettings:
    """Settings from the options that were given, over the environment, over the file. Raises SettingsError."""
    return resolve(options, config).settings()


def resolve(options: Mapping[str, Any], config: Path | None, environment: Mapping[str, str] = os.environ) -> Resolved:
    """What options, environment and file say. Raises SettingsError for a name that is none."""
    if config is None and CONFIG.exists():
        config = CONFIG
    layers = [
        (str(config), _of_file(config)),
        ("environment", _of_environment(environment)),
        ("option", dict(options)),
    ]
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        values |= layer
        sources |= dict.fromkeys(layer, source)
    credential = Path(environment.get("CREDENTIALS_DIRECTORY", "")) / CREDENTIAL
    if "token_file" not in values and credential.is_absolute() and credential.exists():
        values["token_file"], sources["token_file"] = str(credential), "systemd credential"
    elif "token_file" not in values and os.access(TOKEN, os.R_OK):
        values["token_file"], sources["token_file"] = str(TOKEN), "the service's"
    return Resolved(values, sources, config)


def _of_file(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    data = read_toml(config, "--config")
    _check_names(data, FIELDS, str(config))
    return data


def _of_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    given = {name: text for name, text in environment.items() if name.startswith(ENVIRONMENT) and text}
    variables = {ENVIRONMENT + name.upper(): name for name in FIELDS}
    _check_names(given, variables, "environment")
    return {variables[variable]: _parse(variables[variable], variable, text) for variable, text in given.items()}


def _check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise MalformedSettings(where, name, f"no setting has this name; {nearest(name, known)}")


def _parse(field: str, variable: str, text: str) -> Any:
    if field == "fields":
        return split_fields(text)
    try:
        return msgspec.convert(text, typing.get_type_hints(EdgeSettings)[field], strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(variable, text, f"use {wanted(str(error))}") from error


def masked(server: str) -> str:
    """An address without what stands before its host."""
    return re.sub(r"//[^/]*@", "//***@", server)


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def _check(settings: EdgeSettings) -> None:
    url = _address(settings.server)
    if "@" in url.netloc:
        raise SettingsError("server", masked(settings.server), "leave out the user: the token says who this is")
    if url.scheme == "ws" and not is_loopback(url.hostname or "") and not settings.insecure:
        raise SettingsError("server", settings.server, "use wss://, or --insecure to send everything as plain text")
    if settings.name and not is_device_name(settings.name):
        raise SettingsError("name", settings.name, "use 1 to 64 characters of A-Za-z0-9._-, not starting with a dot")
    if settings.threads < 0:
        raise SettingsError("threads", settings.threads, "use 0 (all) or more")
    if not 0.0 <= settings.sync_interval_s < 1e9:
        raise SettingsError("sync_interval_s", settings.sync_interval_s, "use a number of seconds from 0 on")
    if settings.memory_budget is not None:
        parse_bytes(settings.memory_budget)
    assert settings.min_available_bytes >= 0, "reading it checks it"
    if settings.max_temperature_c is not None and not 0.0 < settings.max_temperature_c < 200.0:
        raise SettingsError("max_temperature_c", settings.max_temperature_c, "use degrees Celsius, such as 75")
    if not 1.0 <= settings.stall_timeout_s < 1e9:
        raise SettingsError("stall_timeout_s", settings.stall_timeout_s, "use a number of seconds from 1 on")


def _address(server: str) -> SplitResult:
    """The address in its parts. Raises SettingsError."""
    remedy = "use wss://host:port (or ws://127.0.0.1:port on one machine)"
    try:
        url = urlsplit(server)
        _ = url.port  # reading it checks it
    except ValueError as error:
        raise SettingsError("server", masked(server), f"{remedy}; {error}") from None
    if url.scheme not in ("ws", "wss") or not url.hostname:
        raise SettingsError("server", masked(server), remedy)
    return url
