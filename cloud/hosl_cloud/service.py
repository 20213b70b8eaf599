"""The service: websocket, shard downloads, health and metrics on one port; compute never runs on its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import prometheus_client
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from hosl_cloud import limits, metrics
from hosl_cloud.access import Caller, Denied, Guard
from hosl_cloud.api import Api
from hosl_cloud.coordinator import Coordinator
from hosl_cloud.devices_api import device_operations
from hosl_cloud.exceptions import ServiceError
from hosl_cloud.listen import Listen
from hosl_cloud.operations import BYTES, JSON, Operation, make_routes, refuse
from hosl_cloud.page_routes import page_routes
from hosl_cloud.peer import Peer, PeerGone
from hosl_cloud.run import Ending, Paused
from hosl_cloud.runs import GOODBYE_S, Runs, Slot
from hosl_protocol import PIECE_BYTES, Hello, Refusal
from hosl_protocol.logs import log_scope
from hosl_protocol.manifest import MANIFEST
from hosl_protocol.notify import feed_watchdog, notify

log = logging.getLogger(__name__)

HEARTBEAT_S = 15.0
HELLO_DEADLINE_S = 30.0
"""Longest wait for a device's first word; before it knows its weights' digest it reads them."""

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(runs: Runs, guard: Guard, operations: Sequence[Operation], ca: Path | None = None) -> Starlette:
    """All routes. The page's files, health and the CA's certificate are open; the rest needs a token."""

    def guarded(endpoint: Endpoint, identify: Callable[[Request], object] = guard.identify) -> Endpoint:
        async def checked(request: Request) -> Response:
            try:
                request.state.caller = identify(request)
            except Denied as denied:
                return Response(status_code=denied.status, headers=denied.headers)
            return await endpoint(request)

        return checked

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        reasons = await asyncio.to_thread(runs.troubles)
        return PlainTextResponse("".join(f"{reason}\n" for reason in reasons) or "ok\n", 503 if reasons else 200)

    async def ca_certificate(request: Request) -> Response:
        return Response(status_code=404) if ca is None else FileResponse(ca, media_type="application/x-pem-file")

    async def figures(request: Request) -> Response:
        metrics.count_runs(await asyncio.to_thread(runs.store.states))
        return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def bundle_file(request: Request) -> Response:
        caller: Caller = request.state.caller
        slot, device = runs.current(caller.bundle), caller.token.name if caller.token is not None else "local"
        # One that waits for the next run has nothing to do in one that is over.
        if slot is None or (slot.is_over and "waits" in request.query_params):
            headers = {"Retry-After": str(runs.returning.ask(device))}
            return PlainTextResponse("there is no run at present\n", 503, headers)
        runs.returning.arrive(device)
        return _bundle_file(slot, request.path_params["path"])

    async def place_of_device(request: Request) -> Response:
        """For a device that asks before it joins: 403 where its token is another's."""
        caller: Caller = request.state.caller
        if not guard.may_be(caller, request.path_params["name"]):
            return Response(status_code=403)
        slot = runs.current(caller.bundle)
        coordinator = slot.coordinator if slot is not None and not slot.is_over else None
        task = coordinator.config.task if coordinator is not None else None
        return Response(msgspec.json.encode({"task": task}), media_type=JSON)

    async def snapshot(request: Request) -> Response:
        slot, bundle = runs.slot_of(request.path_params["run"]), request.state.caller.bundle
        is_its_own = slot is not None and bundle in ("", slot.bundle.name)
        coordinator = slot.coordinator if slot is not None and is_its_own else None
        path = coordinator.snapshots.path(request.path_params["round"]) if coordinator is not None else None
        # One that was replaced since the Welcome is gone: the device connects again and is offered a newer one.
        return Response(status_code=404) if path is None else FileResponse(path, media_type=BYTES)

    async def device(socket: WebSocket) -> None:
        try:
            caller = guard.admit(socket)
        except Denied as denied:
            await socket.send_denial_response(Response(status_code=denied.status, headers=denied.headers))
            return
        await socket.accept()
        with log_scope():
            await _attend(runs, Peer(socket, partial(guard.may_be, caller)), caller.bundle)

    return Starlette(
        routes=[
            *page_routes(),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/v1/ca.pem", ca_certificate),
            *make_routes(operations, guard),
            Route("/metrics", guarded(figures, guard.check_metrics)),
            Route("/v1/bundle/{path:path}", guarded(bundle_file)),
            Route("/v1/device/{name}", guarded(place_of_device)),
            Route("/v1/snapshot/{run}/{round:int}", guarded(snapshot)),
            WebSocketRoute("/v1/device", device),
        ],
        exception_handlers={HTTPException: refuse},
    )


