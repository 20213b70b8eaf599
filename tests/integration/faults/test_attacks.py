"""Attacks on a real service while a real device trains with it, and a hostile cloud's on a real device."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import onnx
import psutil
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from hosl_cloud.commands.client import ApiClient
from hosl_cloud.service import limits
from hosl_cloud.service.authority import find_authority, make_authority
from hosl_cloud.service.listen import ListenSettings
from hosl_edge.agent import Summary, run_agent
from hosl_edge.exceptions import ConsentError, RefusedError, TrustError
from hosl_edge.settings import EdgeSettings
from hosl_protocol.run.manifest import MANIFEST, SHARD_GRAPH, BundleError, describe_file, encode_manifest, load_manifest
from hosl_protocol.wire.codec import Frame, encode
from hosl_protocol.wire.connection import Connection, Role
from hosl_protocol.wire.messages import Hello, Message, Refusal, Welcome
from processes import Program
from services import Service, serving
from support import ROOT, TASK, free_port, write_reviews

GROWTH_BYTES = 60 * 2**20
WAIT_S = 20.0
Attack = Callable[["Target"], Awaitable[None]]


T = TypeVar("T")


def in_thread(work: Callable[[], T]) -> T:
    """What asks the store is no work for an event loop, though a test's may wait."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(work).result()


