"""`hosl-cloud`: the trainer service.

hosl-cloud init --name cloud.example.org
hosl-cloud serve --bundle bundle/ --config run.toml
hosl-cloud device add NAME
hosl-cloud merge RUN --out trained/
hosl-cloud simulate --bundle bundle/ --config run.toml --data train.jsonl --devices 100 --per-round 10
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hosl_cloud.api_client import SERVICE_FILE
from hosl_cloud.devices_command import add_data_dir, add_device, add_init
from hosl_cloud.exceptions import ServiceError
from hosl_cloud.listen import Listen, write_service_file
from hosl_cloud.settings import RunConfig, load_config
from hosl_cloud.store import Store
from hosl_cloud.tokens import ADMIN_TOKEN_FILE, load_or_make_secret, load_or_make_token
from hosl_protocol import BundleError, ExitCode, Manifest, SettingsError, check_files, load_manifest
from hosl_protocol.terminal import add_common_options, run_command

if TYPE_CHECKING:
    from hosl_cloud.run import Run

DATABASE = "hosl.sqlite"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    return run_command(_parser(), lambda options: options.command(options), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hosl-cloud", description="Train the later layers of a model with devices that hold the first ones."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_init(commands.add_parser("init", help="make a CA, a certificate and an admin token"))
    _add_serve(commands.add_parser("serve", help="run the service and one training run"))
    add_device(commands.add_parser("device", help="make, list and revoke devices' tokens"))
    _add_merge(commands.add_parser("merge", help="join a run's halves into a Hugging Face model"))
    _add_simulate(commands.add_parser("simulate", help="run a whole fleet of virtual devices in this process"))
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="what hosl-export wrote")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the run's settings, run.toml")
    add_data_dir(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8765, help="port; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="the certificate's key, PEM")
    parser.add_argument("--insecure", action="store_true", help="listen beyond this machine without TLS")
    parser.add_argument("--once", action="store_true", help="leave when the run has ended")
    parser.add_argument("--new", action="store_true", help="begin a new run, even where an unfinished one could go on")
    add_common_options(parser)
    parser.set_defaults(command=_serve)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's id, as serve prints it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="also write a PEFT adapter (LoRA on both halves)")
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="by evaluation, or the newest (default: best)"
    )
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="the bundle, if it has moved since the run")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    add_data_dir(parser)
    add_common_options(parser)
    parser.set_defaults(command=_merge)


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="what hosl-export wrote")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the run's settings, run.toml")
    parser.add_argument("--task", metavar="PRESET", help="a shipped task, where --config names none")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="training data, dealt out to devices")
    parser.add_argument("--eval", type=Path, metavar="FILE", help="held-out data")
    parser.add_argument("--devices", type=int, default=10, metavar="M", help="virtual devices (default: %(default)s)")
    parser.add_argument("--per-round", type=int, default=0, metavar="K", help="devices sampled each round (0: all)")
    parser.add_argument(
        "--partition", default="iid", metavar="HOW", help="iid, or dirichlet:ALPHA (default: %(default)s)"
    )
    parser.add_argument(
        "--baseline", choices=("first-order", "zeroth-order"), help="train both halves so, instead of the algorithm"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="a setting over --config's"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="compute threads of the devices (0: all)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write a table, one row a round")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    add_data_dir(parser)
    add_common_options(parser)
    parser.set_defaults(command=_simulate)


def _serve(options: argparse.Namespace) -> int:
    listen = Listen(options.host, options.port, options.tls_cert, options.tls_key)
    if not options.insecure:
        listen = listen.with_authority(options.data_dir)
    listen.check(insecure=options.insecure)
    manifest = load_manifest(options.bundle)
    config = load_config(options.config, manifest)
    if config.baseline:
        raise SettingsError("baseline", config.baseline, "baselines are for hosl-cloud simulate: remove it")
    check_files(options.bundle, manifest)
    options.data_dir.mkdir(parents=True, exist_ok=True)
    ending = asyncio.run(_serve_run(options, listen, manifest, config))
    return int(ExitCode.INTERRUPTED if ending in ("stopped", "paused") else ExitCode.OK)


async def _serve_run(options: argparse.Namespace, listen: Listen, manifest: Manifest, config: RunConfig) -> str:
    fingerprint = listen.authority.fingerprint if listen.authority is not None else ""
    token, token_path = load_or_make_token(options.data_dir, fingerprint)
    admin_token = load_or_make_secret(options.data_dir / ADMIN_TOKEN_FILE)
    lock = _lock(options.data_dir)
    # OpenMP threads that spin while they wait take the cores from everything else on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # These import torch, which takes seconds; what can be refused is refused before.
    from hosl_cloud.access import Access, Guard
    from hosl_cloud.coordinator import Coordinator
    from hosl_cloud.service import serve

    store = Store(options.data_dir / DATABASE)
    try:
        run, checkpoint = _open_run(options, manifest, config, store)
        coordinator = Coordinator(run, _say)
        try:
            await coordinator.prepare(checkpoint)
        except Exception:
            if not run.round:  # what never began is not to go on
                store.set_state(run.id, "failed")
            raise

        def on_listening(address: str) -> None:
            _say(f"run {run.id}: {config.algorithm}, {_course(run)}")
            _say(f"devices join with: hosl-edge --server {address} --token-file {token_path} --data FILE")
            write_service_file(options.data_dir, listen, address)

        guard = Guard(Access(store, fingerprint), token, admin_token)
        ending = await serve(coordinator, guard, listen, on_listening, once=options.once)
        if ending == "paused":
            _say(f"run {run.id} pauses at round {run.round}; the same command goes on with it")
        else:
            _say(f"run {run.id} {ending} at round {run.round}; take it with: hosl-cloud merge {run.id} --out DIR")
        return ending
    finally:
        (options.data_dir / SERVICE_FILE).unlink(missing_ok=True)
        store.close()
        lock.close()


def _open_run(
    options: argparse.Namespace, manifest: Manifest, config: RunConfig, store: Store
) -> tuple[Run, Path | None]:
    """The unfinished run of these settings and the checkpoint that it goes on from, or a new run."""
    from hosl_cloud.resume import cut, find_unfinished
    from hosl_cloud.run import Run

    bundle = options.bundle.resolve()
    row = None if options.new else find_unfinished(store, manifest, config)
    for other in store.unfinished_runs():
        if row is None or other != row.id:
            store.set_state(other, "stopped")
            _say(f"run {other} has other settings, or --new was given: it stays as it is, stopped")
    if row is None:
        id_ = _new_run_id(config.name, store)
        store.create_run(id_, bundle, manifest.shard_digest, config)
        return Run(id_, config, manifest, bundle, _run_folder(options.data_dir, id_), store), None
    folder = _run_folder(options.data_dir, row.id)
    found = cut(store, row, folder, _say)
    again = f"; {found.dropped} rounds after it are made again" if found.dropped else ""
    _say(f"run {row.id} resumes after round {found.round}{again}")
    run = Run(row.id, config, manifest, bundle, folder, store, epoch=found.epoch, round=found.round)
    return run, None if found.checkpoint is None else found.checkpoint.path


def _course(run: Run) -> str:
    if run.round:
        return f"rounds {run.round + 1} to {run.config.rounds}"
    count = run.config.devices.start_with
    return f"{run.config.rounds} rounds, waits for {count} device{'s' if count > 1 else ''}"


def _lock(data_dir: Path) -> TextIO:
    """Only one service may use a data folder; the lock is held as long as the file is open."""
    file = (data_dir / "lock").open("w", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ServiceError(f"another hosl-cloud uses {data_dir}: stop it, or choose another --data-dir") from error
    return file


def _new_run_id(name: str, store: Store) -> str:
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    known = set(store.run_ids())
    return next(run for run in (stem, *(f"{stem}-{n}" for n in range(2, 10**6))) if run not in known)


def _run_folder(data_dir: Path, run: str) -> Path:
    return data_dir / "runs" / run


def _merge(options: argparse.Namespace) -> int:
    from hosl_cloud.checkpoint import find_checkpoint
    from hosl_cloud.merge import merge_run
    from hosl_cloud.mirror import replay_client

    database = options.data_dir / DATABASE
    if not database.exists():
        raise SettingsError("--data-dir", str(options.data_dir), "no service has run there")
    store = Store(database)
    try:
        run = store.run(options.run)
        if run.config.baseline == "first-order":
            raise SettingsError(
                "RUN", run.id, "its client half was trained first-order, and is gone with the simulation"
            )
        bundle = options.bundle or run.bundle
        manifest = load_manifest(bundle)
        if manifest.shard_digest != run.shard_digest:
            raise BundleError(f"{bundle} is not the bundle of run {run.id}: name the right one with --bundle")
        check_files(bundle, manifest)
        checkpoint = find_checkpoint(_run_folder(options.data_dir, run.id), options.checkpoint)
        client = replay_client(store, run, bundle, manifest, checkpoint.info.round)
    finally:
        store.close()
    info = merge_run(bundle, manifest, client, checkpoint.path, options.out, options.adapter)
    if options.json:
        print(json.dumps({"run": run.id, "round": info.round, "out": str(options.out)}))
    else:
        print(f"run {run.id} at round {info.round} ({options.checkpoint} checkpoint) is in {options.out}")
    return int(ExitCode.OK)


def _simulate(options: argparse.Namespace) -> int:
    # OpenMP threads that spin while they wait take the cores from the devices' forwards.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hosl_cloud.baselines import prepare_config
    from hosl_cloud.partition import Partition
    from hosl_cloud.results import summarize, write_csv
    from hosl_cloud.run import Run
    from hosl_cloud.simulation import simulate

    manifest, partition = load_manifest(options.bundle), Partition.parse(options.partition)
    task = [f"task.preset={options.task}"] if options.task else []
    fleet = [f"devices.start_with={options.devices}", f"devices.per_round={options.per_round}"]
    baseline = [f"baseline={options.baseline}"] if options.baseline else []
    config = prepare_config(load_config(options.config, manifest, [*task, *fleet, *baseline, *options.overrides]))
    options.data_dir.mkdir(parents=True, exist_ok=True)
    check_files(options.bundle, manifest)
    threads = options.threads or len(os.sched_getaffinity(0))
    lock, store = _lock(options.data_dir), Store(options.data_dir / DATABASE)
    try:
        id_, bundle = _new_run_id(config.name, store), options.bundle.resolve()
        run = Run(id_, config, manifest, bundle, _run_folder(options.data_dir, id_), store)
        store.create_run(id_, bundle, manifest.shard_digest, config)
        say = _say if not options.json else lambda sentence: None
        ending = asyncio.run(simulate(run, options.data, options.eval, partition, threads, say))
        if options.csv is not None:
            write_csv(store, id_, options.csv)
        if options.json:
            print(json.dumps(summarize(store, id_)))
        say(f"run {id_} {ending} at round {run.round}; take it with: hosl-cloud merge {id_} --out DIR")
    finally:
        store.close()
        lock.close()
    return int(ExitCode.OK)


def _say(sentence: str) -> None:
    print(f"hosl-cloud: {sentence}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
