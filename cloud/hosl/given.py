"""The settings of a run as a caller gives them: those of run.toml, as keywords, over a file where one is named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from hosl_cloud.settings import RunConfig, check_given, merge_settings, parse_config, read_config
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.tasks import preset_names, text_of_value

TaskSettings: TypeAlias = "str | Mapping[str, Any]"
"""The name of a preset; or the settings of `[task]`, among them perhaps `preset`."""


def read_given(
    function: str,
    manifest: Manifest,
    *,
    task: TaskSettings | None,
    config: str | os.PathLike[str] | None,
    devices: int | Mapping[str, Any],
    settings: Mapping[str, Any],
) -> RunConfig:
    """Make a checked configuration. Raises SettingsError, which names `function` where a name is no setting's."""
    given = _nested({**settings, "devices": devices if isinstance(devices, Mapping) else {"start_with": devices}})
    if task is not None:
        given["task"] = {"preset": task} if isinstance(task, str) else _texts(task)

    check_given(given, RunConfig, function)
    data = read_config(None if config is None else Path(config))
    merge_settings(data, given)
    if "task" not in data:
        presets = ", ".join(preset_names())
        raise SettingsError("task", None, f"name a preset ({presets}), or give a dict with kind, template and labels")
    return parse_config(data, manifest, function)


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Unfold dotted names: `{"tail.learning_rate": 1e-4}` as `{"tail": {"learning_rate": 1e-4}}`."""
    data: dict[str, Any] = {}
    for name, value in settings.items():
        given: Any = _nested(value) if isinstance(value, Mapping) else value
        for part in reversed(name.split(".")):
            given = {part: given}
        merge_settings(data, given)
    return data


def _texts(task: Mapping[str, Any]) -> dict[str, Any]:
    """Write labels as text: in Python they are often numbers."""
    data = dict(task)
    for name in ("labels", "label_names"):
        if isinstance(data.get(name), (list, tuple)):
            data[name] = [text_of_value(value) or value for value in data[name]]
    return data
