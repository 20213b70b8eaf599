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
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hosl_cloud.commands.devices import device_command
from hosl_cloud.commands.run_settings import add_run_settings, has_run_settings, load_run_settings
from hosl_cloud.service.listen import ListenSettings, write_service_file
from hosl_cloud.service.opening import ahead_of, choose_first, open_service
from hosl_cloud.service.secrets import ADMIN_TOKEN_FILE
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.data_folder import BUNDLES, add_data_dir, hint, make_data_dir
from hosl_protocol.exceptions import ExitCode, SettingsError
from hosl_protocol.program.terminal import add_common_options
from hosl_protocol.run.manifest import MANIFEST, Manifest, check_files, load_manifest
from hosl_protocol.run.tasks import Task

if TYPE_CHECKING:
    from hosl_cloud.commands.display import RunsDisplay
    from hosl_cloud.runs.coordinator import MakeTail
    from hosl_cloud.service.server import Service


_say = logging.getLogger("hosl-cloud").info
"""Tells people; see hosl_protocol.program.logs."""


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Options of `hosl-cloud serve`."""
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="begin with a run of this bundle")
    add_run_settings(parser)
    parser.add_argument(
        "--bundles", type=Path, metavar="DIR", help="folder of the bundles of later runs (default: that of --data-dir)"
    )
    add_data_dir(parser)

    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8765, help="port; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="the certificate's key, PEM")
    parser.add_argument("--insecure", action="store_true", help="listen beyond this machine without TLS")

    parser.add_argument("--once", action="store_true", help="leave when the run of --bundle has ended")
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
    if options.bundle is None and has_run_settings(options):
        raise SettingsError("--bundle", None, "say which bundle to train, what hosl-export wrote")
    if options.once and options.bundle is None:
        raise SettingsError("--once", True, "it needs a run to wait for: give --bundle and --task or --config")

    first = _read_first(options) if options.bundle is not None else None
    make_data_dir(options.data_dir)  # nothing is written before all that can be refused has been
    _say(f"starts with {options.data_dir}; to load everything takes some seconds")
    from hosl_cloud.commands.display import RunsDisplay  # needs rich, which the device does without

    display = RunsDisplay()
    with display.drawn(), contextlib.ExitStack() as leaving:
        ending = _serve(options, listen, first, leaving, display)

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
    config = load_run_settings(options, manifest)
    if config.baseline:
        raise SettingsError("baseline", config.baseline, "baselines are for hosl-cloud simulate: remove it")
    check_files(options.bundle, manifest)
    return manifest, config


def _serve(
    options: argparse.Namespace,
    listen: ListenSettings,
    first: tuple[Manifest, RunConfig] | None,
    leaving: contextlib.ExitStack,
    display: RunsDisplay,
) -> str | None:
    """Make everything ready, and serve; how the run of --config ended. `leaving` frees what was taken."""
    data_dir: Path = options.data_dir
    # OpenMP threads that spin while they wait take the cores from everything else on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Freed in the reverse order: the log is written, the ranks leave, and the store is closed while the lock is held.
    opened = leaving.enter_context(open_service(data_dir, listen, _say, lambda: _tails(options)))
    runs = opened.runs
    runs.listeners.append(display.hear)
    runs.serve_again = _serve_again(options)

    run = None if first is None else choose_first(runs, options.bundle, *first, begins_anew=options.new)
    if options.once and run is None:
        return None
    ahead = [] if run is None else ahead_of(runs.store, run)
    for run_ahead in ahead:
        _say(f"run {run_ahead} goes on first, and run {run} after it")

    bundles: Path = options.bundles or data_dir / BUNDLES
    bundles.mkdir(parents=True, exist_ok=True)
    from hosl_cloud.service.server import Service

    service = Service(runs, opened.authenticator, listen, bundles, run if options.once else None, run, options.drain_s)

    def on_listening(address: str) -> None:
        display.note_loaded()
        # Only now: who reads it finds the service listening.
        write_service_file(data_dir, listen, address)
        begin = "" if run else f"; begin a run with: {_how_to_begin(bundles, data_dir)}"
        port = urlsplit(address).port or 0
        _say(f"listens on {listen.bound_address(port)}{begin}")
        page = listen.public_address(port).replace("ws", "http", 1)
        _say(f"status page: {page}/ takes the token in {data_dir / ADMIN_TOKEN_FILE}")
        task = first[1].task if first is not None else None
        for sentence in _ways_to_join(listen, address, opened.token_path, data_dir, task):
            _say(sentence)

    ending = asyncio.run(_train(service, run if not ahead else None, on_listening))
    if run is None:
        return ending

    # One that waited in line all the time has no ending here.
    row = runs.store.run(run)
    if row.state in ("pending", "paused"):
        _say(f"run {run} pauses at round {row.round}; the same command goes on with it", extra={"is_result": True})
        return "paused"
    return ending


def _how_to_begin(bundles: Path, data_dir: Path) -> str:
    """The command that begins a run, after that which adds its bundle where there is none."""
    start = hint("run start --bundle NAME --task PRESET", data_dir)
    has_bundle = any(bundles.glob(f"*/{MANIFEST}"))
    return start if has_bundle else f"{hint('bundle add PATH --name NAME', data_dir)} && {start}"


def _serve_again(options: argparse.Namespace) -> str:
    """The command that starts the service where it listens now, without a run of its own."""
    words = ["serve"]
    for name, default in (("host", "127.0.0.1"), ("port", 8765), ("tls_cert", None), ("tls_key", None)):
        if (value := vars(options)[name]) != default:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if options.insecure:
        words.append("--insecure")
    return hint(shlex.join(words), options.data_dir)


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


def _ways_to_join(
    listen: ListenSettings, address: str, token_path: Path, data_dir: Path, task: Task | None
) -> list[str]:
    """Say how devices reach the service, and what the run of --config, whose task this is, asks of them."""
    if listen.is_loopback():
        return [
            f"devices join with: {device_command(address, token_path, task, 'device-1')}",
            "each further device on this machine needs another --name",
        ]
    names = f"its certificate is for {', '.join(listen.authority.names())}; " if listen.authority is not None else ""
    return [f"{names}{hint('device add NAME', data_dir)} makes a device's token, and says what to type there"]
