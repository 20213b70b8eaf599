"""Makes the scripts with which a shell completes the words of hosl-edge: `make completion`."""

from __future__ import annotations

import argparse
import sys

from hosl_edge.__main__ import COMMANDS, COMPLETION, make_parser
from hosl_protocol.program.completion import SHELLS, completion_script


def whole_parser() -> argparse.ArgumentParser:
    """All of hosl-edge in one parser: it has none itself, for a command may stand behind the options."""
    whole = make_parser("run", COMMANDS["run"][1])
    commands = whole.add_subparsers(metavar="COMMAND")
    for name, (_, description) in COMMANDS.items():
        own = make_parser(name, description)
        commands.add_parser(name, help=description, parents=[own], conflict_handler="resolve")
    return whole


def scripts() -> dict[str, str]:
    """The scripts by their shell."""
    return {shell: completion_script(whole_parser(), shell) + "\n" for shell in SHELLS}


if __name__ == "__main__":
    COMPLETION.mkdir(exist_ok=True)
    for shell, script in scripts().items():
        (COMPLETION / shell).write_text(script, encoding="utf-8")
    sys.exit(0)
