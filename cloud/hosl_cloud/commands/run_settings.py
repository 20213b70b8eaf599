"""The settings of a run as the commands take them: a file, a shipped task, and single settings over both."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hosl_cloud.settings import RunConfig, convert_config, parse_config, read_config
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import Manifest

HOW_TO = (
    "say what to train: --task PRESET (hosl-cloud config --list-presets), or --config FILE, "
    "which hosl-cloud config --example writes"
)


def add_run_settings(parser: argparse.ArgumentParser) -> None:
    """Add `--config`, `--task` and `--set`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="the run's settings, run.toml")
    parser.add_argument("--task", metavar="PRESET", help="a shipped task, where --config names none")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="a setting over --config's"
    )


def has_run_settings(options: argparse.Namespace) -> bool:
    """Tell whether the options describe a run."""
    return bool(options.config or options.task or options.overrides)


def read_run_settings(options: argparse.Namespace, more: Sequence[str] = ()) -> dict[str, Any]:
    """Read what the options say, not checked yet; `more` are settings that --set still wins over. Raises SettingsError.

    A run without a file is called as its task is.
    """
    if not has_run_settings(options):
        raise SettingsError("--config", None, HOW_TO)
    task = [f"task.preset={options.task}"] if options.task else []
    name = [f"name={options.task}"] if options.task and options.config is None else []
    return read_config(options.config, [*name, *task, *more, *options.overrides])


def check_names(options: argparse.Namespace, data: dict[str, Any]) -> None:
    """Check names and types without a bundle; where a service is to check the rest. Raises SettingsError."""
    convert_config(data, where_from(options))


def load_run_settings(options: argparse.Namespace, manifest: Manifest, more: Sequence[str] = ()) -> RunConfig:
    """Read what the options say, and check it against a bundle. Raises SettingsError."""
    return parse_config(read_run_settings(options, more), manifest, where_from(options))


def where_from(options: argparse.Namespace) -> str:
    """Name where the settings come from, for errors."""
    return str(options.config or ("--task" if options.task else "--set"))
