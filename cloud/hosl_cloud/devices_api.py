"""The devices' tokens over HTTP, for the admin: GET and POST /v1/devices, DELETE /v1/devices/{name}."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hosl_cloud.access import Access, Denied, Guard
from hosl_cloud.exceptions import AccessError, StoreError
from hosl_cloud.limits import read_body
from hosl_cloud.store import TokenRow

Disconnect = Callable[[str, str], None]
"""Ends the connection of a device, by name and with a reason, where it has one."""


class NewDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /v1/devices."""

    name: str


_NEW_DEVICE = msgspec.json.Decoder(NewDevice)


def list_devices(access: Access) -> dict[str, Any]:
    """All devices that have, or had, a token."""
    return {"devices": [_as_data(row) for row in access.list()]}


async def add_device(access: Access, name: str, disconnect: Disconnect) -> dict[str, Any]:
    """Make a device's token; it is in this answer and nowhere else. Raises AccessError."""
    token = await asyncio.to_thread(access.add, name)
    disconnect(name, "the name belongs to a token of its own now")
    return {"name": name, "token": token}


async def revoke_device(access: Access, name: str, disconnect: Disconnect) -> dict[str, Any]:
    """Make a device's token worthless, and end its connection. Raises AccessError."""
    row = await asyncio.to_thread(access.revoke, name)
    disconnect(name, "its token was revoked")
    return _as_data(row)


def device_routes(guard: Guard, disconnect: Disconnect) -> list[Route]:
    """The routes; all are the admin's."""
    access = guard.access

    async def devices(request: Request) -> Response:
        if request.method == "POST":
            name = (await read_json(request, _NEW_DEVICE)).name
            made = await add_device(access, name, disconnect)
            return JSONResponse(made, 201, headers={"Cache-Control": "no-store"})
        return JSONResponse(list_devices(access))

    async def device(request: Request) -> Response:
        return JSONResponse(await revoke_device(access, request.path_params["name"], disconnect))

    return [
        Route("/v1/devices", for_admin(guard, devices), methods=["GET", "POST"]),
        Route("/v1/devices/{name}", for_admin(guard, device), methods=["DELETE"]),
    ]


def for_admin(
    guard: Guard, endpoint: Callable[[Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that answers the admin alone; what is wrong with a request is one line of JSON."""

    async def checked(request: Request) -> Response:
        try:
            guard.check_admin(request)
            return await endpoint(request)
        except Denied as denied:
            return Response(status_code=denied.status, headers=denied.headers)
        except AccessError as error:
            return JSONResponse({"error": error.reason}, error.status)
        except StoreError as error:
            return JSONResponse({"error": str(error)}, 503)

    return checked


async def read_json(request: Request, decoder: msgspec.json.Decoder[Any]) -> Any:
    """The body of a request. Raises AccessError: a form of another site's page cannot send this content type."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise AccessError(415, "send the body as application/json")
    body = await read_body(request)
    if body is None:
        raise AccessError(413, "the body is too long, or came too slowly")
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise AccessError(422, f"the body cannot be used: {error}") from error


def _as_data(row: TokenRow) -> dict[str, Any]:
    return {"name": row.name, "created_at": row.created_at, "revoked_at": row.revoked_at}
