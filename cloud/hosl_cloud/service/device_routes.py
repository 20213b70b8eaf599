"""What devices come for: the shard, snapshots of its weights, and the websocket that leads to a run."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from hosl_cloud.exceptions import StoreError
from hosl_cloud.runs.coordinator import Coordinator
from hosl_cloud.runs.peer import Peer, PeerGone
from hosl_cloud.runs.queue import Runs
from hosl_cloud.service.access import Caller, Denied, Guard, guarded
from hosl_cloud.service.openapi import BYTES, JSON
from hosl_protocol.program.logs import log_scope
from hosl_protocol.run.manifest import MANIFEST
from hosl_protocol.wire.messages import Hello, Refusal

log = logging.getLogger(__name__)

HELLO_DEADLINE_S = 30.0
"""Longest wait for a device's first word; before it knows its weights' digest it reads them."""


class DeviceRoutes:
    """Answers devices that show a token."""

    def __init__(self, runs: Runs, guard: Guard) -> None:
        self._runs, self._guard = runs, guard

    def routes(self) -> list[BaseRoute]:
        """All of them."""
        return [
            Route("/v1/bundle/{path:path}", guarded(self._bundle_file, self._guard.identify)),
            Route("/v1/device/{name}", guarded(self._place, self._guard.identify)),
            Route("/v1/snapshot/{run}/{round:int}", guarded(self._snapshot, self._guard.identify)),
            WebSocketRoute("/v1/device", self._connect),
        ]

    async def _bundle_file(self, request: Request) -> Response:
        """The manifest or a file of the shard, by the names in the manifest only; ranges are honoured."""
        caller: Caller = request.state.caller
        slot, device = self._runs.current(caller.bundle), caller.token.name if caller.token is not None else "local"
        # One that waits for the next run has nothing to do in one that is over.
        if slot is None or (slot.is_over and "waits" in request.query_params):
            headers = {"Retry-After": str(self._runs.returning.ask(device))}
            return PlainTextResponse("there is no run at present\n", 503, headers)
        self._runs.returning.arrive(device)
        path: str = request.path_params["path"]
        if path not in {entry.path for entry in slot.manifest.shard_files} | {MANIFEST}:
            return Response(status_code=404)
        return FileResponse(slot.bundle / path, media_type=BYTES)

    async def _place(self, request: Request) -> Response:
        """For a device that asks before it joins: 403 where its token is another's."""
        caller: Caller = request.state.caller
        if not self._guard.may_be(caller, request.path_params["name"]):
            return Denied(403).response
        slot = self._runs.current(caller.bundle)
        coordinator = slot.coordinator if slot is not None and not slot.is_over else None
        if coordinator is None:
            return Response(msgspec.json.encode({"task": None}), media_type=JSON)
        known = await asyncio.to_thread(coordinator.store.device, coordinator.run.id, request.path_params["name"])
        place = {"task": coordinator.config.task, "data_digest": known.data_digest if known is not None else ""}
        if known is not None and known.data_digest and coordinator.config.strict:
            place["eval_digest"] = known.eval_digest
        return Response(msgspec.json.encode(place), media_type=JSON)

    async def _snapshot(self, request: Request) -> Response:
        slot, bundle = self._runs.slot_of(request.path_params["run"]), request.state.caller.bundle
        is_its_own = slot is not None and bundle in ("", slot.bundle.name)
        coordinator = slot.coordinator if slot is not None and is_its_own else None
        path = coordinator.snapshots.path(request.path_params["round"]) if coordinator is not None else None
        # One that was replaced since the Welcome is gone: the device connects again and is offered a newer one.
        return Response(status_code=404) if path is None else FileResponse(path, media_type=BYTES)

    async def _connect(self, socket: WebSocket) -> None:
        try:
            caller = self._guard.admit(socket)
        except Denied as denied:
            await socket.send_denial_response(denied.response)
            return
        await socket.accept()
        with log_scope():
            await self._attend(Peer(socket, partial(self._guard.may_be, caller)), caller.bundle)

    async def _attend(self, peer: Peer, bundle: str) -> None:
        attending = asyncio.create_task(self._admit(peer, bundle))
        attending.add_done_callback(partial(_hang_up, peer))
        await peer.serve()
        try:
            await attending
        except PeerGone:
            pass
        except StoreError as error:
            log.warning("device %s: %s", peer.name, error)
        except Exception:
            log.exception("device %s: its connection is ended", peer.name)

    async def _admit(self, peer: Peer, bundle: str) -> None:
        """Bring a device to its run, by its Hello; with a `bundle` to runs of that one alone."""
        try:
            hello = (await peer.next(HELLO_DEADLINE_S)).message
        except asyncio.TimeoutError:
            peer.end(Refusal(code="late", reason=f"no hello in {HELLO_DEADLINE_S:.0f} s", retry=True))
            return
        assert isinstance(hello, Hello)
        place = await self._runs.route(hello)
        if not isinstance(place, Coordinator):
            peer.end(place)
        elif bundle not in ("", place.run.bundle.name):
            peer.end(Refusal(code="shard", reason=f"its token is for the runs of bundle {bundle}", retry=False))
        else:
            await place.admission.attend(peer, hello)


def _hang_up(peer: Peer, attending: asyncio.Task[None]) -> None:
    """Close once what is queued has been sent; a device that could not be stored is to come back."""
    if not attending.cancelled() and isinstance(attending.exception(), StoreError):
        peer.tell(Refusal(code="run", reason="the service's database takes nothing at present", retry=True))
    peer.hang_up()
