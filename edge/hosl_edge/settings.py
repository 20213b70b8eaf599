"""The agent's settings: an option wins over the environment, that over the TOML file, and that over the default."""

from __future__ import annotations

import logging
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
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


@dataclass(frozen=True)
class Shown:
    """How people meet a setting: the option, the example file and README's table are made of it (options.py)."""

    help: str
    """For `--help`, half a sentence."""
    meaning: str
    """For the example file and README, whole sentences; code stands between backticks."""
    metavar: str = ""
    """Stands for the value in `--help`; empty for a switch."""
    default: str = ""
    """The default in words, where its value does not say it."""
    example: Any = None
    """A value for the example file, where there is no default."""
    is_given: bool = False
    """Whether the example file gives it: it needs a value, and only its reader knows which."""


class EdgeSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Settings of `hosl-edge`; the TOML file uses the same names. A new one needs its line here, and nowhere else."""

    server: Annotated[
        str,
        Shown(
            "address of hosl-cloud, wss://host:port (ws:// on this machine only)",
            "Address of the service, `wss://host:port`. `ws://host:port` works for this machine, or with `insecure`.",
            metavar="URL",
            example="wss://cloud.example:8765",
            is_given=True,
        ),
    ]
    token_file: Annotated[
        str,
        Shown(
            "file with the token that hosl-cloud device add made",
            "File with the device's token, which `hosl-cloud device add` makes. On the service's own machine the join "
            "token works, too.",
            metavar="FILE",
            default="systemd's credential `hosl-token`, or `/etc/hosl/token`",
            example="/etc/hosl/token",
        ),
    ]
    data: Annotated[
        str,
        Shown(
            "training data: .jsonl, .csv, .parquet, - for a pipe; of images .npz or a folder",
            "Training data: a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, or a folder of such files. `-` "
            "reads a pipe. For images a `.npz` file, or a folder that has a folder for each class. The systemd unit "
            "can read `/var/lib/hosl`, but not `/home`.",
            metavar="FILE",
            example="/var/lib/hosl/train.jsonl",
            is_given=True,
        ),
    ]
    eval: Annotated[
        str | None,
        Shown(
            "held-out data of the same form",
            "Held-out data, in the same form.",
            metavar="FILE",
            default="none: the device takes no part in evaluations",
            example="/var/lib/hosl/validation.jsonl",
        ),
    ] = None
    memory_budget: Annotated[
        int | str | None,
        Shown(
            "most anonymous memory to take, such as 400M",
            "Most anonymous memory to take: bytes, or a number with K, M, G, Ki, Mi or Gi.",
            metavar="SIZE",
            default="none: it computes 256 tokens or 16384 pixels at a time",
            example="400M",
        ),
    ] = None
    cache_budget: Annotated[
        int | str | None,
        Shown(
            "most disk to take for what the frozen blocks compute, such as 2G",
            "Most room on the disk for what frozen blocks before the trained ones compute of each example, so that "
            "they compute it once. 0 removes the file.",
            metavar="SIZE",
            default="off",
            example="2G",
        ),
    ] = None
    threads: Annotated[
        int,
        Shown(
            "compute threads (default: all CPUs)",
            "Number of compute threads. 0 takes one for each CPU that the process may use.",
            metavar="N",
            default="0: all CPUs",
        ),
    ] = 0
    name: Annotated[
        str,
        Shown(
            "name of this device (default: its token's name)",
            "The device's name, 1 to 64 characters of A-Za-z0-9._-. A device keeps its name for life.",
            metavar="NAME",
            default="the name in its token; with a join token the host name",
        ),
    ] = ""
    fields: Annotated[
        tuple[str, ...] | None,
        Shown(
            "fields of the data that a run may use",
            "Fields of the data that a run may use, with commas between them.",
            metavar="A,B",
            default="those of the shipped task that the run names",
            example=["text", "label"],
        ),
    ] = None
    share_text: Annotated[
        bool,
        Shown(
            "allow tasks whose labels are the text itself",
            "Allow tasks whose labels are the text itself: `lm`, `completion` and `chat`. The device then sends the "
            "text that the model is to write.",
        ),
    ] = False
    share_fields: Annotated[
        tuple[str, ...] | None,
        Shown(
            "fields whose text itself may be sent as labels",
            "Fields whose text may be sent as labels, with commas between them. Without it `share_text` allows every "
            "field that the run may use.",
            metavar="A,B",
            default="with `share_text` all that the run may use, else none",
            example=["completion"],
        ),
    ] = None
    skip_broken: Annotated[
        bool,
        Shown(
            "leave out pictures that cannot be decoded",
            "Leave out pictures that cannot be decoded. Without it the agent ends with code 4.",
        ),
    ] = False
    sync_interval_s: Annotated[
        float,
        Shown(
            "seconds between writes of the journal to disk (default: 30)",
            "Longest time, in seconds, between two writes of the journal to the disk. A power cut loses the updates "
            "since the last write, and the service sends them again. A longer interval spares an SD card.",
            metavar="S",
        ),
    ] = 30.0
    state_dir: Annotated[
        str,
        Shown(
            "where the journal lives (default: ~/.local/state/hosl)",
            "Folder for what the agent needs at its next start: the journal, a snapshot, the tokenized data. The "
            "systemd unit sets it.",
            metavar="DIR",
            default="`~/.local/state/hosl`",
            example="/var/lib/hosl",
        ),
    ] = msgspec.field(default_factory=_state_dir)
    cache_dir: Annotated[
        str,
        Shown(
            "where fetched shards live (default: ~/.cache/hosl)",
            "Folder for downloaded shards. The systemd unit sets it.",
            metavar="DIR",
            default="`~/.cache/hosl`",
            example="/var/cache/hosl",
        ),
    ] = msgspec.field(default_factory=_cache_dir)
    insecure: Annotated[
        bool,
        Shown("allow ws:// to another machine", "Allow a connection without encryption (`ws://`) to another machine."),
    ] = False
    stay: Annotated[
        bool,
        Shown(
            "after a run's end wait for the next one",
            "When a run has ended or was stopped, wait for the next one. Without it the agent ends with the run, and "
            "is not there when the run is resumed.",
            default="no; the systemd unit: yes",
        ),
    ] = False
    max_temperature_c: Annotated[
        float | None,
        Shown(
            "pause before rounds above it (default: off)",
            "Pause before a round while the device is hotter than this, in degrees Celsius. If the hardware says that "
            "it is throttled, the agent pauses without this setting, too.",
            metavar="C",
            default="off",
            example=75.0,
        ),
    ] = None
    min_available_memory: Annotated[
        int | str,
        Shown(
            "stop where the machine has less left (default: 32M; 0: off)",
            "End with code 8 if the machine, or the control group, has less memory left than this. Otherwise the "
            "kernel could kill something. 0 never ends.",
            metavar="SIZE",
        ),
    ] = "32M"
    stall_timeout_s: Annotated[
        float,
        Shown(
            "longest piece of work for the watchdog (default: 1800)",
            "Longest time, in seconds, for one piece of work, such as a forward or reading the data. If one takes "
            "longer, systemd starts the agent again.",
            metavar="S",
        ),
    ] = 1800.0

    @property
    def memory_budget_bytes(self) -> int | None:
        """The budget in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    @property
    def cache_budget_bytes(self) -> int | None:
        """The budget of the cache of frozen blocks in bytes; 0 removes it, None leaves it alone."""
        if self.cache_budget is None:
            return None
        return 0 if str(self.cache_budget) == "0" else parse_bytes(self.cache_budget, "cache_budget")

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
TYPES = typing.get_type_hints(EdgeSettings)
LISTS = (tuple[str, ...] | None,)
"""Of `TYPES`, what is written with commas."""
SHOWN: dict[str, Shown] = {
    name: hint.__metadata__[0] for name, hint in typing.get_type_hints(EdgeSettings, include_extras=True).items()
}


