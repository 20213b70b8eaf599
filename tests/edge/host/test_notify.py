"""What systemd hears, over a real datagram socket."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosl_edge.host.display import Display
from hosl_edge.host.notify import WatchedPool, notified
from hosl_protocol.program.notify import notify


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def heard(listener: socket.socket) -> list[str]:
    messages = []
    try:
        while True:
            messages.append(listener.recv(4096).decode())
    except BlockingIOError:
        return messages


def test_what_is_said_is_the_services_status(systemd: socket.socket) -> None:
    Display("pi").say("joins run 7")
    assert heard(systemd) == ["STATUS=joins run 7"]


def test_what_a_cloud_says_is_no_word_to_systemd(systemd: socket.socket) -> None:
    notify("STATUS=refused\nMAINPID=1\n\x1b[2J")
    assert systemd.recv(4096) == rb"STATUS=refused MAINPID=1 \x1b[2J"


def test_an_abstract_address_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        name = f"hosl-test-{os.getpid()}"
        listener.bind("\0" + name)
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        notify("READY=1", "STATUS=up")
        assert heard(listener) == ["READY=1\nSTATUS=up"]


def test_a_listener_that_does_not_listen_holds_nothing_up(systemd: socket.socket) -> None:
    longest_s = 0.0
    for _ in range(40):  # the kernel queues ten, or some more
        began = time.monotonic()
        notify("STATUS=word")
        longest_s = max(longest_s, time.monotonic() - began)
        if longest_s > 0.3:
            break
    assert longest_s < 2.0


def beats(listener: socket.socket, seconds: float, stall_timeout_s: float, work_s: float, ticks: bool) -> list[str]:
    """What is heard of an event loop that waits, with `work_s` of work in a thread that may tick."""
    let_go = threading.Event()

    async def main() -> list[str]:
        pool = WatchedPool()
        asyncio.get_running_loop().set_default_executor(pool)

        def work() -> None:
            ends = time.monotonic() + work_s
            while time.monotonic() < ends and not let_go.wait(0.02):
                if ticks:
                    pool.tick()

        async with notified(pool, stall_timeout_s):
            working = asyncio.get_running_loop().run_in_executor(None, work) if work_s else None
            ends, counted = time.monotonic() + seconds, []
            while time.monotonic() < ends:
                await asyncio.sleep(0.02)
                counted += heard(listener)
            let_go.set()
            if working is not None:
                await working
        return counted

    return asyncio.run(main())


@pytest.fixture
def watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")  # fed every 50 ms


@pytest.mark.usefixtures("watchdog")
def test_an_agent_that_waits_is_alive(systemd: socket.socket) -> None:
    messages = beats(systemd, 0.5, stall_timeout_s=0.1, work_s=0, ticks=False)
    assert messages[0] == "READY=1"
    assert 5 <= messages.count("WATCHDOG=1") <= 12
    assert heard(systemd) == ["STOPPING=1"]


@pytest.mark.usefixtures("watchdog")
def test_work_of_which_nothing_comes_starves_the_watchdog(systemd: socket.socket) -> None:
    messages = beats(systemd, 0.8, stall_timeout_s=0.2, work_s=60, ticks=False)
    assert 2 <= messages.count("WATCHDOG=1") <= 6


@pytest.mark.usefixtures("watchdog")
def test_a_long_download_that_goes_on_is_alive(systemd: socket.socket) -> None:
    messages = beats(systemd, 0.8, stall_timeout_s=0.2, work_s=60, ticks=True)
    assert messages.count("WATCHDOG=1") >= 8


@pytest.mark.usefixtures("watchdog")
def test_an_event_loop_that_is_stuck_starves_the_watchdog(systemd: socket.socket) -> None:
    async def main() -> list[str]:
        async with notified(WatchedPool(), 60.0):
            await asyncio.sleep(0.01)
            heard(systemd)
            time.sleep(0.5)
            return heard(systemd)

    assert asyncio.run(main()) == []


def test_another_process_s_watchdog_is_not_fed(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert beats(systemd, 0.2, stall_timeout_s=60, work_s=0, ticks=False) == ["READY=1"]
