"""The run's configuration file, `run.toml`: what is trained, how, and with how many devices.

`load_config` reads it, fills in what it leaves open, and checks it. A run's RunConfig is frozen, stored with the run
and saved in every checkpoint; `wire_settings` is the part that devices are told. A new field needs a default: settings
that an older version stored have none.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from hosl_edge.settings import parse_bytes
from hosl_protocol.arithmetic.directions import Distribution
from hosl_protocol.arithmetic.rotation import GradientBits
from hosl_protocol.exceptions import MalformedSettings, SettingsError
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.settings import (
    TRAITS,
    Algorithm,
    AnchorPoint,
    Augmentation,
    ClientOptimizer,
    RunSettings,
    WireDtype,
    check_run,
    check_step,
    convert,
    nearest,
    read_toml,
)
from hosl_protocol.run.tasks import Task, load_preset
from hosl_protocol.run.updates import update_shape

MAX_LENGTH = 128
"""Tokens that an example is cut to, where the bundle takes as many."""

Aggregation = Literal["mean", "trimmed-mean", "median"]
"""How the scalars of a round's devices become one."""


class TailSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """`[tail]`: first-order training of the server half."""

    train: Literal["full", "lora", "head"] = "full"
    """Every weight, LoRA adapters (r 8, alpha 16, on the family's targets), or only the output head."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: float = 1e-5
    """η_s before the schedule, above 0 and up to 1e9."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the rate over the run's rounds; `linear` and `cosine` end at 0."""
    warmup_rounds: int = 0
    """Rounds over which the rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, or SGD's L2 term, in [0, 1)."""
    momentum: float = 0.0
    """SGD's momentum, in [0, 1)."""
    clip_norm: float = 1.0
    """Largest L2 norm of the tail's gradient; 0 does not clip."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` runs forward and backward under autocast; weights and optimizer stay float32, and so do the losses
    that HOSL subtracts."""
    device: str = "auto"
    """torch device: `auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`."""
    threads: int = 0
    """CPU threads of torch; 0 leaves its default."""
    micro_batch_tokens: int = 0
    """Most tokens, with padding, of one forward and backward: a device's batch is split, by examples, and the gradients
    add up to those of the whole; 0 does not split."""
    activation_checkpointing: bool = False
    """Keep only what goes into each block; the backward computes the rest again."""
    compile: bool = False
    """Compile each block with `torch.compile` when it first runs."""
    ranks: Literal["shard", "replicate"] = "shard"
    """Under torchrun: each rank holds a part of every tensor (FSDP2), or the whole tail (data parallel)."""


class EvaluationSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """`[evaluation]`: rounds on the devices' held-out data."""

    every: int = 50
    """Rounds between evaluations; 0 evaluates only at the end. Devices without held-out data are left out."""
    patience: int = 0
    """Evaluations without improvement after which the run stops; 0 never stops early."""
    start: bool = True
    """Also before the first round."""
    deadline_s: float = 3600.0
    """Longest time for one as a whole; what a device has not sent by then does not count. A strict run has none."""


class CheckpointSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """`[checkpoints]`: what a run that is cut off goes on from; one is also made at every evaluation."""

    every: int = 50
    """Rounds between checkpoints; 0 makes none by rounds."""
    minutes: float = 10.0
    """Time after which one is due; 0 makes none by time."""
    keep: int = 2
    """Newest checkpoints that stay, beside the best."""


class CacheSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """`[cache]`: activations of frozen runs that the service keeps on its disk."""

    bytes: int | str = 0
    """Most bytes of all that is kept, for example `2G`; 0 keeps nothing, and uses nothing that is kept."""

    @property
    def budget_bytes(self) -> int:
        """The number of bytes. Raises SettingsError."""
        return 0 if str(self.bytes) == "0" else parse_bytes(self.bytes, "cache.bytes")


class DeviceSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """`[devices]`: who takes part, and how long they are waited for."""

    start_with: int = 1
    """Devices that must be ready before the first round."""
    per_round: int = 0
    """Devices sampled each round; 0 takes every ready one."""
    quorum: int = 1
    """Devices whose batches a round needs: with fewer it starts again."""
    weighting: Literal["equal", "examples"] = "equal"
    """Weight of a device in the average: the same for each, or its examples in the batch."""
    aggregation: Aggregation = "mean"
    """Average over devices of what moves their weights; `trimmed-mean` and `median` bear a few devices that lie."""
    trim: float = 0.1
    """Share of the devices that `trimmed-mean` drops at either end, below 0.5."""
    clip: float = 0.0
    """Largest number that counts in full, in units of the median magnitude of its direction; first-order: the longest
    gradient, in units of the median length of the devices' gradients. 0 does not clip."""
    strikes: int = 3
    """Answers that no working device sends after which a device is put aside; 0 never does."""
    round_deadline_s: float = 120.0
    """Longest wait for a device at each stage of a round; who is late is left out of it."""
    rejoin_deadline_s: float = 600.0
    """Longest wait for devices where fewer than the quorum are left, before the run fails."""


class TrackingSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """`[tracking]`: who else gets the run's settings and figures; runs/curves/trackers.py."""

    mlflow: str = ""
    """URI of an MLflow server, or of its folder or database; empty for none."""
    wandb: str = ""
    """Project of Weights & Biases; empty for none."""


class RunConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """`run.toml`."""

    task: Task
    """`[task]`: `preset = "sst2"` and fields that override it, or all fields of a task but perhaps `name`."""
    name: str = "run"
    """Start of the run's id, 1 to 40 characters of `A-Za-z0-9._-`."""
    algorithm: Algorithm = "ho-sfl"
    seed: int = 0
    rounds: int = 100
    directions: int = 2
    probe_step: float = 1e-3
    gradient_bits: GradientBits = 1
    distribution: Distribution = "rademacher"
    anchor: AnchorPoint = "clean"
    batch_size: int = 16
    max_length: int = MAX_LENGTH
    wire_dtype: WireDtype = "float32"
    report_every: int = 10
    strict: bool = False
    """Give the same bits every time: gradients add up in the order of the devices' names, a round takes place only
    with all the devices it began with, and no device is too late."""
    baseline: Literal["", "first-order", "zeroth-order"] = ""
    """`hosl-cloud simulate` only: train both halves by backpropagation, or both without; simulation/baselines.py."""
    client: ClientOptimizer = ClientOptimizer()
    tail: TailSettings = TailSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    devices: DeviceSettings = DeviceSettings()
    augmentation: Augmentation = Augmentation()
    tracking: TrackingSettings = TrackingSettings()
    cache: CacheSettings = CacheSettings()

    @property
    def subtracts_losses(self) -> bool:
        """Whether the device's step comes from differences of losses, which need every digit of float32."""
        return TRAITS[self.algorithm].subtracts_losses

    def wire_settings(self) -> RunSettings:
        """The part that devices are told."""
        return RunSettings(
            task=self.task,
            algorithm=self.algorithm,
            seed=self.seed,
            rounds=self.rounds,
            directions=self.directions,
            probe_step=self.probe_step,
            gradient_bits=self.gradient_bits,
            distribution=self.distribution,
            anchor=self.anchor,
            batch_size=self.batch_size,
            max_length=self.max_length,
            wire_dtype=self.wire_dtype,
            client=self.client,
            report_every=self.report_every,
            augmentation=self.augmentation,
        )


