"""`hosl-cloud bundle`: the folder of the bundles that `run start` takes by name. No service is needed for it."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hosl_cloud.exceptions import ServiceError
from hosl_cloud.storage.data_folder import BUNDLES, DATABASE, add_data_dir, hint, make_data_dir
from hosl_cloud.storage.records import UNENDED, RunRow
from hosl_cloud.storage.store import Store
from hosl_protocol.exceptions import ExitCode, SettingsError
from hosl_protocol.program.terminal import add_common_options
from hosl_protocol.run.manifest import MANIFEST, BundleError, check_files, load_manifest

Parser = argparse.ArgumentParser


def add_bundle(parser: Parser) -> None:
    """Options of `hosl-cloud bundle`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser("add", help="copy a bundle into the service's folder")
    add.add_argument("path", type=Path, metavar="PATH", help="what hosl-export wrote")
    add.add_argument("--name", metavar="N", help="what runs call it (default: the folder's own name)")
    add.set_defaults(command=_add)
    listing = commands.add_parser("list", help="show the bundles")
    listing.set_defaults(command=_list)
    remove = commands.add_parser("rm", help="delete a bundle that no run needs any more")
    remove.add_argument("name", metavar="NAME")
    remove.set_defaults(command=_remove)
    for command in (add, listing, remove):
        command.add_argument(
            "--bundles", type=Path, metavar="DIR", help="the folder, where serve was given another (default: its own)"
        )
        command.add_argument("--json", action="store_true", help="print the answer as JSON")
        add_data_dir(command)
        add_common_options(command)


def _folder(options: argparse.Namespace) -> Path:
    return Path(options.bundles or options.data_dir / BUNDLES)


def _add(options: argparse.Namespace) -> int:
    source: Path = options.path
    name = _checked(options.name or source.resolve().name, "--name")
    target = _folder(options) / name
    if target.exists():
        raise ServiceError(f"there is a bundle {name}: choose another --name, or delete it with bundle rm")
    manifest = load_manifest(source)
    check_files(source, manifest)

    make_data_dir(options.data_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: a service may be asked for it just now. Not a link: a service takes nothing from elsewhere.
    with tempfile.TemporaryDirectory(prefix=".adding-", dir=target.parent) as part:
        for path in (*(entry.path for entry in manifest.files), MANIFEST):
            (Path(part) / name / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / path, Path(part) / name / path)
        (Path(part) / name).rename(target)

    if options.json:
        print(json.dumps({"name": name, "path": str(target)}))
    else:
        print(f"bundle {name} is in {target}")
        print(f"begin a run of it with: {hint(f'run start --bundle {name} --task PRESET', options.data_dir)}")
    return int(ExitCode.OK)


def _checked(name: str, field: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", name):
        raise SettingsError(field, name, "use 1 to 64 characters of A-Za-z0-9._-, no dot first")
    return name


def _list(options: argparse.Namespace) -> int:
    folder = _folder(options)
    names = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}") if not path.parent.name.startswith("."))
    runs = _runs(options)
    bundles = [_describe(folder / name, runs) for name in names]
    if options.json:
        print(json.dumps({"bundles": bundles}))
        return int(ExitCode.OK)
    for each in bundles:
        print(_line(each))
    if not bundles:
        print(f"no bundle is in {folder}; add one with: {hint('bundle add PATH', options.data_dir)}")
    return int(ExitCode.OK)


def _describe(bundle: Path, runs: list[RunRow]) -> dict[str, Any]:
    users = [run for run in runs if run.bundle.resolve() == bundle.resolve()]
    facts: dict[str, Any] = {
        "name": bundle.name,
        "runs": [run.id for run in users],
        "unended": [run.id for run in users if run.state in UNENDED],
    }
    try:
        manifest = load_manifest(bundle)
    except BundleError as error:
        return {**facts, "problem": str(error)}
    return {
        **facts,
        "model": manifest.model,
        "split": manifest.split,
        "blocks": manifest.blocks,
        "train": manifest.train,
        "size_bytes": sum(entry.size_bytes for entry in manifest.files),
        "problem": "",
    }


def _line(bundle: dict[str, Any]) -> str:
    if bundle["problem"]:
        return f"{bundle['name']:<24} {bundle['problem']}"
    cut = f"split {bundle['split']} of {bundle['blocks']}, trains {bundle['train']}"
    runs = f", needed by {', '.join(bundle['unended'])}" if bundle["unended"] else ""
    return f"{bundle['name']:<24} {bundle['size_bytes'] / 1e6:9.1f} MB  {bundle['model']}, {cut}{runs}"


def _runs(options: argparse.Namespace) -> list[RunRow]:
    database = options.data_dir / DATABASE
    if not database.exists():
        return []
    store = Store(database, reads_only=True)
    try:
        return store.runs()
    finally:
        store.close()


def _remove(options: argparse.Namespace) -> int:
    name = _checked(options.name, "NAME")
    bundle = _folder(options) / name
    if not (bundle / MANIFEST).exists():
        raise ServiceError(f"no bundle {name} is in {bundle.parent}; {hint('bundle list', options.data_dir)} shows all")
    facts = _describe(bundle, _runs(options))
    if needed := facts["unended"]:
        stop = hint(f"run stop {needed[0]}", options.data_dir)
        raise ServiceError(f"bundle {name} is needed by {', '.join(needed)}: let it end, or stop it with {stop}")

    shutil.rmtree(bundle)
    if options.json:
        print(json.dumps({"name": name, "runs": facts["runs"]}))
        return int(ExitCode.OK)
    print(f"bundle {name} is deleted")
    if facts["runs"]:
        print(f"to merge or resume {', '.join(facts['runs'])} it has to be there again, or merge --bundle names a copy")
    return int(ExitCode.OK)
