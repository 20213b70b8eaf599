"""`hosl-edge`: the agent on the device that holds the data.

hosl-edge --server wss://host:8765 --token-file token --data train.jsonl --eval validation.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hosl_edge.agent import run_agent
from hosl_edge.settings import load_settings
from hosl_protocol import ExitCode
from hosl_protocol.terminal import add_common_options, run_command, terminable


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    return run_command(_parser(), _run, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hosl-edge", description="Fine-tune the first layers of a model on the data of this device."
    )
    # Settings that are not given stay absent, so that the --config file shows through.
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--server", metavar="URL", help="address of hosl-cloud, wss://host:port (ws:// on this machine only)")
    add("--token-file", metavar="FILE", help="file with the token that hosl-cloud device add made")
    add("--data", metavar="FILE", help="training data, .jsonl or .csv; of images .npz or a folder")
    add("--eval", metavar="FILE", help="held-out data of the same form")
    add("--memory-budget", metavar="SIZE", help="most anonymous memory to take, such as 400M")
    add("--threads", metavar="N", type=int, help="compute threads (default: all CPUs)")
    add("--name", metavar="NAME", help="name of this device (default: its token's name)")
    add("--fields", metavar="A,B", type=_split, help="fields of the data that a run may use")
    add("--share-text", action="store_true", help="allow tasks whose labels are the text itself")
    add(
        "--sync-interval-s", metavar="S", type=float, help="seconds between writes of the journal to disk (default: 30)"
    )
    add("--state-dir", metavar="DIR", help="where the journal lives (default: ~/.local/state/hosl)")
    add("--cache-dir", metavar="DIR", help="where fetched shards live (default: ~/.cache/hosl)")
    add("--insecure", action="store_true", help="allow ws:// to another machine")
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file with any of these settings")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON at the end")
    add_common_options(parser)
    return parser


def _split(text: str) -> list[str]:
    return [field.strip() for field in text.split(",") if field.strip()]


def _run(options: argparse.Namespace) -> int:
    own = {"config", "json", "debug", "log_level", "log_format"}
    given = {name: value for name, value in vars(options).items() if name not in own}
    settings = load_settings(given, options.config)
    with terminable():
        summary = asyncio.run(run_agent(settings))
    if options.json:
        print(json.dumps(dataclasses.asdict(summary)))
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
