"""`hosl-cloud checkpoint`: a run's checkpoints, of a running service or of a data folder without one."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from hosl_cloud.commands.asking import RUN_HELP, Parser, accuracy_of, add_command, finish, on_run, run_path, settle_run
from hosl_cloud.commands.client import client_of
from hosl_cloud.commands.offline import find_offline
from hosl_cloud.exceptions import ServiceError
from hosl_protocol.exceptions import ExitCode


def add_checkpoint(parser: Parser) -> None:
    """Options of `hosl-cloud checkpoint`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = add_command(
        commands,
        "list",
        "show a run's checkpoints",
        on_run("GET", "/checkpoints"),
        _show_checkpoints,
        lambda folder, options: folder.checkpoints(options.run),
    )
    listing.add_argument("run", metavar="RUN", help=RUN_HELP)
    export = commands.add_parser("export", help="copy a checkpoint of the tail to a file")
    export.add_argument("run", metavar="RUN", help=RUN_HELP)
    export.add_argument("--round", type=int, metavar="N", help="of which round (default: the newest)")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="a safetensors file; must not exist")
    finish(export, _export)


def _export(options: argparse.Namespace) -> int:
    out: Path = options.out
    if out.exists():
        raise ServiceError(f"{out} exists: choose another --out, or delete it")

    folder = find_offline(options)
    if folder is None:
        client = client_of(options)
        settle_run(options, client)
        known = client.request("GET", run_path(options.run, "/checkpoints"))["checkpoints"]
        round_ = _choose(options, [each["round"] for each in known])
        client.download(run_path(options.run, f"/checkpoints/{round_}"), out)
    else:
        with folder:
            settle_run(options, folder)
            paths = folder.checkpoint_files(options.run)
        round_ = _choose(options, list(paths))
        if round_ not in paths:
            raise ServiceError(f"no checkpoint of round {round_}; there are: {', '.join(map(str, paths))}")
        part = out.with_name(out.name + ".part")
        shutil.copyfile(paths[round_], part)
        part.replace(out)
    print(json.dumps({"round": round_, "out": str(out)}) if options.json else f"the tail at round {round_} is in {out}")
    return int(ExitCode.OK)


def _choose(options: argparse.Namespace, rounds: list[int]) -> int:
    """The round that was asked for, or the newest."""
    if not rounds:
        raise ServiceError(f"run {options.run} has no checkpoint yet")
    return int(rounds[-1] if options.round is None else options.round)


def _show_checkpoints(answer: dict[str, Any]) -> None:
    for each in answer["checkpoints"]:
        score = accuracy_of(each) + ("  best" if each["is_best"] else "")
        print(f"round {each['round']:<8} {each['size_bytes'] / 1e6:9.1f} MB  {each['sha256'][:16]}{score}")
