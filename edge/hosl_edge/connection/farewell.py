"""What a device tells the cloud's people when it does not take part."""

from __future__ import annotations

import asyncio
import contextlib

from hosl_edge.connection.link import Link
from hosl_edge.connection.trust import Cloud
from hosl_edge.exceptions import ConsentError, DataError, MemoryBudgetError, UnservedError
from hosl_edge.host.display import Progress
from hosl_protocol.exceptions import HoslError, ProtocolError
from hosl_protocol.program.waiting import within
from hosl_protocol.run.manifest import BundleError
from hosl_protocol.wire.messages import Hello

WELCOME_S = 10.0
"""How long a device that declines waits for the run to know it."""

_FAREWELLS: tuple[tuple[type[HoslError], str], ...] = (
    (DataError, "its data cannot be used, see its log"),
    (ConsentError, "it does not share what the task reads"),
    (MemoryBudgetError, "its memory budget is too small for the run"),
    (BundleError, "its shard cannot be used"),
    (ProtocolError, "what it was sent is against the protocol, see its log"),
)


def farewell(error: HoslError) -> str:
    """Why a device leaves, for the cloud: the error's own words may hold names and values of this machine."""
    if isinstance(error, UnservedError):  # of the cloud's own settings
        return str(error)
    return next((text for kind, text in _FAREWELLS if isinstance(error, kind)), "an error of its own, see its log")


async def decline(cloud: Cloud, hello: Hello, error: HoslError) -> None:
    """Connect, say why this device does not come, and leave; quietly where that cannot be."""
    link = Link(Progress())
    with contextlib.suppress(HoslError, asyncio.TimeoutError, OSError):
        async with link.open(cloud):
            link.send(hello)
            await within(WELCOME_S, link.receive())
            await link.leave(farewell(error))
