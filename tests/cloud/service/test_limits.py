"""What one address may take: rates, open connections, and time for a request's head, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from hosl_cloud.service import limits
from hosl_cloud.service.authority import make_authority
from hosl_cloud.service.limits import (
    MAX_BODY_BYTES,
    MAX_HEAD_BYTES,
    Buckets,
    HttpProtocol,
    Limits,
    Listener,
    network_of,
)

GET = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_bucket_has_a_burst_and_then_a_rate() -> None:
    bucket = Buckets(burst=3, per_second=2)
    assert [bucket.take("a", now=100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert bucket.take("b", now=100.0) == 0.0, "another address has its own"
    assert bucket.take("a", now=100.25) == 0.25
    assert bucket.take("a", now=100.5) == 0.0
    assert bucket.take("a", now=100.5) == 0.5


@given(st.lists(st.floats(0.0, 10.0), max_size=50), st.integers(1, 5))
def test_in_any_time_no_more_pass_than_burst_and_rate_allow(pauses: list[float], burst: int) -> None:
    bucket, now, passed = Buckets(burst=burst, per_second=1.0), 0.0, 0
    for pause in pauses:
        now += pause
        passed += bucket.take("a", now=now) == 0.0
    assert passed <= burst + now + 1e-6


def test_the_memory_for_addresses_is_bounded_and_the_oldest_go() -> None:
    bucket = Buckets(burst=1, per_second=0.001, addresses=100)
    for number in range(1000):
        bucket.take(f"10.0.{number // 256}.{number % 256}", now=0.0)
    assert len(bucket) == 100
    assert bucket.take("10.0.3.231", now=0.0) > 0.0, "the newest are remembered"
    assert bucket.take("10.0.0.0", now=0.0) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("fe80::1%eth0", "fe80::1%eth1", True),
        ("", "testclient", False),
    ],
)
def test_an_address_of_ipv6_is_its_site(one: str, other: str, is_same: bool) -> None:
    assert (network_of(one) == network_of(other)) == is_same


@contextlib.asynccontextmanager
async def serving(most: Limits, tls: Path | None = None) -> AsyncIterator[tuple[int, Listener]]:
    """A small service behind the limits: its port and listener."""

    async def much(request: Request) -> Response:
        return PlainTextResponse("x" * 20_000_000)

    async def answer(request: Request) -> Response:
        body = await limits.read_body(request)
        return PlainTextResponse("refused" if body is None else f"{len(body)}")

    listener = Listener(socket.AF_INET, socket.SOCK_STREAM, 0, most)
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        Starlette(routes=[Route("/x", answer, methods=["GET", "POST"]), Route("/much", much)]),
        http=HttpProtocol,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ssl_certfile=tls and tls / "server.pem",
        ssl_keyfile=tls and tls / "server.key",
        lifespan="off",
        log_config=None,
        timeout_keep_alive=1,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1], listener
    finally:
        server.should_exit = True
        await task


def run(test: Callable[[int, Listener], Awaitable[None]], most: Limits | None = None, tls: Path | None = None) -> None:
    async def main() -> None:
        async with serving(most or Limits(), tls) as (port, listener):
            await asyncio.wait_for(test(port, listener), 20.0)

    asyncio.run(main())


async def exchange(port: int, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """Send pieces with pauses; what comes back until the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = asyncio.create_task(reader.read())
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
    try:
        return await got
    except ConnectionError:
        return b""
    finally:
        writer.close()


def is_refused(number: int) -> bool:
    return (REGISTRY.get_sample_value("hosl_connections_refused_total") or 0.0) >= number


def test_an_address_may_hold_so_many_connections_and_closing_makes_room() -> None:
    async def test(port: int, listener: Listener) -> None:
        before = REGISTRY.get_sample_value("hosl_connections_refused_total") or 0.0
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        while listener.connections < 3:
            await asyncio.sleep(0.01)
        assert await exchange(port, GET) == b""
        assert is_refused(int(before) + 1)
        reader, writer = held[0]
        writer.write(GET)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200"), "those that stand are served"
        writer.close()
        while listener.connections == 3:
            await asyncio.sleep(0.01)
        assert b" 200 " in await exchange(port, GET)
        for _, writer in held[1:]:
            writer.close()
        while listener.connections:
            await asyncio.sleep(0.01)

    run(test, Limits(connections_per_address=3))


