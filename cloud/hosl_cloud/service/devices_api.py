"""The devices' tokens over HTTP, for the admin."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from hosl_cloud.service.access import DeviceTokens
from hosl_cloud.service.openapi import Call, Operation
from hosl_cloud.storage.records import TokenRow

Disconnect = Callable[[str, str], None]
"""Ends the connection of a device, by name and with a reason, where it has one."""


HasBundle = Callable[[str], bool]
"""Whether the service knows a bundle of this name."""


class NewDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The device that is to have a token."""

    name: str
    bundle: str = ""
    """Whose runs it may take part in; empty: all."""


class DeviceToken(msgspec.Struct, frozen=True):
    """A device's token; it is in this answer and nowhere else."""

    name: str
    token: str
    warning: str = ""
    """What may be wrong with what was asked for."""
    command: str = ""
    """What starts the device where its token is in the file NAME.token."""


class Device(msgspec.Struct, frozen=True):
    """A device that has, or had, a token."""

    name: str
    created_at: float
    """Unix time."""
    revoked_at: float | None
    bundle: str
    """Whose runs it may take part in; empty: all."""


class DeviceList(msgspec.Struct, frozen=True):
    """All devices that have, or had, a token."""

    devices: list[Device]


StartOf = Callable[[str, str], str]
"""The command that starts a device, of its name and the bundle that it is kept to."""


def device_operations(
    access: DeviceTokens, disconnect: Disconnect, has_bundle: HasBundle, start_of: StartOf
) -> list[Operation]:
    """List the operations on tokens. Access is written to on other threads, the connection is ended on the loop."""

    async def listing(call: Call) -> DeviceList:
        return DeviceList([_describe(row) for row in access.list()])

    async def add(call: Call) -> DeviceToken:
        name, bundle = call.body.name, call.body.bundle
        token = await asyncio.to_thread(access.add, name, bundle)
        disconnect(name, "the name belongs to a token of its own now")
        warning = (
            "" if not bundle or has_bundle(bundle) else f"no bundle {bundle[:200]!r} is in the service's folder yet"
        )
        return DeviceToken(name, token, warning, start_of(name, bundle))

    async def revoke(call: Call) -> Device:
        name = call.path["name"]
        row = await asyncio.to_thread(access.revoke, name)
        disconnect(name, "its token was revoked")
        return _describe(row)

    return [
        Operation("GET", "/v1/devices", "The devices that have tokens.", listing, DeviceList),
        Operation("POST", "/v1/devices", "Make a device's token.", add, DeviceToken, NewDevice, 201, (), (409,)),
        Operation("DELETE", "/v1/devices/{name}", "Make a device's token worthless.", revoke, Device),
    ]


def _describe(row: TokenRow) -> Device:
    return Device(row.name, row.created_at, row.revoked_at, row.bundle)