@dataclass
class Target:
    """The service under attack."""

    service: Service
    tls: ssl.SSLContext
    elsewhere: str | None
    """An address of this machine that is not loopback."""

    @property
    def port(self) -> int:
        return int(self.service.address.rpartition(":")[2])

    def token(self, name: str) -> str:
        """A new device's token, as it sends it."""
        return in_thread(lambda: self.service.authenticator.access.add(name)).rpartition("~")[0]

    async def open(self, host: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(host, self.port, ssl=self.tls, server_hostname="localhost")

    async def ask(self, request: str, *headers: str, body: bytes = b"", host: str = "127.0.0.1") -> tuple[int, bytes]:
        """Send a request as it is written; status and all that came."""
        reader, writer = await self.open(host)
        lines = [f"{request} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", "Connection: close", *headers]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        answer = await asyncio.wait_for(reader.read(), WAIT_S)
        writer.close()
        return int(answer.split(b" ", 2)[1]), answer

    def bearer(self, token: str | None = None) -> str:
        return f"Authorization: Bearer {token or self.service.token}"

    @contextlib.asynccontextmanager
    async def device(self, token: str, host: str = "127.0.0.1", **more: Any) -> AsyncIterator[Client]:
        headers = {"Authorization": f"Bearer {token}"}
        async with connect(
            f"wss://{host}:{self.port}/v1/device", ssl=self.tls, server_hostname="localhost",
            additional_headers=headers, compression=None, **more,
        ) as opened:  # fmt: skip
            yield Client(opened, self.service)

    async def is_refused(self, token: str, status: int, host: str = "127.0.0.1", **more: Any) -> None:
        with pytest.raises(InvalidStatus) as caught:
            async with self.device(token, host, **more):
                pass
        assert caught.value.response.status_code == status


@dataclass
class Client:
    """A device's connection that says what an attack wants."""

    socket: ClientConnection
    service: Service

    def __post_init__(self) -> None:
        self.connection = Connection(Role.EDGE)

    async def hello(self, name: str) -> None:
        digest = self.service.coordinator.run.manifest.shard_digest
        for piece in encode(Hello(software="t", device=name, shard_digest=digest, data_digest="d" * 64), {}):
            await self.socket.send(piece)

    async def hear(self, kind: type[Message]) -> Any:
        """The next message of a kind; what came before it is dropped."""
        while True:
            piece = await asyncio.wait_for(self.socket.recv(), WAIT_S)
            assert isinstance(piece, bytes)
            frame: Frame | None = self.connection.receive(piece)
            if frame is not None and isinstance(frame.message, kind):
                return frame.message

    async def refusal(self) -> tuple[str, str]:
        """Code and reason of the Refusal that ends this connection."""
        refusal = await self.hear(Refusal)
        assert not refusal.retry
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(self.socket.recv(), WAIT_S)
        return refusal.code, refusal.reason


# The attacks. Each asserts that it is refused; the good device beside it must not notice.


async def nobodys_tokens(target: Target) -> None:
    name, _, secret = target.token("victim").partition("~")
    wrong = ["", "wrong", secret, f"{name}~", f"{name}~{secret[:-1]}", f"other~{secret}", f"{name}~{secret}~x"]
    for token in wrong:
        await target.is_refused(token, 401)
        for path in ("/v1/runs", "/metrics", f"/v1/bundle/{MANIFEST}", "/v1/snapshot/run-1/1", "/v1/devices"):
            target.service.authenticator.limits.failures = limits.Buckets(30, 0.5)
            assert (await target.ask(f"GET {path}", f"Authorization: Bearer {token}"))[0] == 401
    assert (await target.ask("GET /v1/runs"))[0] == 401


async def anothers_name(target: Target) -> None:
    mine = target.token("mine")
    for name in ("good", "yours", "MINE", "mine."):
        async with target.device(mine) as device:
            await device.hello(name)
            code, reason = await device.refusal()
            assert code == "device"
            assert f"not one of device {name}" in reason


async def the_local_token_for_a_name_with_its_own(target: Target) -> None:
    target.token("owned")
    in_thread(lambda: target.service.authenticator.access.revoke("owned"))
    for name in ("owned", "good"):
        async with target.device(target.service.token) as device:
            await device.hello(name)
            assert (await device.refusal())[0] == "device"


async def a_token_that_is_revoked(target: Target) -> None:
    token = target.token("stolen")
    admin = target.bearer(target.service.admin_token)
    async with target.device(token) as joined, target.device(token) as silent:
        await joined.hello("stolen")
        await joined.hear(Welcome)
        assert (await target.ask("DELETE /v1/devices/stolen", admin))[0] == 200
        assert await joined.refusal() == ("device", "its token was revoked")
        await silent.hello("stolen")  # it was let in before, and had not said who it is
        assert (await silent.refusal())[0] == "device"
    await target.is_refused(token, 401)
    assert (await target.ask("GET /v1/runs", target.bearer(token)))[0] == 401


async def a_join_that_is_replayed(target: Target) -> None:
    """The newest connection of a token is the device; the one before is told so."""
    token = target.token("twice")
    async with target.device(token) as first, target.device(token) as second:
        await first.hello("twice")
        await first.hear(Welcome)
        await second.hello("twice")
        await second.hear(Welcome)
        assert await first.refusal() == ("device", "the device has connected again")


async def a_name_that_gets_its_own_token(target: Target) -> None:
    async with target.device(target.service.token) as squatter:
        await squatter.hello("new")
        await squatter.hear(Welcome)
        status, answer = await target.ask(
            "POST /v1/devices", target.bearer(target.service.admin_token), "Content-Type: application/json",
            body=b'{"name": "new"}',
        )  # fmt: skip
        assert status == 201
        assert b"Cache-Control: no-store" in answer.replace(b"cache-control", b"Cache-Control")
        assert await squatter.refusal() == ("device", "the name belongs to a token of its own now")


async def from_another_machine(target: Target) -> None:
    if target.elsewhere is None:
        return
    await target.is_refused(target.service.token, 401, target.elsewhere)
    assert (await target.ask("GET /v1/runs", target.bearer(), host=target.elsewhere))[0] == 401
    forwarded = "X-Forwarded-For: 127.0.0.1"
    assert (await target.ask("GET /v1/runs", target.bearer(), forwarded, host=target.elsewhere))[0] == 401
    assert (await target.ask("GET /v1/runs", target.bearer(), "X-Forwarded-For: 192.0.2.9"))[0] == 401
    assert (await target.ask("GET /metrics", target.bearer(target.token("far")), host=target.elsewhere))[0] == 200


TRAVERSALS = (
    "../admin-token", "..%2fadmin-token", "%2e%2e/admin-token", "%2e%2e%2fadmin-token", "..%5cadmin-token",
    "shard/../../admin-token", "shard/..%2f..%2fadmin-token", "/etc/passwd", "%2fetc%2fpasswd", "//etc/passwd",
    "....//admin-token", "..%252fadmin-token", "shard/shard.onnx%00", "shard/./shard.onnx", "tail/tail.safetensors",
    "file:///etc/passwd", "%c0%ae%c0%ae/admin-token", "..;/admin-token", "shard", "", "~/.ssh/id_ed25519",
)  # fmt: skip


async def path_traversal(target: Target) -> None:
    for path in TRAVERSALS:
        status, answer = await target.ask(f"GET /v1/bundle/{path}", target.bearer())
        assert status == 404, path
        assert b"root:" not in answer
        assert target.service.admin_token.encode() not in answer
    for path in ("../runs", "run-1/../../run", "%2e%2e/1", "run-1/-1", "run-1/1e3", "run-1/99999999999999999999999"):
        assert (await target.ask(f"GET /v1/snapshot/{path}", target.bearer()))[0] == 404, path
    for path in ("/v1/ca.key", "/v1/../tls/ca.key", "/v1/ca.pem/../ca.key", "/tls/ca.key", "/v1/ca.pem%2f..%2fca.key"):
        assert (await target.ask(f"GET {path}", target.bearer(target.service.admin_token)))[0] == 404, path


async def another_sites_page(target: Target) -> None:
    for origin in ("https://example.org", "null", f"https://127.0.0.1:{target.port}"):
        await target.is_refused(target.service.token, 403, origin=origin)
    admin, json_type = target.bearer(target.service.admin_token), "Content-Type: application/json"
    for headers, status in (
        ((admin, "Content-Type: application/x-www-form-urlencoded"), 415),
        ((admin, "Content-Type: text/plain"), 415),
        ((admin, "Content-Type: multipart/form-data; boundary=x"), 415),
        ((admin,), 415),
        ((admin, json_type, "Origin: https://example.org"), 403),
        ((admin, json_type, "Origin: null"), 403),
        ((json_type, "Origin: https://example.org"), 401),
        ((json_type, f"Cookie: token={target.service.admin_token}"), 401),
    ):
        assert (await target.ask("POST /v1/devices", *headers, body=b'{"name":"x"}'))[0] == status, headers
    assert (await target.ask("GET /v1/devices?name=x&_method=POST", admin))[0] == 200
    assert (await target.ask("DELETE /v1/devices/good", admin, "Origin: https://example.org"))[0] == 403
    assert not target.service.authenticator.access.has("x")


NO_REQUESTS = (
    b"\x00" * 5000,
    b"GET /v1/runs HTTP/9.9\r\n\r\n",
    b"GET /v1/device HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20000,
    b"GET /" + b"a" * 100_000,
    b"POST /v1/devices HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /v1/device HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET /v1/device HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: x\r\nSec-WebSocket-Version: 99\r\n\r\n\xff\xff\xff",
)


async def what_is_no_request(target: Target) -> None:
    async def send(raw: bytes) -> None:
        reader, writer = await target.open()
        with contextlib.suppress(ConnectionError):
            writer.write(raw)
            answer = await asyncio.wait_for(reader.read(), WAIT_S)
            assert answer == b"" or answer.split(b" ", 2)[1][:1] == b"4", answer[:100]
        writer.close()

    await asyncio.gather(*map(send, NO_REQUESTS))
    admin = target.bearer(target.service.admin_token)
    deep = await target.ask("POST /v1/devices", admin, "Content-Type: application/json", body=b"[" * 500_000)
    assert deep[0] == 422


async def a_thousand_connections(target: Target) -> None:
    """From another loopback address; most are closed as they come, the rest when their time is over."""
    most = target.service.authenticator.limits
    most.connections_per_address = 64
    held, closed = list[socket.socket](), 0
    for _ in range(1000):
        attacker = socket.socket()
        attacker.bind(("127.0.0.2", 0))
        attacker.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            attacker.connect(("127.0.0.1", target.port))
        held.append(attacker)
        await asyncio.sleep(0)
    # Half of those that stay drip a request's head.
    for _ in range(30):
        await asyncio.sleep(0.1)
        for attacker in held[::2]:
            with contextlib.suppress(OSError):
                attacker.send(b"G")
    for attacker in held:
        with contextlib.suppress(BlockingIOError):
            closed += is_closed(attacker)
        attacker.close()
    assert closed == len(held)
    most.connections_per_address = 512


def is_closed(attacker: socket.socket) -> bool:
    """Raises BlockingIOError where it is open."""
    try:
        return attacker.recv(100) == b""
    except ConnectionError:
        return True


async def weak_ciphers(target: Target) -> None:
    for ciphers, is_taken in (("AES128-SHA:AES128-GCM-SHA256:ECDHE-ECDSA-AES128-SHA", False), ("DEFAULT", True)):
        context = ssl.create_default_context(cafile=target.service.folder / "tls" / "ca.pem")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(ciphers)
        with contextlib.nullcontext() if is_taken else pytest.raises((ssl.SSLError, ConnectionError)):
            _, writer = await asyncio.open_connection("127.0.0.1", target.port, ssl=context)
            assert "GCM" in writer.get_extra_info("cipher")[0] or "CHACHA" in writer.get_extra_info("cipher")[0]
            writer.close()


async def guesses(target: Target) -> None:
    target.service.authenticator.limits.failures = limits.Buckets(burst=5, per_second=0.1)
    statuses = [await target.ask("GET /v1/runs", target.bearer("guess")) for _ in range(8)]
    assert [status for status, _ in statuses] == [401] * 5 + [429] * 3
    assert re.search(rb"(?i)retry-after: \d+\r\n", statuses[-1][1])
    await target.is_refused("guess", 429)
    assert (await target.ask("GET /metrics", target.bearer()))[0] == 200, "the right token passes"


ATTACKS: list[Attack] = [
    nobodys_tokens, anothers_name, the_local_token_for_a_name_with_its_own, a_token_that_is_revoked,
    a_join_that_is_replayed, a_name_that_gets_its_own_token, from_another_machine, path_traversal, another_sites_page,
    what_is_no_request, a_thousand_connections, weak_ciphers, guesses,
]  # fmt: skip


def address_elsewhere() -> str | None:
    """An address of this machine that is not loopback; None where it has none."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return address.address
    return None


def test_attacks_are_refused_and_a_run_does_not_notice(
    export_bundle: Callable[..., Path],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(limits, "HEAD_TIMEOUT_S", 2.0)
    settings = {"batch_size": 4, "max_length": 16, "rounds": 10**6, "report_every": 10}
    settings |= {"evaluation": {"every": 0}, "checkpoints": {"every": 0}}
    (tmp_path / "cloud").mkdir()
    authority = make_authority(tmp_path / "cloud", ["cloud.example.org"])
    trouble: list[str] = []

    async def main() -> tuple[Summary, str]:
        listen = ListenSettings("0.0.0.0", 0).with_authority(tmp_path / "cloud")
        config = {**msgspec.toml.decode(TASK), **settings}
        async with serving(export_bundle(tiny_model, "lora", 2), tmp_path / "cloud", config, listen) as service:
            target = Target(service, ssl.create_default_context(cafile=authority.ca_cert), address_elsewhere())
            token_file = tmp_path / "good.token"
            token_file.write_text(in_thread(lambda: service.authenticator.access.add("good")))
            agent = asyncio.create_task(run_agent(edge_settings(service.address, token_file, tmp_path)))
            while service.coordinator.run.round < 3:
                assert not agent.done(), agent
                await asyncio.sleep(0.01)
            memory = psutil.Process().memory_info().rss
            good = service.coordinator.fleet.peers["good"]
            for attack in ATTACKS:
                before = service.coordinator.run.round
                service.authenticator.limits.failures = limits.Buckets(burst=30, per_second=0.5)
                await attack(target)
                while service.coordinator.run.round < before + 2:
                    await asyncio.sleep(0.01)
                if service.coordinator.fleet.peers.get("good") is not good:
                    trouble.append(f"the good device was disturbed by {attack.__name__}")
            assert psutil.Process().memory_info().rss - memory < GROWTH_BYTES
            await service.coordinator.request_stop()
            return await asyncio.wait_for(agent, 60.0), service.coordinator.run.mirror.digest()

    summary, digest = asyncio.run(main())
    assert not trouble
    assert (summary.device, summary.outcome, summary.weights_digest) == ("good", "stopped", digest)
    assert not [record for record in caplog.records if record.exc_info], "an error of ours was raised on the way"


def edge_settings(address: str, token_file: Path, folder: Path) -> EdgeSettings:
    return EdgeSettings(
        server=address,
        token_file=str(token_file),
        data=str(write_reviews(folder / "train.jsonl", 16)),
        threads=1,
        state_dir=str(folder / "state"),
        cache_dir=str(folder / "cache"),
    )


def test_a_revoked_device_stops_and_one_of_another_services_token_never_begins(
    export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    for name in ("cloud", "other"):
        (tmp_path / name).mkdir()
        make_authority(tmp_path / name, ["cloud.example.org"])

    async def main() -> None:
        listen = ListenSettings("127.0.0.1", 0).with_authority(tmp_path / "cloud")
        config = {**msgspec.toml.decode(TASK), "batch_size": 4, "max_length": 16, "rounds": 10**6}
        async with serving(export_bundle(tiny_model, "lora", 2), tmp_path / "cloud", config, listen) as service:
            token_file = tmp_path / "pi.token"
            token = in_thread(lambda: service.authenticator.access.add("pi"))
            token_file.write_text(token)
            agent = asyncio.create_task(run_agent(edge_settings(service.address, token_file, tmp_path)))
            while "pi" not in service.coordinator.fleet.ready_names():
                await asyncio.sleep(0.01)
            client = ApiClient(service.address, service.admin_token, tmp_path / "cloud" / "tls" / "ca.pem")
            await asyncio.to_thread(client.request, "DELETE", "/v1/devices/pi")
            with pytest.raises(RefusedError, match="its token was revoked"):
                await asyncio.wait_for(agent, WAIT_S)
            with pytest.raises(RefusedError, match="does not know the token, or has revoked it"):
                await run_agent(edge_settings(service.address, token_file, tmp_path))
            other = find_authority(tmp_path / "other")
            assert other is not None
            token_file.write_text(token.rpartition("~")[0] + "~" + other.fingerprint)
            with pytest.raises(TrustError, match="is not the service that this token is for"):
                await run_agent(edge_settings(service.address, token_file, tmp_path))

    asyncio.run(main())


@pytest.mark.parametrize("field", ["diary", "text.__class__", "__class__"])
def test_a_cloud_that_asks_for_more_than_a_device_allows_gets_nothing(
    export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path, field: str
) -> None:
    settings = msgspec.toml.decode(TASK) | {"batch_size": 4, "max_length": 16}
    settings["task"] = settings["task"] | {"template": f"{{text}} {{{field}}}"}

    async def main() -> None:
        async with serving(export_bundle(tiny_model, "lora", 2), tmp_path / "cloud", settings) as service:
            with pytest.raises(ConsentError, match=f"reads {re.escape(field)}, this device allows text, label"):
                await run_agent(edge_settings(service.address, service.token_file, tmp_path))
            assert service.coordinator.run.round == 0

    asyncio.run(main())


def with_graph(bundle: Path, folder: Path, graph: bytes) -> Path:
    """A copy of a bundle with another graph, and the right digests of it."""
    shutil.copytree(bundle, folder)
    (folder / SHARD_GRAPH).write_bytes(graph)
    manifest = load_manifest(folder)
    files = tuple(describe_file(folder, entry.path) for entry in manifest.files)
    (folder / MANIFEST).write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))
    return folder


def steal(graph: bytes, path: str) -> bytes:
    """A graph whose activations are what stands in a file of the device."""
    model = onnx.load_from_string(graph)
    stolen = onnx.TensorProto(name="stolen", data_type=onnx.TensorProto.FLOAT, dims=[8])
    stolen.data_location = onnx.TensorProto.EXTERNAL
    stolen.external_data.add(key="location", value=path)
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["stolen"], value=stolen))
    return model.SerializeToString()


def foreign(graph: bytes) -> bytes:
    model = onnx.load_from_string(graph)
    model.graph.node[0].domain = "evil.ops"
    return model.SerializeToString()


@pytest.mark.parametrize("how", ["external data", "custom operator"])
def test_a_graph_that_reaches_beyond_itself_is_refused_by_the_device(
    export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path, how: str
) -> None:
    bundle = export_bundle(tiny_model, "lora", 2)
    good = (bundle / SHARD_GRAPH).read_bytes()
    graph, problem = {
        "external data": (steal(good, "train.jsonl"), "has its values in another file"),
        "custom operator": (foreign(good), "uses operators of the domain b'evil.ops'"),
    }[how]

    async def main() -> None:
        hostile = with_graph(bundle, tmp_path / "bundle", graph)
        config = {**msgspec.toml.decode(TASK), "batch_size": 4, "max_length": 16}
        async with serving(hostile, tmp_path / "cloud", config) as service:
            with pytest.raises(BundleError, match=problem):
                await run_agent(edge_settings(service.address, service.token_file, tmp_path))
            assert service.coordinator.run.round == 0

    asyncio.run(main())


def test_no_secret_is_printed_or_logged_by_anybody(
    export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    data, outputs = tmp_path / "cloud", list[str]()
    (tmp_path / "run.toml").write_text("rounds = 3\nbatch_size = 4\nmax_length = 16\n" + TASK)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(module: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", module, *map(str, arguments), "--log-level", "debug"]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=tmp_path
        )

    def finish(process: subprocess.Popen[str] | Program) -> str:
        outputs.append(process.communicate(timeout=60.0)[0])
        assert process.returncode == 0, outputs[-1]
        return outputs[-1]

    finish(start("hosl_cloud", "init", "--data-dir", data, "--name", "localhost"))
    where = ["--bundle", export_bundle(tiny_model, "lora", 2), "--config", tmp_path / "run.toml", "--data-dir", data]
    port = free_port()
    log = tmp_path / "cloud.log"
    cloud = Program("hosl_cloud", "serve", *where, "--port", port, "--once", "--log-level", "debug", errors=log)
    try:
        while not (data / "service.json").exists():
            assert cloud.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.05)
        said = finish(start("hosl_cloud", "device", "add", "pi", "--data-dir", data))
        found = re.search(r"^ *hosl-edge (--server \S+ --token-file \S+) --data FILE", said, re.MULTILINE)
        assert found is not None, said
        finish(start("hosl_cloud", "device", "list", "--data-dir", data))
        folders = ["--state-dir", tmp_path / "state", "--cache-dir", tmp_path / "cache"]
        reviews = write_reviews(tmp_path / "train.jsonl", 16)
        assert "completed at round 3" in finish(
            start("hosl_edge", *found.group(1).split(), "--data", reviews, *folders, "--threads", 1)
        )
        finish(cloud)
    finally:
        cloud.kill()
        cloud.communicate()
    texts = [(data / name).read_text() for name in ("join-token", "admin-token")] + [
        (tmp_path / "pi.token").read_text()
    ]
    secrets = [max(text.strip().split("~")[:2], key=len) for text in texts]
    assert [len(secret) for secret in secrets] == [43, 43, 43]
    keys = [line for path in data.glob("tls/*.key") for line in path.read_text().splitlines()[1:-1]]
    logged = log.read_text(encoding="utf-8")
    assert " debug " in logged
    printed = "".join((*outputs, logged))
    assert not [secret for secret in (*secrets, *keys) if secret in printed]
    assert not (data / "service.json").exists(), "it says where a service is that runs"


FORBIDDEN = (
    r"\b(pickle|marshal|shelve)\b",
    r"torch\.load\b|yaml\.load\b|allow_pickle=True|trust_remote_code=True",
    r"(?<!\.)\b(eval|exec)\(",
    r"shell=True|os\.system",
    r"CERT_NONE|verify=False",
)


def test_the_source_uses_nothing_that_runs_what_it_reads() -> None:
    paths = [path for package in ("cloud", "edge", "export", "protocol") for path in (ROOT / package).rglob("*.py")]
    assert len(paths) > 60
    found = {
        (path.name, pattern)
        for path in paths
        for pattern in FORBIDDEN
        if re.search(pattern, path.read_text(encoding="utf-8"))
    }
    # The CA's certificate is fetched from anybody, and then its fingerprint is checked; the clock is asked of anybody.
    assert found == {("trust.py", FORBIDDEN[-1])}
