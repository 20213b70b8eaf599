"""What somebody needs to know before starting a run, and what a run was started with, over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from hosl_cloud.service.openapi import Call, Operation
from hosl_cloud.settings import RunConfig, convert_config, parse_config
from hosl_cloud.storage.store import Store
from hosl_protocol.exceptions import HoslError, SettingsError
from hosl_protocol.run.manifest import MANIFEST, load_manifest
from hosl_protocol.run.tasks import Task, load_preset, preset_names


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle that a run can be started of."""

    name: str
    problem: str = ""
    """Why it cannot be used; empty where it can."""
    model: str = ""
    split: int = 0
    """Blocks on the device, of `blocks`."""
    blocks: int = 0
    train: str = ""
    """What trains of the device's half."""
    takes_images: bool = False
    max_length: int = 0


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """A task that hosl knows by name."""

    name: str
    kind: str
    fields: list[str]
    """Of an example, which a device must have."""
    labels: list[str]


class BundleList(msgspec.Struct, frozen=True):
    """The bundles by name, and the tasks that runs of them can have."""

    folder: str
    """Where the bundles are."""
    bundles: list[Bundle]
    presets: list[Preset]


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """A setting of a run, in effect."""

    name: str
    value: Any
    default: Any
    """What it would be unless somebody had said otherwise, with the same algorithm, task preset and bundle."""
    is_changed: bool


class SettingList(msgspec.Struct, frozen=True):
    """All settings of a run, in the order of run.toml."""

    settings: list[Setting]


def setup_operations(store: Store, bundles: Path) -> list[Operation]:
    """List the operations."""

    async def listing(call: Call) -> BundleList:
        found = await asyncio.to_thread(describe_bundles, bundles)
        return BundleList(str(bundles), found, describe_presets())

    async def settings(call: Call) -> SettingList:
        row = await asyncio.to_thread(store.run, call.path["run"])
        return SettingList(await asyncio.to_thread(describe_settings, row.settings.data, row.bundle))

    return [
        Operation("GET", "/v1/bundles", "The bundles and tasks that a run can have.", listing, BundleList),
        Operation("GET", "/v1/runs/{run}/settings", "A run's settings, and their defaults.", settings, SettingList),
    ]


def describe_bundles(folder: Path) -> list[Bundle]:
    """Describe what is in the folder of bundles, by name. Slow, off the event loop."""
    return [_describe(path) for path in sorted(folder.iterdir()) if (path / MANIFEST).is_file()]


def _describe(path: Path) -> Bundle:
    try:
        manifest = load_manifest(path)
    except HoslError as error:
        return Bundle(name=path.name, problem=str(error))
    return Bundle(
        name=path.name,
        model=manifest.model,
        split=manifest.split,
        blocks=manifest.blocks,
        train=manifest.train,
        takes_images=manifest.image is not None,
        max_length=manifest.max_length,
    )


def describe_presets() -> list[Preset]:
    """Describe the shipped tasks, by name."""
    tasks = {name: msgspec.convert(load_preset(name), Task) for name in preset_names()}
    return [
        Preset(name=name, kind=task.kind, fields=[*task.fields], labels=[*task.labels]) for name, task in tasks.items()
    ]


def describe_settings(data: dict[str, Any], bundle: Path) -> list[Setting]:
    """Compare a run's stored settings with what they would be by themselves. Slow, off the event loop."""
    defaults = dict(_flatten(_defaults(data, bundle)))
    return [
        Setting(name=name, value=value, default=defaults.get(name), is_changed=value != defaults.get(name))
        for name, value in _flatten(data)
    ]


def _defaults(data: dict[str, Any], bundle: Path) -> dict[str, Any]:
    """The settings with nothing given but the algorithm, and the task where it is a preset."""
    task, algorithm = data.get("task"), data.get("algorithm")
    name = task.get("name") if isinstance(task, dict) else None
    # A task of the user's own has no defaults; one has to be there for the others to be filled in.
    given: dict[str, Any] = {"task": {"preset": name} if name in preset_names() else task}
    if algorithm is not None:
        given["algorithm"] = algorithm
    config: RunConfig | None = None
    with contextlib.suppress(SettingsError):  # of another version of hosl
        config = convert_config(given, "settings")
    with contextlib.suppress(HoslError):  # a bundle that is gone, or that such a task does not fit
        config = parse_config(given, load_manifest(bundle))
    if config is None:
        return {}

    defaults: dict[str, Any] = msgspec.to_builtins(config)
    defaults["algorithm"] = next(each.default for each in msgspec.structs.fields(RunConfig) if each.name == "algorithm")
    if name not in preset_names():
        defaults["task"] = {}
    return defaults


def _flatten(data: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all settings by their whole names, as a file has them: tuples are lists."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{before}{name}.")
        else:
            yield before + name, [*value] if isinstance(value, tuple) else value
