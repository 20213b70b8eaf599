"""A service in a data folder: its secrets, its lock, its store and its runs, opened in order and closed in reverse.

And the run with which it begins, which may be one that was cut off. What serves it is service/server.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hosl_cloud.service.listen import ListenSettings
from hosl_cloud.service.secrets import ADMIN_TOKEN_FILE, METRICS_TOKEN_FILE, load_or_make_secret, load_or_make_token
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.data_folder import DATABASE, SERVICE_FILE, hint, lock
from hosl_cloud.storage.records import UNENDED
from hosl_cloud.storage.store import Store
from hosl_protocol.run.manifest import Manifest

if TYPE_CHECKING:
    from hosl_cloud.runs.coordinator import MakeTail
    from hosl_cloud.runs.queue import RunQueue
    from hosl_cloud.service.access import Authenticator


@dataclass(frozen=True)
class OpenService:
    """What a service works with."""

    runs: RunQueue
    authenticator: Authenticator
    token_path: Path
    """The file with the join token."""


def one_process() -> AbstractContextManager[MakeTail]:
    """Load tails in this process alone."""
    from hosl_cloud.tail.trainer import TailTrainer

    return contextlib.nullcontext(TailTrainer)


@contextlib.contextmanager
def open_service(
    data_dir: Path,
    listen: ListenSettings,
    say: Callable[[str], None],
    tails: Callable[[], AbstractContextManager[MakeTail]] = one_process,
) -> Iterator[OpenService]:
    """Open a data folder, which is there, for a service, whose tails are loaded with what `tails` makes.

    Slow, off the event loop. Raises ServiceError where another uses the folder, and StoreError.
    """
    fingerprint = listen.authority.fingerprint if listen.authority is not None else ""
    token, token_path = load_or_make_token(data_dir, fingerprint)
    admin_token = load_or_make_secret(data_dir / ADMIN_TOKEN_FILE)
    metrics_token = load_or_make_secret(data_dir / METRICS_TOKEN_FILE)

    with contextlib.ExitStack() as leaving:
        leaving.callback(lock(data_dir).close)  # the last that is freed: until then nobody else may begin here
        if (data_dir / SERVICE_FILE).exists():  # whoever wrote it is gone, for the lock is ours
            say("the service that was here before was killed, or crashed: it did not leave in order")
        leaving.callback((data_dir / SERVICE_FILE).unlink, missing_ok=True)

        # These import torch, which takes seconds; what can be refused is refused before.
        from hosl_cloud.runs.queue import RunQueue
        from hosl_cloud.service.access import Authenticator, DeviceTokens

        store = leaving.enter_context(contextlib.closing(Store(data_dir / DATABASE)))
        runs = RunQueue(store, data_dir, say, leaving.enter_context(tails()))
        leaving.callback(runs.events.close)
        tokens = DeviceTokens(store, fingerprint)
        yield OpenService(runs, Authenticator(tokens, token, admin_token, metrics_token=metrics_token), token_path)


def choose_first(
    runs: RunQueue, bundle: Path, manifest: Manifest, config: RunConfig, *, begins_anew: bool = False
) -> str | None:
    """Choose the unfinished run of these settings, or a new one; None where the newest of them is completed.

    Unfinished runs that an earlier service began with a run of its own make way for it. Slow, off the event loop.
    """
    from hosl_cloud.runs.resume import find_run

    row = None if begins_anew else find_run(runs.store, manifest, config)
    if row is not None and row.state == "completed":
        runs.say(f"run {row.id} of these settings is completed; --new begins another")
        return None
    going_on = row.id if row is not None and row.state in UNENDED else None
    _make_way(runs, manifest, config, keeps=going_on)
    return going_on or runs.create(bundle, config, "serve")


def _make_way(runs: RunQueue, manifest: Manifest, config: RunConfig, keeps: str | None) -> None:
    """Stop what an earlier `serve --config` began, but for one; where none goes on, say which one could."""
    others = [row for row in runs.store.runs() if row.shard_digest == manifest.shard_digest]
    for other in others:
        if other.state in UNENDED and other.begun_by == "serve" and other.id != keeps:
            runs.store.set_state(other.id, "stopped")
            why = "--new was given" if not other.settings.problem and other.config == config else "other settings"
            remedy = hint(f"run resume {other.id}", runs.data_dir)
            runs.say(f"run {other.id} ({why}) is stopped; {remedy} goes on with it", other.id, is_ending=True)

    over = [row for row in others if row.state in ("stopped", "failed") and row.round and not row.settings.problem]
    if over and keeps is None:
        remedy = hint(f"run resume {over[-1].id}", runs.data_dir)
        state = f"{over[-1].state} at round {over[-1].round}"
        runs.say(f"run {over[-1].id} of this bundle {state}; {remedy} goes on with it, and a new run begins now")


def ahead_of(store: Store, run: str) -> list[str]:
    """List unfinished runs of the same bundle that are in line before it."""
    unfinished, shard = store.unfinished_runs(), store.run(run).shard_digest
    return [id_ for id_ in unfinished[: unfinished.index(run)] if store.run(id_).shard_digest == shard]