def test_all_together_may_hold_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(port: int, listener: Listener) -> None:
        writers = [(await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(2)]
        while listener.connections < 2:
            await asyncio.sleep(0.01)
        assert await exchange(port, GET) == b""
        for writer in writers:
            writer.close()

    run(test, Limits(connections=2))
    monkeypatch.setattr(limits, "_SPARE_FILES", 10**9)  # a process that may open few files
    with Listener(socket.AF_INET, socket.SOCK_STREAM, 0, Limits()) as listener:
        assert listener._most == 1


SLOW: list[tuple[bytes, ...]] = [
    (),
    (b"GET /x",),
    (b"GET /x HTTP/1.1\r\n", *(b"X-A%d: b\r\n" % number for number in range(40))),
    (GET, b"GET /x HTTP/1.1\r\n", *(b"X-A%d: b\r\n" % number for number in range(40))),
]


@pytest.mark.parametrize("pieces", SLOW, ids=["silent", "half", "drip", "drip after a request"])
def test_a_request_whose_head_does_not_come_is_dropped(
    pieces: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HEAD_TIMEOUT_S", 0.3)

    async def test(port: int, listener: Listener) -> None:
        began = time.monotonic()
        got = await exchange(port, *pieces, pause_s=0.05)
        assert got.count(b"HTTP/1.1") == pieces.count(GET)
        while listener.connections:
            await asyncio.sleep(0.01)
        assert 0.25 < time.monotonic() - began < 2.5

    run(test)


def test_a_connection_that_is_kept_between_requests_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEAD_TIMEOUT_S", 0.2)

    async def test(port: int, listener: Listener) -> None:
        got = await exchange(port, GET, GET, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), pause_s=0.4)
        assert got.count(b"HTTP/1.1 200") == 3

    run(test)


def test_a_tls_handshake_that_does_not_end_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "HEAD_TIMEOUT_S", 0.5)
    authority = make_authority(tmp_path, ["localhost"])

    async def test(port: int, listener: Listener) -> None:
        began = time.monotonic()
        for piece in (b"", b"\x16\x03\x01"):
            assert await exchange(port, piece) == b""
        assert 0.9 < time.monotonic() - began < 5.0
        while listener.connections:
            await asyncio.sleep(0.01)
        context = ssl.create_default_context(cafile=authority.ca_cert)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        await asyncio.sleep(0.3)
        writer.write(GET)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.6)
        writer.write(GET)
        await asyncio.wait_for(reader.readuntil(b"HTTP/1.1 200"), 5.0)
        writer.close()

    run(test, tls=authority.folder)


MUCH = b"GET /much HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def test_a_client_that_takes_nothing_is_dropped_and_a_slow_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STALL_TIMEOUT_S", 0.5)

    async def test(port: int, listener: Listener) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
        writer.write(MUCH)
        while listener.connections == 0:
            await asyncio.sleep(0.01)
        while listener.connections:
            await asyncio.sleep(0.01)
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(MUCH)
        size = 0
        while data := await reader.read(1_000_000):
            size += len(data)
            await asyncio.sleep(0.01)
        assert size > 20_000_000
        writer.close()

    run(test)


def test_a_head_has_its_size() -> None:
    async def test(port: int, listener: Listener) -> None:
        header = b"X: " + b"a" * MAX_HEAD_BYTES
        assert b" 400 " in await exchange(port, b"GET /x HTTP/1.1\r\nHost: x\r\n" + header)
        assert b" 400 " in await exchange(port, b"GET /" + b"x" * (MAX_HEAD_BYTES + 1))
        assert b" 400 " in await exchange(port, b"\x00\xff" * 100 + b"\r\n\r\n")

    run(test)


@pytest.mark.parametrize(
    ("length", "sent", "answer"),
    [
        (5, b"12345", b"\r\n\r\n5"),
        (MAX_BODY_BYTES, bytes(MAX_BODY_BYTES), b"\r\n\r\n%d" % MAX_BODY_BYTES),
        (MAX_BODY_BYTES + 1, bytes(MAX_BODY_BYTES + 1), b"refused"),
        (10**12, bytes(2 * MAX_BODY_BYTES), b"refused"),
        (5, b"123", b"refused"),
    ],
)
def test_a_body_has_its_size_and_its_time(
    length: int, sent: bytes, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", 0.4)

    async def test(port: int, listener: Listener) -> None:
        head = b"POST /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % length
        got = await exchange(port, head + sent)
        # An end with bytes that nobody read may overtake the answer.
        assert got.endswith(answer) or (got == b"" and len(sent) > MAX_BODY_BYTES)

    run(test)


def test_nobody_waits_for_a_body_that_nobody_wants() -> None:
    async def test(port: int, listener: Listener) -> None:
        head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        began = time.monotonic()
        assert b" 404 " in await exchange(port, head, *([b"x"] * 100), pause_s=0.02)
        while listener.connections:
            await asyncio.sleep(0.01)
        assert time.monotonic() - began < 2.5

    run(test)
