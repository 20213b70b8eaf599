"""The Goodbye of a device that does not take part: what it tells the cloud's people."""

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

_REASONS: tuple[tuple[type[HoslError], str], ...] = (
    (DataError, "its data cannot be used, see its log"),
    (ConsentError, "it does not share what the task reads"),
    (MemoryBudgetError, "its memory budget is too small for the run"),
    (BundleError, "its shard cannot be used"),
    (ProtocolError, "what it was sent is against the protocol, see its log"),
)


def goodbye_reason(error: HoslError) -> str:
    """Say for the cloud why a device leaves: the error's own words may hold names and values of this machine."""
    if isinstance(error, UnservedError):  # of the cloud's own settings
        return str(error)
    return next((text for kind, text in _REASONS if isinstance(error, kind)), "an error of its own, see its log")


async def decline(cloud: Cloud, hello: Hello, error: HoslError) -> None:
    """Connect, say why this device does not come, and leave; quietly where that cannot be."""
    link = Link(Progress())
    with contextlib.suppress(HoslError, asyncio.TimeoutError, OSError):
        async with link.open(cloud):
            link.send(hello)
            await within(WELCOME_S, link.receive())  # before that the run knows of no device to be told about
            await link.leave(goodbye_reason(error))
