"""`hosl-cloud checkpoint` and `hosl-cloud cache`: a run's checkpoints, and what is kept of devices' activations.

Checkpoints are those of a running service, or of a data folder without one; the cache is always that of a folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hosl_cloud.commands.asking import RUN_HELP, Parser, accuracy_of, add_command, finish, on_run, run_path, settle_run
from hosl_cloud.commands.client import client_of
from hosl_cloud.commands.offline import find_offline
from hosl_cloud.exceptions import ServiceError
from hosl_cloud.storage.data_folder import CACHE, add_data_dir
from hosl_cloud.storage.kept_data import KeptEntry, list_kept, remove_kept
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.program.terminal import add_common_options


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


def add_cache(parser: Parser) -> None:
    """Options of `hosl-cloud cache`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="show what is kept of devices' activations")
    remove = commands.add_parser("rm", help="delete kept activations")
    remove.add_argument("which", metavar="WHICH", nargs="*", help="a name from the list, a device or a bundle")
    remove.add_argument("--all", action="store_true", help="everything that is kept")
    for command, act in ((listing, _list_kept), (remove, _remove_kept)):
        command.add_argument("--json", action="store_true", help="print the answer as JSON")
        add_data_dir(command)
        add_common_options(command)
        command.set_defaults(command=act)


def _list_kept(options: argparse.Namespace) -> int:
    _show_kept(options, list_kept(options.data_dir / CACHE), "nothing is kept")
    return int(ExitCode.OK)


def _remove_kept(options: argparse.Namespace) -> int:
    if bool(options.which) == options.all:
        raise ServiceError("say what to delete: a name of `hosl-cloud cache list`, a device, a bundle, or --all")
    folder = options.data_dir / CACHE
    which = [each.name for each in list_kept(folder)] if options.all else options.which
    gone = remove_kept(folder, which)
    if options.which and not gone:
        raise ServiceError(f"nothing of {', '.join(options.which)} is kept: see hosl-cloud cache list")
    _show_kept(options, gone, "nothing was kept")
    return int(ExitCode.OK)


def _show_kept(options: argparse.Namespace, entries: Sequence[KeptEntry], otherwise: str) -> None:
    if options.json:
        print(json.dumps({"kept": [_plain_kept(each) for each in entries]}))
        return
    for each in entries:
        data, when = each.data, time.strftime("%Y-%m-%d %H:%M", time.localtime(each.used_at))
        size = f"{each.size_bytes / 1e6:9.1f} MB"
        print(f"{each.name}  {data.device}  {data.part}  {data.task} on {data.bundle}  {size}  used {when}")
    if not entries:
        print(otherwise)


def _plain_kept(entry: KeptEntry) -> dict[str, Any]:
    data = entry.data
    return {
        "name": entry.name,
        "device": data.device,
        "part": data.part,
        "examples": data.examples,
        "bundle": data.bundle,
        "task": data.task,
        "dtype": data.dtype,
        "size_bytes": entry.size_bytes,
        "used_at": entry.used_at,
    }
