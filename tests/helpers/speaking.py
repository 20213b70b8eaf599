"""A device that says to a service what a test wants, and its port over HTTP."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from hosl_cloud.storage.mirror import load_shard_weights
from hosl_protocol.weights.client_weights import make_client_weights
from hosl_protocol.wire.codec import Frame, encode
from hosl_protocol.wire.connection import Connection, Role
from hosl_protocol.wire.messages import CatchUp, Hello, Message, Ready, Refusal, RoundStart, Welcome
from services import Service

DATA = "d" * 64
WAIT_S = 10.0


class Client:
    """A device that says what a test wants."""

    def __init__(self, socket: ClientConnection, service: Service) -> None:
        self.socket, self.service = socket, service
        self._connection = Connection(Role.EDGE)
        self.manifest = service.coordinator.run.manifest

    async def send(self, message: Message, tensors: dict[str, Any] | None = None) -> None:
        for piece in encode(message, tensors or {}):
            await self.socket.send(piece)

    async def receive(self) -> Message:
        """The next message of the cloud."""
        frame: Frame | None = None
        while frame is None:
            piece = await asyncio.wait_for(self.socket.recv(), WAIT_S)
            assert isinstance(piece, bytes)
            frame = self._connection.receive(piece)
        return frame.message

    async def refusal(self) -> Refusal:
        """The Refusal that ends this connection; what came before it is dropped."""
        message = await self.receive()
        while not isinstance(message, Refusal):
            message = await self.receive()
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(self.socket.recv(), WAIT_S)
        return message

    def hello(self, name: str = "pi", **more: Any) -> Hello:
        fields = {"software": "test", "device": name, "shard_digest": self.manifest.shard_digest, "data_digest": DATA}
        return Hello(**{**fields, **more})

    def ready(self, digest: str | None = None) -> Ready:
        if digest is None:
            weights = load_shard_weights(self.service.coordinator.run.bundle, self.manifest, only_trainable=True)
            digest = make_client_weights(self.manifest, weights, self.service.coordinator.run.settings).digest()
        return Ready(run="run-1", epoch=0, applied_round=0, weights_digest=digest, train_examples=8, eval_examples=0)

    async def join(self, name: str = "pi") -> None:
        """Join, and wait until the cloud takes this device for ready."""
        await self.send(self.hello(name))
        assert isinstance(await self.receive(), Welcome)
        assert isinstance(await self.receive(), CatchUp)
        await self.send(self.ready())
        while not self.is_ready(name):
            await asyncio.sleep(0.01)

    async def next_round(self) -> RoundStart:
        """The next RoundStart; what came before it is dropped."""
        while not isinstance(message := await self.receive(), RoundStart):
            pass
        return message

    def is_ready(self, name: str) -> bool:
        peer = self.service.coordinator.fleet.peers.get(name)
        return peer is not None and peer.is_ready


@asynccontextmanager
async def client(service: Service, token: str | None = None, **more: Any) -> AsyncIterator[Client]:
    headers = {"Authorization": f"Bearer {service.token if token is None else token}"}
    url = service.address + "/v1/device"
    async with connect(url, additional_headers=headers, compression=None, **more) as socket:
        yield Client(socket, service)


async def get(service: Service, path: str, **headers: str) -> tuple[int, bytes]:
    def ask() -> tuple[int, bytes]:
        request = urllib.request.Request(service.address.replace("ws", "http", 1) + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    return await asyncio.to_thread(ask)
