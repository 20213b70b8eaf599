"""`hosl-cloud serve`: the service, with one run that it begins with, or none.

Here everything is checked that can be refused before torch is loaded, which takes seconds; hence the imports within
functions. The service itself is service/server.py. Under torchrun every rank comes here, and all but the first follow
it (ranks/follower.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hosl_cloud.commands.devices import device_command
from hosl_cloud.service.listen import ListenSettings, write_service_file
from hosl_cloud.service.secrets import ADMIN_TOKEN_FILE, METRICS_TOKEN_FILE, load_or_make_secret, load_or_make_token
from hosl_cloud.settings import RunConfig, load_config
from hosl_cloud.storage.data_folder import BUNDLES, DATABASE, SERVICE_FILE, add_data_dir, hint, lock, make_data_dir
from hosl_cloud.storage.records import UNENDED
from hosl_cloud.storage.store import Store
from hosl_protocol.exceptions import ExitCode, SettingsError
from hosl_protocol.program.terminal import add_common_options
from hosl_protocol.run.manifest import Manifest, check_files, load_manifest
from hosl_protocol.run.tasks import Task

if TYPE_CHECKING:
    from hosl_cloud.runs.coordinator import MakeTail
    from hosl_cloud.runs.queue import RunQueue
    from hosl_cloud.service.server import Service


_say = logging.getLogger("hosl-cloud").info
"""Tells people; see hosl_protocol.program.logs."""


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Options of `hosl-cloud serve`."""
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="begin with a run of this bundle, and of --config")
    parser.add_argument("--config", type=Path, metavar="FILE", help="that run's settings, run.toml")
    parser.add_argument(
        "--bundles", type=Path, metavar="DIR", help="folder of the bundles of later runs (default: that of --data-dir)"
    )
    add_data_dir(parser)

    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8765, help="port; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="the certificate's key, PEM")
    parser.add_argument("--insecure", action="store_true", help="listen beyond this machine without TLS")

    parser.add_argument("--once", action="store_true", help="leave when the run of --config has ended")
    parser.add_argument("--new", action="store_true", help="begin a new run, even where an unfinished one could go on")
    parser.add_argument(
        "--drain-s",
        type=float,
        metavar="S",
        help="longest time to end a round before it leaves (default: two stages)",
    )
    parser.add_argument(
        "--rank-timeout-s",
        type=float,
        default=300.0,
        metavar="S",
        help="under torchrun: longest time that a rank may not answer (default: %(default)s)",
    )
    add_common_options(parser)
    parser.set_defaults(command=serve_command)


def serve_command(options: argparse.Namespace) -> int:
    """Run the service; its exit code. Under torchrun, all ranks but the first compute for it."""
    if not options.rank_timeout_s > 0.0:
        raise SettingsError("--rank-timeout-s", options.rank_timeout_s, "use a number above 0")
    if _ranks() > 1 and int(os.environ["RANK"]) > 0:
        return _follow(options)

    listen = ListenSettings(options.host, options.port, options.tls_cert, options.tls_key)
    if not options.insecure:
        listen = listen.with_authority(options.data_dir)
    listen.check(insecure=options.insecure)
    if (options.bundle is None) != (options.config is None):
        raise SettingsError("--bundle", options.bundle and str(options.bundle), "it belongs with --config: give both")
    if options.once and options.bundle is None:
        raise SettingsError("--once", True, "it needs a run to wait for: give --bundle and --config")

    first = _read_first(options) if options.bundle is not None else None
    make_data_dir(options.data_dir)  # nothing is written before all that can be refused has been
    _say(f"starts with {options.data_dir}; to load everything takes some seconds")
    with contextlib.ExitStack() as leaving:
        ending = _serve(options, listen, first, leaving)

    # torchrun takes another code for a failure, and starts a service again that was told to leave.
    is_cut_off = ending in ("stopped", "paused") and _ranks() == 1
    return int(ExitCode.INTERRUPTED if is_cut_off else ExitCode.OK)