def load_config(path: Path | None, manifest: Manifest, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check `run.toml` (none: all defaults) against the bundle, with `KEY=VALUE` overrides.

    Raises SettingsError.
    """
    return parse_config(read_config(path, overrides), manifest, where=str(path or "run.toml"))


def read_config(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """`run.toml` (none: empty) with `KEY=VALUE` overrides, not checked yet. Raises SettingsError."""
    data = {} if path is None else read_toml(path, "--config")
    override_config(data, overrides, "--set")
    return data


def override_config(data: dict[str, Any], overrides: Sequence[str], option: str) -> None:
    """Put `KEY=VALUE` settings, which `option` gave, over those of a mapping. Raises SettingsError."""
    for override in overrides:
        given = _parse_override(override, option)
        check_given(given, RunConfig, f"{option} {override}")
        merge_settings(data, given)


def check_given(given: dict[str, Any], kind: type[msgspec.Struct], where: str) -> None:
    """Raise MalformedSettings for a name that no setting has, or a value of another type than it takes."""
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for name, value in given.items():
        if kind is Task and name == "preset":
            continue

        if name not in types:
            elsewhere = [dotted for dotted in _dotted(RunConfig) if dotted.rpartition(".")[2] == name]
            remedy = f"did you mean {elsewhere[0]}?" if elsewhere else nearest(name, types)
            raise MalformedSettings(where, "", f"no setting has the name {name}; {remedy}")
        if isinstance(value, dict) and _is_table(types[name]):
            check_given(value, types[name], where)
        else:
            convert(value, types[name], where)


def _dotted(kind: type[msgspec.Struct], before: str = "") -> Iterator[str]:
    """Yield all settings by their whole names."""
    for field in msgspec.structs.fields(kind):
        if _is_table(field.type):
            yield from _dotted(field.type, f"{before}{field.name}.")
        else:
            yield before + field.name


def _is_table(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


def _parse_override(text: str, option: str) -> dict[str, Any]:
    """Parse `tail.learning_rate=1e-4` to a nested mapping; a value that is no TOML is taken for a string."""
    key, separator, value = text.partition("=")
    # As TOML, and where that fails quoted: a shell has taken the quotes of a string.
    for written in (value, msgspec.json.encode(value).decode()) if separator else ():
        with contextlib.suppress(msgspec.DecodeError):
            data: dict[str, Any] = msgspec.toml.decode(f"{key}={written}")
            return data
    raise SettingsError(option, text, "use KEY=VALUE, for example tail.learning_rate=1e-4")


def merge_settings(data: dict[str, Any], more: dict[str, Any]) -> None:
    """Put `more` over `data`, table by table, in place."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            merge_settings(data[key], value)
        else:
            data[key] = value


OWN_TASK = "own"
"""Name of a task without one."""

NORM_DIRECTIONS = 8
"""Of HO-SFL where norms train: they cost forwards alone. HOSL's are dear, each sends a round's activations twice."""

NORM_CLIENT = {"optimizer": "adamw", "learning_rate": 3e-3}
"""What suits norms, which are so few that AdamW's moments cost nothing (examples/study)."""


FIRST_ORDER_RATES = {"norm": 1e-2, "lora": 3e-3, "lora-b": 3e-3}
"""AdamW's on the device with exact gradients, by what trains; 1e-3 for everything else."""

GRADIENT_SHARE = 1 / 50
"""Most bytes of a gradient, as a share of those of a round's activations, where the cloud chooses `gradient_bits`."""


def _with_defaults(data: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Fill in what suits the algorithm and the part that the device trains, where `data` leaves it open."""
    data = {"algorithm": "frozen" if manifest.train == "none" else "ho-sfl", **data}
    algorithm, is_norm = data["algorithm"], manifest.train == "norm"
    suited: dict[str, Any] = NORM_CLIENT if is_norm else {}
    if algorithm == "first-order":
        suited = {"optimizer": "adamw", "learning_rate": FIRST_ORDER_RATES.get(manifest.train, 1e-3)}

    client = data.get("client", {})
    if suited and isinstance(client, dict) and "optimizer" not in client:
        data = {**data, "client": {**suited, **client}}
    if is_norm and algorithm == "ho-sfl":
        data = {"directions": NORM_DIRECTIONS, **data}
    return {"max_length": min(MAX_LENGTH, manifest.max_length), **data}


def _gradient_bits(config: RunConfig, manifest: Manifest) -> GradientBits:
    """Choose the most bits with which a gradient is small beside a round's activations; one bit where none is."""
    most_bytes = GRADIENT_SHARE * 4 * config.batch_size * config.max_length * manifest.width
    choices: tuple[GradientBits, ...] = (8, 4, 2)
    for bits in choices:
        settings = msgspec.structs.replace(config, gradient_bits=bits).wire_settings()
        if update_shape(settings, manifest).size_bytes <= most_bytes:
            return bits
    return 1


def parse_config(data: dict[str, Any], manifest: Manifest, where: str = "run.toml") -> RunConfig:
    """Make a checked configuration from a mapping; what it leaves open follows from what the device trains.

    Raises SettingsError.
    """
    # Defaults before the check of types, and the check against the bundle at the end, when all is filled in.
    config = convert_config(_with_defaults(data, manifest), where)
    if manifest.image is not None:
        # An image has as many positions as it has; nothing is cut to a length.
        config = msgspec.structs.replace(config, max_length=manifest.max_length)
    if TRAITS[config.algorithm].sends_gradient and "gradient_bits" not in data:
        config = msgspec.structs.replace(config, gradient_bits=_gradient_bits(config, manifest))
    _check(config, manifest)
    return config


def convert_config(data: dict[str, Any], where: str) -> RunConfig:
    """Make a configuration whose names and types are right, not checked against a bundle. Raises SettingsError."""
    if isinstance(task := data.get("task"), dict):
        data = {**data, "task": _whole_task(task)}
    config: RunConfig = convert(data, RunConfig, where)
    return config


def _whole_task(task: dict[str, Any]) -> dict[str, Any]:
    """Fill in what the task's preset says; without one it is a task of the user's own."""
    if "preset" not in task:
        return {"name": OWN_TASK, **task}

    preset = load_preset(str(task["preset"]))
    if "labels" in task:
        preset.pop("label_names", None)  # of other labels
    return {**preset, **{key: value for key, value in task.items() if key != "preset"}}


def _check(config: RunConfig, manifest: Manifest) -> None:
    check_run(config.wire_settings(), manifest)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,40}", config.name):
        raise SettingsError("name", config.name, "use 1 to 40 characters of A-Za-z0-9._-")

    check_step("tail.learning_rate", config.tail.learning_rate)
    for name, value in (
        ("devices.round_deadline_s", config.devices.round_deadline_s),
        ("devices.rejoin_deadline_s", config.devices.rejoin_deadline_s),
        ("evaluation.deadline_s", config.evaluation.deadline_s),
    ):
        if not (math.isfinite(value) and value > 0.0):
            raise SettingsError(name, value, "use a number above 0")

    for name, value in (("tail.momentum", config.tail.momentum), ("tail.weight_decay", config.tail.weight_decay)):
        if not 0.0 <= value < 1.0:
            raise SettingsError(name, value, "use a number from 0 up to, not including, 1")

    for name, count in (
        ("evaluation.every", config.evaluation.every),
        ("evaluation.patience", config.evaluation.patience),
        ("checkpoints.every", config.checkpoints.every),
        ("checkpoints.minutes", config.checkpoints.minutes),
        ("devices.per_round", config.devices.per_round),
        ("devices.strikes", config.devices.strikes),
        ("devices.clip", config.devices.clip),
        ("tail.warmup_rounds", config.tail.warmup_rounds),
        ("tail.clip_norm", config.tail.clip_norm),
        ("tail.threads", config.tail.threads),
        ("tail.micro_batch_tokens", config.tail.micro_batch_tokens),
    ):
        if not (math.isfinite(count) and count >= 0):
            raise SettingsError(name, count, "use 0 or more")

    if config.checkpoints.keep < 1:
        raise SettingsError("checkpoints.keep", config.checkpoints.keep, "use 1 or more")
    _ = config.cache.budget_bytes  # raises for what is no size
    _check_devices(config.devices)


def _check_devices(devices: DeviceSettings) -> None:
    for name in ("start_with", "quorum"):
        if getattr(devices, name) < 1:
            raise SettingsError(f"devices.{name}", getattr(devices, name), "use 1 or more")
    if 0 < devices.per_round < devices.quorum:
        remedy = f"use at most devices.per_round, {devices.per_round}"
        raise SettingsError("devices.quorum", devices.quorum, remedy)
    if not 0.0 <= devices.trim < 0.5:
        raise SettingsError("devices.trim", devices.trim, "use a number from 0 up to, not including, 0.5")
