"""The agent's settings as options of its command, and as an example file; both follow from `EdgeSettings`."""

from __future__ import annotations

import argparse
import json
import textwrap

from hosl_edge.settings import SHOWN, TYPES, default_of, split_fields

_HEAD = """\
# Settings of hosl-edge: /etc/hosl/edge.toml, or --config FILE.
# An option wins over a variable HOSL_EDGE_... in the environment, and that over this file; `hosl-edge config` tells.
# What has a # before it is the default, or an example where there is none.
"""
_WIDTH = 120
_NUMBERS = (float, float | None)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting; one that is not given stays absent, so that environment and file show through."""
    group = parser.add_argument_group("settings")
    for name, shown in SHOWN.items():
        if TYPES[name] is bool:
            group.add_argument(option_of(name), action="store_true", default=argparse.SUPPRESS, help=shown.help)
            continue
        kind = TYPES[name]
        read = (
            split_fields
            if kind == tuple[str, ...] | None
            else int
            if kind is int
            else float
            if kind in _NUMBERS
            else str
        )
        group.add_argument(
            option_of(name), metavar=shown.metavar, type=read, default=argparse.SUPPRESS, help=shown.help
        )


def option_of(name: str) -> str:
    """A setting's option: `--memory-budget`."""
    return f"--{name.replace('_', '-')}"


def example_file() -> str:
    """Make a TOML file with every setting, explained."""
    parts = [_HEAD]
    for name, shown in SHOWN.items():
        words = shown.meaning + (f" Default: {shown.default}." if shown.default else "")
        lines = textwrap.wrap(words.replace("`", ""), _WIDTH, initial_indent="# ", subsequent_indent="# ")
        value = default_of(name) if shown.example is None else shown.example
        parts.append("\n".join([*lines, f"{'' if shown.is_given else '# '}{name} = {json.dumps(value)}"]) + "\n")
    return "\n".join(parts)
