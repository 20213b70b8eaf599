"""What devices come for: the shard, snapshots of its weights, and the websocket that leads to a run.

The websocket's endpoint is `DeviceRoutes._connect`. It checks the token, makes a Peer (runs/peer.py), which reads and
writes the socket, and beside it a task that leads the device to its run: Hello, RunQueue.route, Admission.serve_peer
(runs/admission.py). All of it runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from hosl_cloud import metrics
from hosl_cloud.exceptions import StoreError
from hosl_cloud.runs.coordinator import Coordinator
from hosl_cloud.runs.peer import Peer, PeerGone
from hosl_cloud.runs.queue import RunQueue
from hosl_cloud.service.access import Authenticator, Caller, Denied, guarded
from hosl_cloud.service.openapi import BYTES, JSON
from hosl_protocol.program.logs import log_scope
from hosl_protocol.run.manifest import MANIFEST
from hosl_protocol.wire.messages import Hello, Refusal

log = logging.getLogger(__name__)

HELLO_DEADLINE_S = 30.0
"""Longest wait for a device's first word; before it knows its weights' digest it reads them."""


class _CountedFile(FileResponse):
    """A file for devices, whose bytes count as those of messages do."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(path, media_type=BYTES)
        self._counter = metrics.wire_counter("sent", kind)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, and count what is sent."""

        async def counted(message: Message) -> None:
            await send(message)
            self._counter.inc(len(message.get("body", b"")))

        await super().__call__(scope, receive, counted)


class DeviceRoutes:
    """Answers devices that show a token."""

    def __init__(self, runs: RunQueue, authenticator: Authenticator) -> None:
        self._runs, self._authenticator = runs, authenticator

    def routes(self) -> list[BaseRoute]:
        """List the routes."""
        return [
            Route("/v1/bundle/{path:path}", guarded(self._bundle_file, self._authenticator.identify)),
            Route("/v1/device/{name}", guarded(self._device, self._authenticator.identify)),
            Route("/v1/snapshot/{run}/{round:int}", guarded(self._snapshot, self._authenticator.identify)),
            WebSocketRoute("/v1/device", self._connect),
        ]

    async def _bundle_file(self, request: Request) -> Response:
        """Send the manifest or a file of the shard, by the names in the manifest only; ranges are honoured."""
        caller: Caller = request.state.caller
        current = self._runs.current.for_device(caller.bundle)
        device = caller.token.name if caller.token is not None else "local"

        # One that waits for the next run has nothing to do in one that is over.
        if current is None or (current.is_over and "waits" in request.query_params):
            headers = {"Retry-After": str(self._runs.retries.add(device))}
            return PlainTextResponse("there is no run at present\n", 503, headers)
        self._runs.retries.remove(device)

        path: str = request.path_params["path"]
        if path not in {entry.path for entry in current.manifest.shard_files} | {MANIFEST}:
            return Response(status_code=404)
        return _CountedFile(current.bundle / path, "shard")

    async def _device(self, request: Request) -> Response:
        """Tell a device that asks before it joins what it will be asked for: 403 where its token is another's."""
        caller: Caller = request.state.caller
        if not self._authenticator.may_be(caller, request.path_params["name"]):
            return Denied(403).response

        current = self._runs.current.for_device(caller.bundle)
        coordinator = current.coordinator if current is not None and not current.is_over else None
        if coordinator is None:
            return Response(msgspec.json.encode({"task": None}), media_type=JSON)

        known = await asyncio.to_thread(coordinator.store.device, coordinator.run.id, request.path_params["name"])
        config = coordinator.config
        facts: dict[str, Any] = {"task": config.task, "max_length": config.max_length}
        facts["data_digest"] = known.data_digest if known is not None else ""
        if known is not None and known.data_digest and config.strict:
            facts["eval_digest"] = known.eval_digest
        return Response(msgspec.json.encode(facts), media_type=JSON)

    async def _snapshot(self, request: Request) -> Response:
        current, bundle = self._runs.current.of_run(request.path_params["run"]), request.state.caller.bundle
        is_its_own = current is not None and bundle in ("", current.bundle.name)
        coordinator = current.coordinator if current is not None and is_its_own else None
        path = coordinator.snapshots.path(request.path_params["round"]) if coordinator is not None else None
        # One that was replaced since the Welcome is gone: the device connects again and is offered a newer one.
        return Response(status_code=404) if path is None else _CountedFile(path, "snapshot")

    async def _connect(self, socket: WebSocket) -> None:
        """Serve one device's connection from its first byte to its last."""
        try:
            caller = self._authenticator.check_device(socket)
        except Denied as denied:
            await socket.send_denial_response(denied.response)
            return

        await socket.accept()
        with log_scope():
            peer = Peer(socket, partial(self._authenticator.may_be, caller))
            # Beside the reading and writing, on which it waits; where it ends first, it closes the connection.
            leading = asyncio.create_task(self._lead_to_run(peer, caller.bundle))
            leading.add_done_callback(partial(_hang_up, peer))
            await peer.serve()
            try:
                await leading
            except PeerGone:
                pass
            except StoreError as error:
                log.warning("device %s: %s", peer.name, error)
            except Exception:
                log.exception("device %s: its connection is ended", peer.name)

    async def _lead_to_run(self, peer: Peer, bundle: str) -> None:
        """Bring a device to its run, by its Hello, and stay with it; with a `bundle` to runs of that one alone."""
        try:
            hello = (await peer.next(HELLO_DEADLINE_S)).message
        except asyncio.TimeoutError:
            peer.end(Refusal(code="late", reason=f"no hello in {HELLO_DEADLINE_S:.0f} s", retry=True))
            return
        assert isinstance(hello, Hello)  # the Connection lets nothing else come first

        target = await self._runs.route(hello)
        if not isinstance(target, Coordinator):
            peer.end(target)
        elif bundle not in ("", target.run.bundle.name):
            peer.end(Refusal(code="shard", reason=f"its token is for the runs of bundle {bundle}", retry=False))
        else:
            await target.admission.serve_peer(peer, hello)


def _hang_up(peer: Peer, leading: asyncio.Task[None]) -> None:
    """Close once what is queued has been sent; a device that could not be stored is to come back."""
    if not leading.cancelled() and isinstance(leading.exception(), StoreError):
        peer.tell(Refusal(code="run", reason="the service's database takes nothing at present", retry=True))
    peer.hang_up()
