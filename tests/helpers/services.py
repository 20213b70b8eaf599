"""A whole service in this process, and rounds without sockets: what the cloud's tests share."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hosl_cloud.rounds import algorithms as rounds
from hosl_cloud.rounds.exchange import Answer, Await, Exchange, Tell
from hosl_cloud.service.access import Authenticator, DeviceTokens
from hosl_cloud.service.listen import ListenSettings
from hosl_cloud.service.secrets import ADMIN_TOKEN_FILE, METRICS_TOKEN_FILE, load_or_make_secret, load_or_make_token
from hosl_cloud.settings import parse_config
from hosl_cloud.storage.store import Store
from hosl_protocol.run.manifest import load_manifest
from hosl_protocol.wire.codec import Frame
from support import Device

if TYPE_CHECKING:
    from hosl_cloud.runs.coordinator import Coordinator


def run_round(exchange: Exchange[rounds.RoundResult | None], devices: dict[str, Device]) -> rounds.RoundResult:
    """Drive a round's generator against devices; what it comes to."""
    answer: Answer | None = None
    try:
        while True:
            action = exchange.send(answer)
            answer = None
            if isinstance(action, Tell):
                devices[action.device].tell(Frame(action.message, action.tensors))
            else:
                assert isinstance(action, Await)
                ask = action.asks[0]
                answer = Answer(ask, devices[ask.device].ask(ask.kind))
    except StopIteration as stop:
        outcome: rounds.RoundResult = stop.value
        return outcome


@dataclass
class Service:
    """A running service in this process."""

    coordinator: Coordinator
    authenticator: Authenticator
    token: str
    admin_token: str
    metrics_token: str
    folder: Path
    address: str
    """`ws://127.0.0.1:port`."""
    serving: asyncio.Task[str]
    """Its result is how the run ended."""
    said: list[str]
    """What the service told people."""

    @property
    def token_file(self) -> Path:
        return self.folder / "join-token"


@contextlib.asynccontextmanager
async def serving(
    bundle: Path,
    folder: Path,
    settings: dict[str, Any],
    listen: ListenSettings | None = None,
    run_id: str = "run-1",
    port: int = 0,
    *,
    stays: bool = False,
) -> AsyncIterator[Service]:
    """The service with everything real, on a free port or this one; stopped at the end where its run goes on, or where
    it stays."""
    from hosl_cloud.runs.coordinator import Coordinator
    from hosl_cloud.runs.queue import RunQueue
    from hosl_cloud.runs.run import Run
    from hosl_cloud.service import server as service

    folder.mkdir(exist_ok=True)
    listen = listen or ListenSettings("127.0.0.1", port)
    fingerprint = listen.authority.fingerprint if listen.authority is not None else ""
    token, _ = load_or_make_token(folder, fingerprint)
    admin_token = load_or_make_secret(folder / ADMIN_TOKEN_FILE)
    metrics_token = load_or_make_secret(folder / METRICS_TOKEN_FILE)
    manifest = load_manifest(bundle)
    config = parse_config(settings, manifest)
    store, said = await asyncio.to_thread(Store, folder / "hosl.sqlite"), list[str]()
    run = Run(run_id, config, manifest, bundle, folder / "runs" / run_id, store)
    coordinator = Coordinator(run, said.append)
    await coordinator.prepare()
    await asyncio.to_thread(store.create_run, run_id, bundle, manifest.shard_digest, config)
    runs = RunQueue(store, folder, said.append)
    runs.adopt(coordinator)
    access = await asyncio.to_thread(DeviceTokens, store, fingerprint)
    authenticator = Authenticator(access, token, admin_token, metrics_token=metrics_token)
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        service.serve(
            service.Service(
                runs, authenticator, listen, bundle.parent, until=None if stays else run_id, ends_on_interrupt=run_id
            ),
            listening.set_result,
        )
    )
    try:
        yield Service(
            coordinator, authenticator, token, admin_token, metrics_token, folder, await listening, task, said
        )
    finally:
        if not task.done():
            signal.raise_signal(signal.SIGINT)
        await asyncio.wait({task}, timeout=20.0)
        store.close()