def parse_bytes(text: int | str, field: str = "memory_budget") -> int:
    """Read `400M` as 400,000,000; `400Mi` as 419,430,400. Raises SettingsError, which names `field`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?|)B?", str(text).strip().upper())
    if not match or not float(match.group(1)):
        raise SettingsError(field, text, "use a number of bytes such as 400M or 1.5G")
    return int(float(match.group(1)) * _UNITS[match.group(2)])


def split_fields(text: str) -> list[str]:
    """Take `a, b` apart."""
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
        """Collect the values, and the defaults of the other fields; fields without either are absent."""
        return {name: self.value(name) for name, field in FIELDS.items() if name in self.values or not field.required}

    def value(self, name: str) -> Any:
        """Look up a field's value, or its default. Raises SettingsError for a default that this user has not."""
        return self.values[name] if name in self.values else default_of(name)

    def settings(self) -> EdgeSettings:
        """Make the settings, all checked. Raises SettingsError."""
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
    """Load settings from the options that were given, over the environment, over the file. Raises SettingsError."""
    return resolve(options, config).settings()


def resolve(options: Mapping[str, Any], config: Path | None, environment: Mapping[str, str] = os.environ) -> Resolved:
    """Collect what options, environment and file say. Raises SettingsError for a name that is none."""
    if config is None and CONFIG.exists():
        config = CONFIG

    layers = [
        (str(config), _of_file(config)),
        ("environment", _of_environment(environment)),
        ("option", dict(options)),
    ]
    # The later wins, and is what `hosl-edge config` names.
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        values |= layer
        sources |= dict.fromkeys(layer, source)

    # The token has two more places, the weakest: they are where the unit and install.md put it.
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
    if TYPES[field] in LISTS:
        return split_fields(text)
    try:
        return msgspec.convert(text, TYPES[field], strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(variable, text, f"use {wanted(str(error))}") from error


def masked(server: str) -> str:
    """Hide what stands before an address's host, where a password may be."""
    return re.sub(r"//[^/]*@", "//***@", server)


def default_of(name: str) -> Any:
    """A setting's default. Raises SettingsError for a folder below the home of a user who has none."""
    field = FIELDS[name]
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
    assert (settings.cache_budget_bytes or 0) >= 0, "likewise"
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
