"""The service: one port, one event loop, on which nothing is computed; how it starts, and how it leaves.

`serve` is the whole of it: uvicorn serves the routes of service/app.py in one task, RunQueue.work leads the runs in
another. It leaves in an order that matters: runs are paused or ended first, while their devices can still be told, then
what devices are owed is sent, and only then are the sockets closed and the log written to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from hosl_cloud.exceptions import ServiceError
from hosl_cloud.runs.queue import GOODBYE_S, RunQueue
from hosl_cloud.runs.run import Ending, Paused
from hosl_cloud.sentences import device_command
from hosl_cloud.service import limits
from hosl_cloud.service.access import Authenticator
from hosl_cloud.service.app import make_app
from hosl_cloud.service.curve_api import curve_operations
from hosl_cloud.service.devices_api import device_operations
from hosl_cloud.service.listen import ListenSettings
from hosl_cloud.service.merge_api import Merges
from hosl_cloud.service.runs_api import RunsApi
from hosl_cloud.service.setup_api import setup_operations
from hosl_protocol.program.notify import feed_watchdog, notify
from hosl_protocol.wire.codec import PIECE_BYTES
from hosl_protocol.wire.messages import Refusal

HEARTBEAT_S = 15.0
"""A device that answers no ping for this long, after as long a silence, is gone."""


class _DeviceSocket(WebSocketsSansIOProtocol):
    """A websocket that ends where nobody takes its last bytes; uvicorn would keep it until TCP gives up."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn.debug = False  # its log has every header, tokens too

    async def send(self, message: Any) -> None:
        """Send, and count a refusal as an answer, too; uvicorn would log that none was given."""
        await super().send(message)
        self.handshake_complete |= self.initial_response is not None

    def keepalive_timeout(self) -> None:
        """Drop a device that went without a word."""
        super().keepalive_timeout()
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        """Drop the connection of a device with which we are done, where it does not close it itself."""
        super().on_task_complete(task)
        self.loop.call_later(HEARTBEAT_S, self.transport.abort)


class _Server(uvicorn.Server):
    """Leaves signals to us: a run must be ended before its sockets are closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Service:
    """What the service serves, where, and when it leaves."""

    runs: RunQueue
    authenticator: Authenticator
    listen: ListenSettings
    bundles: Path
    """Where the bundles of new runs are."""
    until: str | None = None
    """The run with whose end the service leaves; None stays."""
    ends_on_interrupt: str | None = None
    """The run that Ctrl-C ends; all others are paused."""
    drain_s: float | None = None
    """What a run may take to end its round; None: two deadlines of a stage."""


async def serve(
    service: Service, on_listening: Callable[[str], None], leave: asyncio.Event | None = None
) -> Ending | Paused | None:
    """Serve until a signal, a request to drain, the end of a run, or `leave`; how that run ended. Raises what ended it.

    Beside the main thread, which alone can take signals, `leave` stands for them.
    """
    runs, authenticator, listen = service.runs, service.authenticator, service.listen
    leave = asyncio.Event() if leave is None else leave

    def disconnect(name: str, reason: str) -> None:
        for current in runs.current.all():
            peer = current.coordinator.fleet.peers.get(name) if current.coordinator is not None else None
            if peer is not None:
                peer.is_ready = False
                peer.end(Refusal(code="device", reason=reason, retry=False))

    def has_bundle(name: str) -> bool:
        return name in {current.bundle.name for current in runs.current.all()} or (service.bundles / name).is_dir()

    def start_of(name: str, bundle: str) -> str:
        # What a device has to allow depends on the task: that of the run which it would come to now.
        current = runs.current.for_device(bundle)
        task = None if current is None or current.coordinator is None else current.coordinator.run.config.task
        return device_command(listen.public_address(listener.getsockname()[1]), Path(f"{name}.token"), task)

    merges = Merges(runs)
    operations = [
        *RunsApi(runs, service.bundles, leave).operations(),
        *curve_operations(runs.store),
        *merges.operations(),
        *setup_operations(runs.store, service.bundles),
        *device_operations(authenticator.access, disconnect, has_bundle, start_of),
    ]

    ca = listen.authority.ca_cert if listen.authority is not None else None
    app = make_app(runs, authenticator, operations, ca, merges.routes())
    listener = _bind(listen, authenticator.limits)
    server = _Server(_uvicorn_config(app, listen))
    signals: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        signals.append(number)
        leave.set()

    # uvicorn's own handlers are off (`_Server`): it would close the devices' sockets before their runs are paused.
    is_main = threading.current_thread() is threading.main_thread()
    for number in (signal.SIGTERM, signal.SIGINT) if is_main else ():
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)

    await merges.clear()  # what a service left that was killed
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    working, watching = asyncio.create_task(runs.work()), asyncio.create_task(feed_watchdog())
    # What is loaded by now stays: a collection that walks through all of torch holds the event loop up.
    gc.freeze()

    try:
        on_listening(_address(listener, listen))
        notify("READY=1")
        await _until(runs, service.until, leave)
        notify("STOPPING=1")
        interrupted = service.ends_on_interrupt if signal.SIGINT in signals else None
        await runs.drain(service.drain_s, stops=interrupted)
        return await runs.outcome(service.until or service.ends_on_interrupt)
    finally:
        working.cancel()
        await runs.close()  # devices take their last message, before their sockets are closed

        server.should_exit = True
        with contextlib.suppress(SystemExit):
            await serving
        await merges.clear()
        watching.cancel()
        # At the very end: that a device is away is said, too.
        await asyncio.to_thread(runs.events.close)
        gc.unfreeze()


async def _until(runs: RunQueue, run: str | None, leave: asyncio.Event) -> None:
    """Wait until the service is to leave."""
    waits: list[asyncio.Task[Any]] = [asyncio.create_task(leave.wait())]
    if run is not None:
        waits.append(asyncio.create_task(runs.wait(run)))
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def _uvicorn_config(app: Starlette, listen: ListenSettings) -> uvicorn.Config:
    """Configure uvicorn so that each of our limits holds, and nothing of a token gets into its log."""
    return uvicorn.Config(
        app,
        http=limits.HttpProtocol,
        h11_max_incomplete_event_size=limits.MAX_HEAD_BYTES,
        proxy_headers=False,
        ws=_DeviceSocket,
        ws_max_size=PIECE_BYTES,
        ws_ping_interval=HEARTBEAT_S,
        ws_ping_timeout=HEARTBEAT_S,
        ws_per_message_deflate=False,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=listen.tls_cert,
        ssl_keyfile=listen.tls_key,
        ssl_ciphers="ECDHE+AESGCM:ECDHE+CHACHA20",  # of TLS 1.2; uvicorn's default leaves just the oldest
        timeout_graceful_shutdown=int(GOODBYE_S),
    )


def _bind(listen: ListenSettings, most: limits.Limits) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as on_error:
            listener = on_error.enter_context(limits.Listener(family, kind, protocol, most))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
            on_error.pop_all()
    except (OSError, OverflowError) as error:
        raise ServiceError(f"cannot listen on {listen.host}:{listen.port}: {error}") from error
    return listener


def _address(listener: socket.socket, listen: ListenSettings) -> str:
    return listen.local_address(listener.getsockname()[1])
