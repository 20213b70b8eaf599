"""`--completion SHELL`: a script with which a shell completes a command's words.

shtab makes it of the parser. The device ships the scripts ready-made (`make completion`), and needs no such package.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh")


def add_completion(parser: argparse.ArgumentParser, shipped: Path | None = None) -> None:
    """Add the option; `shipped` is the folder of ready-made scripts, named by their shell."""
    parser.add_argument(
        "--completion",
        action=_Completion,
        choices=SHELLS,
        shipped=shipped,
        help="print a script that completes its words in a shell",
    )


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Make the script."""
    import shtab

    kinds = {"FILE": shtab.FILE, "PATH": shtab.FILE, "DIR": shtab.DIRECTORY}
    todo = [parser]
    while todo:
        for action in todo.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                todo += action.choices.values()
            elif action.metavar in kinds:
                action.complete = kinds[str(action.metavar)]  # type: ignore[attr-defined]
    script: str = shtab.complete(parser, shell)
    return script


class _Completion(argparse.Action):
    def __init__(self, *arguments: Any, shipped: Path | None, **more: Any) -> None:
        super().__init__(*arguments, **{**more, "default": argparse.SUPPRESS})
        self._shipped = shipped

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        shell = str(values)
        if self._shipped is not None:
            print((self._shipped / shell).read_text(encoding="utf-8"), end="")
        else:
            print(completion_script(parser, shell))
        parser.exit()
