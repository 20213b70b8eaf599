"""The websocket as the device reads it, over a real one."""

from __future__ import annotations

import asyncio

import pytest
from websockets.asyncio.server import ServerConnection, serve

from hosl_edge.connection.link import Link
from hosl_edge.connection.token import Token
from hosl_edge.connection.trust import Cloud
from hosl_edge.host.display import Progress
from hosl_protocol.exceptions import ProtocolError


def test_a_text_message_is_against_the_protocol() -> None:
    async def answer(socket: ServerConnection) -> None:
        await socket.send("text")
        await socket.wait_closed()

    async def main() -> None:
        async with serve(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            link = Link(Progress())
            async with link.open(Cloud(f"ws://127.0.0.1:{port}", Token("pi", "pi~secret"))):
                with pytest.raises(ProtocolError, match="a text message"):
                    await asyncio.wait_for(link.receive(), 10.0)

    asyncio.run(main())
