"""How a device bears a cloud that answers pings and nothing else."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from hosl_edge import step
from hosl_edge.display import Progress
from hosl_edge.session import Session
from hosl_edge.trust import Cloud, Token
from hosl_protocol import CutGradient, Frame


def drive(patience_s: float | None, answer_after_s: float) -> tuple[list[object], list[str]]:
    """What a step got for a reply, and what the device said."""
    got: list[object] = []
    said: list[str] = []

    def steps() -> step.Step:
        try:
            got.append((yield step.Receive(CutGradient)))
        finally:
            got.append("closed")

    async def main() -> None:
        display: Any = SimpleNamespace(say=said.append)
        device: Any = None
        session = Session(device, display, Progress(), "test", Cloud("ws://nowhere", Token("", "token")))
        context: Any = SimpleNamespace(run="r", epoch=0, round=3)
        frame = Frame(CutGradient(run="r", epoch=0, round=3))
        driving = asyncio.create_task(session._drive(steps(), context, patience_s))
        await asyncio.sleep(answer_after_s)
        session._incoming.put_nowait(frame)
        assert await driving is None

    asyncio.run(main())
    return got, said


def test_a_reply_that_does_not_come_ends_the_devices_part_of_the_round() -> None:
    got, said = drive(patience_s=0.05, answer_after_s=0.3)
    assert got == ["closed"]
    assert said == ["no answer in round 3 for 0 s; it goes on without this device"]


def test_without_a_deadline_a_device_waits() -> None:
    got, said = drive(patience_s=None, answer_after_s=0.3)
    assert isinstance(got[0], Frame)
    assert said == []
