"""`hosl-cloud config`: an example of a run.toml, the shipped tasks, and whether a run.toml can be used."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hosl_cloud.commands.own_data import look_at
from hosl_cloud.commands.run_example import describe_presets, example_config
from hosl_cloud.settings import convert_config, load_config, read_config
from hosl_protocol.exceptions import ExitCode, SettingsError
from hosl_protocol.program.terminal import add_common_options
from hosl_protocol.run.manifest import load_manifest
from hosl_protocol.run.tasks import check_task, preset_fields


def add_config(parser: argparse.ArgumentParser) -> None:
    """Options of `hosl-cloud config`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--example",
        nargs="?",
        const="",
        metavar="TASK",
        help="print a run.toml for a preset or a kind of task (default: sequence-classification)",
    )
    what.add_argument("--list-presets", action="store_true", help="show the shipped tasks")
    what.add_argument("--check", type=Path, metavar="FILE", help="say whether a run.toml can be used")
    parser.add_argument("--data", type=Path, metavar="FILE", help="take --example's columns and labels from this file")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="the bundle that --check is for")
    parser.add_argument("--json", action="store_true", help="print --list-presets as JSON")
    add_common_options(parser)
    parser.set_defaults(command=_config)


def _config(options: argparse.Namespace) -> int:
    if options.data is not None and options.example is None:
        raise SettingsError("--data", str(options.data), "it belongs with --example")
    if options.example is not None:
        own = None if options.data is None else look_at(options.data)
        print(example_config(options.example, own), end="")
    elif options.list_presets:
        _list_presets(options)
    else:
        _check(options)
    return int(ExitCode.OK)


def _list_presets(options: argparse.Namespace) -> None:
    presets = describe_presets()
    if options.json:
        print(json.dumps({"presets": presets}))
        return
    for each in presets:
        print(f"{each['preset']:<24} {each['kind']}, {each['metric']}")
        print(f"{'':<24} fields {', '.join(each['fields'])}")
        print(f"{'':<24} labels {_labels(each)}")


def _labels(preset: dict[str, Any]) -> str:
    if not preset["labels"]:
        return "none: the text itself"
    names = f", or {', '.join(preset['label_names'])}" if preset["label_names"] else ""
    return f"{', '.join(preset['labels'])}{names}"


def _check(options: argparse.Namespace) -> None:
    path: Path = options.check
    if options.bundle is None:
        config = convert_config(read_config(path), str(path))
        check_task(config.task)
        checked = "its names and types; --bundle DIR checks the rest"
    else:
        config = load_config(path, load_manifest(options.bundle))
        checked = f"with {options.bundle}"
    task = config.task
    print(f"{path} can be used: {config.rounds} rounds of {config.algorithm}, task {task.name} ({task.kind})")
    print(f"checked {checked}")
    if not set(task.fields) <= set(preset_fields(task.name) or ()):
        print(f"devices need: --fields {','.join(task.fields)}")