def _bundle_file(slot: Slot, path: str) -> Response:
    """The manifest or a file of the shard, by the names in the manifest only; ranges are honoured."""
    allowed = {entry.path for entry in slot.manifest.shard_files} | {MANIFEST}
    if path not in allowed:
        return Response(status_code=404)
    return FileResponse(slot.bundle / path, media_type=BYTES)


async def _attend(runs: Runs, peer: Peer, bundle: str) -> None:
    attending = asyncio.create_task(_admit(runs, peer, bundle))
    attending.add_done_callback(lambda _: peer.hang_up())
    await peer.serve()
    try:
        await attending
    except PeerGone:
        pass
    except Exception:
        log.exception("device %s: its connection is ended", peer.name)


async def _admit(runs: Runs, peer: Peer, bundle: str) -> None:
    """Bring a device to its run, by its Hello; with a `bundle` to runs of that one alone."""
    try:
        hello = (await peer.next(HELLO_DEADLINE_S)).message
    except asyncio.TimeoutError:
        peer.end(Refusal(code="late", reason=f"no hello in {HELLO_DEADLINE_S:.0f} s", retry=True))
        return
    assert isinstance(hello, Hello)
    place = runs.route(hello)
    if not isinstance(place, Coordinator):
        peer.end(place)
    elif bundle not in ("", place.run.bundle.name):
        peer.end(Refusal(code="shard", reason=f"its token is for the runs of bundle {bundle}", retry=False))
    else:
        await place.admission.attend(peer, hello)


class _DeviceSocket(WebSocketsSansIOProtocol):
    """Ends a connection whose last bytes nobody takes; uvicorn would keep it, and tell nobody, until TCP gives up."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn.debug = False  # its log has every header, tokens too

    async def send(self, message: Any) -> None:
        """A refusal is an answer, too; uvicorn would log that none was given."""
        await super().send(message)
        self.handshake_complete |= self.initial_response is not None

    def keepalive_timeout(self) -> None:
        """A device that went without a word."""
        super().keepalive_timeout()
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        """We are done with the device."""
        super().on_task_complete(task)
        self.loop.call_later(HEARTBEAT_S, self.transport.abort)


class _Server(uvicorn.Server):
    """Leaves signals to us: a run must be ended before its sockets are closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Service:
    """What is served, and how."""

    runs: Runs
    guard: Guard
    listen: Listen
    bundles: Path
    """Where the bundles of new runs are."""
    until: str | None = None
    """The run with whose end the service leaves; None stays."""
    ends_on_interrupt: str | None = None
    """The run that Ctrl-C ends; all others are paused."""
    drain_s: float | None = None
    """What a run may take to end its round; None: two deadlines of a stage."""


async def serve(service: Service, on_listening: Callable[[str], None]) -> Ending | Paused | None:
    """Serve until a signal, a request to drain, or the end of a run; how that run ended. Raises what ended it."""
    runs, guard, listen = service.runs, service.guard, service.listen
    leave = asyncio.Event()

    def disconnect(name: str, reason: str) -> None:
        for slot in runs.slots():
            peer = slot.coordinator.fleet.peers.get(name) if slot.coordinator is not None else None
            if peer is not None:
                peer.is_ready = False
                peer.end(Refusal(code="device", reason=reason, retry=False))

    def has_bundle(name: str) -> bool:
        return name in {slot.bundle.name for slot in runs.slots()} or (service.bundles / name).is_dir()

    operations = [
        *Api(runs, service.bundles, leave).operations(),
        *device_operations(guard.access, disconnect, has_bundle),
    ]
    app = make_app(runs, guard, operations, listen.authority.ca_cert if listen.authority is not None else None)
    listener = _bind(listen, guard.limits)
    server = _Server(_uvicorn_config(app, listen))
    signals: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        signals.append(number)
        leave.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
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
        return runs.outcome(service.until or service.ends_on_interrupt)
    finally:
        working.cancel()
        await runs.close()
        server.should_exit = True
        with contextlib.suppress(SystemExit):
            await serving
        watching.cancel()
        gc.unfreeze()


async def _until(runs: Runs, run: str | None, leave: asyncio.Event) -> None:
    """Wait until the service is to leave."""
    waits: list[asyncio.Task[Any]] = [asyncio.create_task(leave.wait())]
    if run is not None:
        waits.append(asyncio.create_task(runs.wait(run)))
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def _uvicorn_config(app: Starlette, listen: Listen) -> uvicorn.Config:
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


def _bind(listen: Listen, most: limits.Limits) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = limits.Listener(family, kind, protocol, most)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        raise ServiceError(f"cannot listen on {listen.host}:{listen.port}: {error}") from error
    return listener


def _address(listener: socket.socket, listen: Listen) -> str:
    return listen.local_address(listener.getsockname()[1])
