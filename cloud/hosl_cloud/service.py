"""The service: websocket, shard downloads, health and metrics on one port; compute never runs on its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import prometheus_client
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from hosl_cloud import limits, metrics
from hosl_cloud.access import Denied, Guard
from hosl_cloud.coordinator import Coordinator
from hosl_cloud.devices_api import device_routes
from hosl_cloud.exceptions import ServiceError
from hosl_cloud.listen import Listen
from hosl_cloud.peer import Peer, PeerGone
from hosl_cloud.run import Ending, Paused
from hosl_protocol import PIECE_BYTES, Refusal
from hosl_protocol.manifest import MANIFEST

log = logging.getLogger(__name__)

BYTES = "application/octet-stream"
HEARTBEAT_S = 15.0
GOODBYE_S = 5.0
"""Longest wait for devices to hang up at the end."""

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(coordinator: Coordinator, guard: Guard, ca: Path | None = None) -> Starlette:
    """All routes. `/healthz` and the CA's certificate are open; the rest needs a token."""

    def guarded(endpoint: Endpoint) -> Endpoint:
        async def checked(request: Request) -> Response:
            try:
                guard.identify(request)
            except Denied as denied:
                return Response(status_code=denied.status, headers=denied.headers)
            return await endpoint(request)

        return checked

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def ca_certificate(request: Request) -> Response:
        return Response(status_code=404) if ca is None else FileResponse(ca, media_type="application/x-pem-file")

    async def figures(request: Request) -> Response:
        return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def bundle_file(request: Request) -> Response:
        return _bundle_file(coordinator, request.path_params["path"])

    async def snapshot(request: Request) -> Response:
        path = coordinator.snapshots.path(request.path_params["round"])
        # One that was replaced since the Welcome is gone: the device connects again and is offered a newer one.
        return Response(status_code=404) if path is None else FileResponse(path, media_type=BYTES)

    async def run_status(request: Request) -> Response:
        return JSONResponse(_status(coordinator))

    async def device(socket: WebSocket) -> None:
        try:
            caller = guard.admit(socket)
        except Denied as denied:
            await socket.send_denial_response(Response(status_code=denied.status, headers=denied.headers))
            return
        await socket.accept()
        await _attend(coordinator, Peer(socket, coordinator.fleet.on_arrival, partial(guard.may_be, caller)))

    def disconnect(name: str, reason: str) -> None:
        peer = coordinator.fleet.peers.get(name)
        if peer is not None:
            peer.is_ready = False
            peer.end(Refusal(code="device", reason=reason, retry=False))

    return Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/v1/ca.pem", ca_certificate),
            *device_routes(guard, disconnect),
            Route("/metrics", guarded(figures)),
            Route("/v1/run", guarded(run_status)),
            Route("/v1/bundle/{path:path}", guarded(bundle_file)),
            Route("/v1/snapshot/{round:int}", guarded(snapshot)),
            WebSocketRoute("/v1/device", device),
        ]
    )


def _bundle_file(coordinator: Coordinator, path: str) -> Response:
    """The manifest or a file of the shard, by the names in the manifest only; ranges are honoured."""
    allowed = {entry.path for entry in coordinator.run.manifest.shard_files} | {MANIFEST}
    if path not in allowed:
        return Response(status_code=404)
    return FileResponse(coordinator.run.bundle / path, media_type=BYTES)


def _status(coordinator: Coordinator) -> dict[str, object]:
    run, fleet = coordinator.run, coordinator.fleet
    waiting = fleet.waiting
    return {
        "run": run.id,
        "state": run.ending or ("running" if run.round else "pending"),
        "algorithm": run.config.algorithm,
        "epoch": run.epoch,
        "round": run.round,
        "rounds": run.config.rounds,
        "waits_for": None if waiting is None else dataclasses.asdict(waiting),
        "devices": {name: {"is_ready": peer.is_ready} for name, peer in fleet.peers.items()},
        "wire_bytes": metrics.wire_bytes_by_kind(),
    }


async def _attend(coordinator: Coordinator, peer: Peer) -> None:
    attending = asyncio.create_task(coordinator.admission.attend(peer))
    attending.add_done_callback(lambda _: peer.hang_up())
    await peer.serve()
    try:
        await attending
    except PeerGone:
        pass
    except Exception:
        log.exception("device %s: its connection is ended", peer.name)


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


async def serve(
    coordinator: Coordinator, guard: Guard, listen: Listen, on_listening: Callable[[str], None], *, once: bool
) -> Ending | Paused:
    """Run the service until a signal, or with `once` until the run has ended. Raises what ended the run."""
    listener = _bind(listen, guard.limits)
    app = make_app(coordinator, guard, listen.authority.ca_cert if listen.authority is not None else None)
    server = _Server(_uvicorn_config(app, listen))
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    # What is loaded by now stays: a collection that walks through all of torch holds the event loop up.
    gc.freeze()
    try:
        on_listening(_address(listener, listen))
        return await _train_until(coordinator, signals, once=once)
    finally:
        await _hang_up(coordinator)
        server.should_exit = True
        with contextlib.suppress(SystemExit):
            await serving
        gc.unfreeze()


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


async def _train_until(
    coordinator: Coordinator, signals: asyncio.Queue[signal.Signals], *, once: bool
) -> Ending | Paused:
    """SIGTERM pauses the run, which a later service resumes; SIGINT ends it."""
    training = asyncio.create_task(coordinator.train())
    signalled = asyncio.create_task(signals.get())
    await asyncio.wait({training, signalled}, return_when=asyncio.FIRST_COMPLETED)
    if not training.done():
        pause = signalled.result() == signal.SIGTERM
        await coordinator.request_stop(pause=pause)
        await asyncio.wait({training}, timeout=2 * coordinator.run.config.devices.round_deadline_s)
        while not training.done():
            # Up to Python 3.11 wait_for may lose a cancellation that meets its result.
            training.cancel()
            await asyncio.wait({training}, timeout=0.5)
        if training.cancelled():
            await (coordinator.pause() if pause else coordinator.end("stopped"))
            return "paused" if pause else "stopped"
    try:
        ending = training.result()
    except Exception:
        signalled.cancel()
        with contextlib.suppress(Exception):
            await coordinator.end("failed")
        raise
    if not once and ending != "paused":
        await signalled
    signalled.cancel()
    return ending


async def _hang_up(coordinator: Coordinator) -> None:
    """Let devices take their last message."""
    peers = list(coordinator.fleet.peers.values())
    waits = [asyncio.create_task(peer.gone.wait()) for peer in peers]
    if waits:
        _, late = await asyncio.wait(waits, timeout=GOODBYE_S)
        for task in late:
            task.cancel()
    await coordinator.admission.flush()
    coordinator.close()
