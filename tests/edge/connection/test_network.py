"""A pause ends early where the network comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import struct
import subprocess
import time

import pytest

from hosl_edge.connection.network import NetworkWatch

NEW_LINK, NEW_ADDRESS, NEW_ROUTE, GONE_ADDRESS = 16, 20, 24, 21


def news(*kinds: int) -> bytes:
    """Netlink messages of these types, each with a body of 5 bytes and its padding."""
    return b"".join(struct.pack("=IHHII", 21, kind, 0, 0, 0) + b"hello\0\0\0" for kind in kinds)


def pause(*messages: bytes, seconds: float = 0.2) -> bool:
    async def run() -> bool:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        watch = NetworkWatch(ours)
        theirs.send(news(NEW_ADDRESS))  # from before the pause
        pausing = asyncio.create_task(watch.pause(seconds))
        await asyncio.sleep(0.02)
        for message in messages:
            theirs.send(message)
        try:
            return await pausing
        finally:
            watch.close()
            theirs.close()

    return asyncio.run(run())


def test_a_new_address_or_route_ends_the_pause() -> None:
    began = time.monotonic()
    assert pause(news(NEW_ADDRESS), seconds=30.0)
    assert pause(news(NEW_LINK, NEW_ROUTE), seconds=30.0)
    assert time.monotonic() - began < 10.0


@pytest.mark.parametrize("messages", [(), (news(NEW_LINK),), (news(GONE_ADDRESS),), (b"\0" * 40,), (b"abc",)])
def test_other_news_do_not(messages: tuple[bytes, ...]) -> None:
    assert not pause(*messages)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2")
def test_the_kernel_tells_of_a_real_address() -> None:
    address = ("127.77.77.77/32", "dev", "lo")

    async def run() -> bool:
        watch = NetworkWatch()
        pausing = asyncio.create_task(watch.pause(10.0))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(subprocess.run, ["ip", "addr", "add", *address], check=True)
        try:
            return await pausing
        finally:
            watch.close()

    try:
        assert asyncio.run(run())
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(["ip", "addr", "del", *address], check=True)