def _ranks() -> int:
    """Count the processes of this service that PyTorch's launcher started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if {"RANK", "MASTER_ADDR"} <= os.environ.keys() else 1


def _follow(options: argparse.Namespace) -> int:
    from hosl_cloud.ranks.follower import follow
    from hosl_cloud.ranks.group import Group

    return follow(Group(options.rank_timeout_s))


def _read_first(options: argparse.Namespace) -> tuple[Manifest, RunConfig]:
    manifest = load_manifest(options.bundle)
    config = load_config(options.config, manifest)
    if config.baseline:
        raise SettingsError("baseline", config.baseline, "baselines are for hosl-cloud simulate: remove it")
    check_files(options.bundle, manifest)
    return manifest, config


def _serve(
    options: argparse.Namespace,
    listen: ListenSettings,
    first: tuple[Manifest, RunConfig] | None,
    leaving: contextlib.ExitStack,
) -> str | None:
    """Make everything ready, and serve; how the run of --config ended. `leaving` frees what was taken."""
    data_dir: Path = options.data_dir
    fingerprint = listen.authority.fingerprint if listen.authority is not None else ""
    token, token_path = load_or_make_token(data_dir, fingerprint)
    admin_token = load_or_make_secret(data_dir / ADMIN_TOKEN_FILE)
    metrics_token = load_or_make_secret(data_dir / METRICS_TOKEN_FILE)
    leaving.callback(lock(data_dir).close)  # the last that is freed: until then nobody else may begin here
    if (data_dir / SERVICE_FILE).exists():  # whoever wrote it is gone, for the lock is ours
        _say("the service that was here before was killed, or crashed: it did not leave in order")

    # OpenMP threads that spin while they wait take the cores from everything else on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # These import torch, which takes seconds; what can be refused is refused before.
    from hosl_cloud.runs.queue import RunQueue
    from hosl_cloud.service.access import Authenticator, DeviceTokens
    from hosl_cloud.service.server import Service

    # Freed in the reverse order: the log is written, the ranks leave, and the store is closed while the lock is held.
    store = Store(data_dir / DATABASE)
    leaving.callback(store.close)
    leaving.callback((data_dir / SERVICE_FILE).unlink, missing_ok=True)
    runs = RunQueue(store, data_dir, _say, leaving.enter_context(_tails(options)))
    leaving.callback(runs.events.close)

    run = None if first is None else _choose_first(runs, options, *first)
    if options.once and run is None:
        return None
    ahead = [] if run is None else _ahead_of(store, run)
    for run_ahead in ahead:
        _say(f"run {run_ahead} goes on first, and run {run} after it")

    authenticator = Authenticator(DeviceTokens(store, fingerprint), token, admin_token, metrics_token=metrics_token)

    bundles: Path = options.bundles or data_dir / BUNDLES
    bundles.mkdir(parents=True, exist_ok=True)
    service = Service(runs, authenticator, listen, bundles, run if options.once else None, run, options.drain_s)

    def on_listening(address: str) -> None:
        # Only now: who reads it finds the service listening.
        write_service_file(data_dir, listen, address)
        begin = "" if run else f"; begin a run with: {hint('run start --bundle NAME --config FILE', data_dir)}"
        port = urlsplit(address).port or 0
        _say(f"listens on {listen.bound_address(port)}{begin}")
        page = listen.public_address(port).replace("ws", "http", 1)
        _say(f"status page: {page}/ takes the token in {data_dir / ADMIN_TOKEN_FILE}")
        task = first[1].task if first is not None else None
        for sentence in _ways_to_join(listen, address, token_path, data_dir, task):
            _say(sentence)

    ending = asyncio.run(_train(service, run if not ahead else None, on_listening))
    if run is None:
        return ending

    # One that waited in line all the time has no ending here.
    row = store.run(run)
    if row.state in ("pending", "paused"):
        _say(f"run {run} pauses at round {row.round}; the same command goes on with it")
        return "paused"
    return ending


async def _train(service: Service, run: str | None, on_listening: Callable[[str], None]) -> str | None:
    """Load the first run before anybody can come, and serve."""
    from hosl_cloud.service.server import serve

    if run is not None:
        await service.runs.open(run)
    return await serve(service, on_listening)


@contextlib.contextmanager
def _tails(options: argparse.Namespace) -> Iterator[MakeTail]:
    """Choose how tails are loaded: in this process alone, or on all ranks, which leave with it."""
    from hosl_cloud.tail.trainer import TailTrainer

    if _ranks() == 1:
        yield TailTrainer
        return

    from hosl_cloud.ranks.group import Group
    from hosl_cloud.ranks.leader import GroupTrainer

    group = Group(options.rank_timeout_s)
    group.start_heartbeat()
    _say(f"computes on {group.size} ranks")
    try:
        yield partial(GroupTrainer, group)
    finally:
        group.shut_down()


def _choose_first(runs: RunQueue, options: argparse.Namespace, manifest: Manifest, config: RunConfig) -> str | None:
    """Choose the unfinished run of these settings, or a new one; None where the newest of them is completed.

    Unfinished runs that an earlier `serve --config` began make way for it.
    """
    from hosl_cloud.runs.resume import find_run

    row = None if options.new else find_run(runs.store, manifest, config)
    if row is not None and row.state == "completed":
        runs.say(f"run {row.id} of these settings is completed; --new begins another")
        return None
    going_on = row.id if row is not None and row.state in UNENDED else None
    _make_way(runs, options, manifest, config, keeps=going_on)
    return going_on or runs.create(options.bundle, config, "serve")


def _make_way(
    runs: RunQueue, options: argparse.Namespace, manifest: Manifest, config: RunConfig, keeps: str | None
) -> None:
    """Stop what an earlier `serve --config` began, but for one; where none goes on, say which one could."""
    others = [row for row in runs.store.runs() if row.shard_digest == manifest.shard_digest]
    for other in others:
        if other.state in UNENDED and other.begun_by == "serve" and other.id != keeps:
            runs.store.set_state(other.id, "stopped")
            why = "--new was given" if not other.settings.problem and other.config == config else "other settings"
            remedy = hint(f"run resume {other.id}", options.data_dir)
            runs.say(f"run {other.id} ({why}) is stopped; {remedy} goes on with it", other.id, is_ending=True)

    over = [row for row in others if row.state in ("stopped", "failed") and row.round and not row.settings.problem]
    if over and keeps is None:
        remedy = hint(f"run resume {over[-1].id}", options.data_dir)
        state = f"{over[-1].state} at round {over[-1].round}"
        runs.say(f"run {over[-1].id} of this bundle {state}; {remedy} goes on with it, and a new run begins now")


def _ahead_of(store: Store, run: str) -> list[str]:
    """List unfinished runs of the same bundle that are in line before it."""
    unfinished, shard = store.unfinished_runs(), store.run(run).shard_digest
    return [id_ for id_ in unfinished[: unfinished.index(run)] if store.run(id_).shard_digest == shard]


def _ways_to_join(
    listen: ListenSettings, address: str, token_path: Path, data_dir: Path, task: Task | None
) -> list[str]:
    """Say how devices reach the service, and what the run of --config, whose task this is, asks of them."""
    if listen.is_loopback():
        return [
            f"devices join with: {device_command(address, token_path, task)}",
            "each further device on this machine needs a name of its own: --name NAME",
        ]
    names = f"its certificate is for {', '.join(listen.authority.names())}; " if listen.authority is not None else ""
    return [f"{names}{hint('device add NAME', data_dir)} makes a device's token"]
