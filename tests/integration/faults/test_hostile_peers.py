"""Peers that send noise, frames at wrong times, giants, halves and text, while a real agent trains beside them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from fuzzing import VALID, damage, with_length
from hosl_edge.agent import Summary, run_agent
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import ProtocolError
from hosl_protocol.wire.codec import Frame, encode
from hosl_protocol.wire.connection import Connection, Role
from hosl_protocol.wire.messages import Anchor, CatchUp, Hello, Message, Ready, Refusal, RoundStart
from services import Service, serving
from support import TASK, write_reviews

ROUNDS = 8
GROWTH_BYTES = 200 * 2**20
WAIT_S = 20.0


class Hostile:
    """A connection that knows the token and keeps no rule."""

    def __init__(self, socket: ClientConnection, service: Service, seed: int) -> None:
        self.socket, self.service, self.random = socket, service, random.Random(seed)
        self.name = f"hostile-{seed}"
        self._connection = Connection(Role.EDGE)

    async def send(self, *pieces: bytes | str) -> None:
        with suppress(ConnectionClosed):
            for piece in pieces:
                await self.socket.send(piece)

    async def say(self, message: Message, tensors: dict[str, Any] | None = None) -> None:
        await self.send(*(bytes(piece) for piece in encode(message, tensors or {})))

    async def hear(self, kind: type) -> Any:
        """The next message of a kind, or what ended the connection."""
        frame: Frame | None = None
        while frame is None or not isinstance(frame.message, (kind, Refusal)):
            piece = await asyncio.wait_for(self.socket.recv(), WAIT_S)
            assert isinstance(piece, bytes)
            frame = self._connection.receive(piece)
        return frame.message

    async def hello(self) -> None:
        run = self.service.coordinator.run
        digest = run.manifest.shard_digest
        await self.say(Hello(software="hostile", device=self.name, shard_digest=digest, data_digest="e" * 64))

    async def join(self) -> None:
        """Become ready, as one may who sends the digest that the cloud expects."""
        run = self.service.coordinator.run
        await self.hello()
        while True:
            catch_up = await self.hear(CatchUp)
            assert isinstance(catch_up, CatchUp)
            applied = run.mirror.applied_round
            digest = await self.service.coordinator.admission.compute(run.mirror.digest)
            standing = {"run": run.id, "epoch": run.epoch, "applied_round": applied, "weights_digest": digest}
            await self.say(Ready(**standing, train_examples=4, eval_examples=0))
            for _ in range(20):
                peer = self.service.coordinator.fleet.peers.get(self.name)
                if peer is not None and peer.is_ready:
                    return
                await asyncio.sleep(0.01)

    async def end(self) -> None:
        """The service ends the connection; what it says before does not matter."""
        with suppress(ConnectionClosed):
            while True:
                await asyncio.wait_for(self.socket.recv(), WAIT_S)


@asynccontextmanager
async def hostile(service: Service, seed: int) -> AsyncIterator[Hostile]:
    headers = {"Authorization": f"Bearer {service.token}"}
    url = service.address + "/v1/device"
    async with connect(url, additional_headers=headers, compression=None, max_size=None, close_timeout=1) as socket:
        yield Hostile(socket, service, seed)


async def noise(peer: Hostile) -> None:
    await peer.send(*(peer.random.randbytes(peer.random.choice((0, 1, 8, 300, 65545))) for _ in range(5)))
    await peer.end()


async def text(peer: Hostile) -> None:
    await peer.hello()
    await peer.send("hello", "{}", "x" * 1000)
    await peer.end()


async def what_is_not_due(peer: Hostile) -> None:
    for pieces in peer.random.sample(VALID[Role.EDGE], len(VALID[Role.EDGE])):
        await peer.send(*pieces)
    await peer.end()


async def damaged_frames(peer: Hostile) -> None:
    await peer.hello()
    for _ in range(20):
        frames = VALID[Role.EDGE]
        await peer.send(*damage(peer.random, peer.random.choice(frames), frames))
    await peer.end()


async def a_giant(peer: Hostile) -> None:
    await peer.join()
    start = await peer.hear(RoundStart)
    if isinstance(start, RoundStart):
        rows = 10**9
        place = f'{{\\"type\\":\\"anchor\\",\\"run\\":\\"run-1\\",\\"epoch\\":0,\\"round\\":{start.round}}}'
        layout = (
            f'"activations":{{"dtype":"F32","shape":[{rows},32],"data_offsets":[0,{128 * rows}]}},'
            f'"lengths":{{"dtype":"I32","shape":[1],"data_offsets":[{128 * rows},{128 * rows + 4}]}},'
            f'"labels":{{"dtype":"I32","shape":[1],"data_offsets":[{128 * rows + 4},{128 * rows + 8}]}}'
        )
        await peer.send(with_length(f'{{"__metadata__":{{"hosl":"{place}"}},{layout}}}'.encode()))
        refusal = await peer.hear(Refusal)
        assert "dimension T of anchor.activations" in refusal.reason
    await peer.end()


async def half_a_frame_then_silence(peer: Hostile) -> None:
    """Takes part, and lets two rounds wait for the rest of its answer."""
    await peer.join()
    start = await peer.hear(RoundStart)
    if isinstance(start, RoundStart):
        anchor = Anchor(run=start.run, epoch=start.epoch, round=start.round, attempt=start.attempt)
        one = np.ones(1, np.int32)
        tensors = {"activations": np.ones((5, 32), np.float32), "lengths": one * 5, "labels": one}
        header, payload = encode(anchor, tensors)
        await peer.send(bytes(header), bytes(payload)[:100])
        with suppress(ConnectionClosed, asyncio.TimeoutError):
            await asyncio.wait_for(peer.end(), 1.0)


async def half_a_header(peer: Hostile) -> None:
    header, *_ = VALID[Role.EDGE][0]
    await peer.send(header[: len(header) // 2])
    await peer.end()


async def gone_in_the_middle(peer: Hostile) -> None:
    await peer.hello()
    peer.socket.transport.abort()


WAYS: list[Callable[[Hostile], Any]] = [
    noise, text, what_is_not_due, damaged_frames, a_giant, half_a_frame_then_silence, half_a_header, gone_in_the_middle,
]  # fmt: skip


def test_a_good_device_trains_to_the_end_among_hostile_ones(
    export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    devices = {"start_with": 1, "quorum": 1, "round_deadline_s": 0.7}
    settings = {"batch_size": 4, "max_length": 16, "rounds": ROUNDS, "report_every": 1, "devices": devices}
    met: list[str] = []

    async def main() -> tuple[Summary, str, str]:
        async with serving(
            export_bundle(tiny_model, "lora", 2), tmp_path / "cloud", {**msgspec.toml.decode(TASK), **settings}
        ) as service:
            agent = asyncio.create_task(run_agent(_edge_settings(service, tmp_path)))
            while "good" not in service.coordinator.fleet.peers and not agent.done():
                await asyncio.sleep(0.01)
            hosts = [asyncio.create_task(attack(service, way, seed)) for seed, way in enumerate(WAYS)]
            summary = await asyncio.wait_for(agent, 120.0)
            for host in hosts:
                host.cancel()
            await asyncio.gather(*hosts, return_exceptions=True)
            broken = [host.exception() for host in hosts if not host.cancelled() and host.exception() is not None]
            assert not broken, broken
            return summary, service.coordinator.run.mirror.digest(), await service.serving

    async def attack(service: Service, way: Callable[[Hostile], Any], seed: int) -> None:
        with suppress(OSError, ConnectionClosed, asyncio.TimeoutError, ProtocolError):
            async with hostile(service, seed) as peer:
                await way(peer)
        met.append(way.__name__)

    before = psutil.Process().memory_info().rss
    summary, digest, ending = asyncio.run(main())
    assert ending == summary.outcome == "completed"
    assert (summary.rounds, summary.weights_digest) == (ROUNDS, digest)
    assert {way.__name__ for way in WAYS} - set(met) <= {"a_giant", "half_a_frame_then_silence"}, "some never came"
    assert psutil.Process().memory_info().rss - before < GROWTH_BYTES
    assert not [record for record in caplog.records if record.exc_info], "an error of ours was raised on the way"


def _edge_settings(service: Service, folder: Path) -> EdgeSettings:
    return EdgeSettings(
        server=service.address,
        token_file=str(service.token_file),
        data=str(write_reviews(folder / "train.jsonl", 16)),
        name="good",
        threads=1,
        state_dir=str(folder / "state"),
        cache_dir=str(folder / "cache"),
    )
