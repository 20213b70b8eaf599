"""What systemd is told over NOTIFY_SOCKET: ready, stopping, and that it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

from hosl_protocol.program.plain import plain

SEND_TIMEOUT_S = 0.5
"""A listener whose queue is full must not hold anybody up."""


def notify(*lines: str) -> None:
    """Send sd_notify(3) assignments, such as `READY=1`, one a line each; nothing where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # systemd writes @ for the zero byte of an abstract address.
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(SEND_TIMEOUT_S)
        sender.sendto("\n".join(map(plain, lines)).encode(), address)


async def feed_watchdog(is_well: Callable[[], bool] = lambda: True) -> None:
    """Send WATCHDOG=1 for ever, while this event loop runs and `is_well`; nothing where no watchdog waits for it."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    # Twice as often as systemd wants to hear of it, as sd_watchdog_enabled(3) advises.
    interval_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 / 2
    while interval_s:
        if is_well():
            notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)
