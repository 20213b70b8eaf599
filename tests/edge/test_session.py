"""What a session does with each message of the cloud, and with what goes wrong beside it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from hosl_edge.connection.token import Token
from hosl_edge.connection.trust import Cloud
from hosl_edge.exceptions import ConnectionLost, RefusedError
from hosl_edge.host.display import Progress
from hosl_edge.session import Session
from hosl_protocol.exceptions import ProtocolError
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import Task
from hosl_protocol.run.updates import UpdateShape
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import (
    CatchUp,
    EvalStart,
    Refusal,
    RoundStart,
    Update,
    Welcome,
    name_of,
)


async def handle(session: Session, frame: Frame) -> Frame | None:
    """What comes of a frame outside a step."""
    handler = session._handler_of(frame.message)
    return await handler(frame.message, frame) if handler is not None else None


NAMED: dict[str, Any] = {"run": "r", "epoch": 0, "round": 3, "attempt": 1}


FOREIGN: list[dict[str, Any]] = [{"run": "other", "epoch": 0}, {"run": "r", "epoch": 1}]


@pytest.mark.parametrize("named", FOREIGN, ids=["run", "epoch"])
@pytest.mark.parametrize("kind", [CatchUp, Update, RoundStart, EvalStart])
def test_what_is_of_another_run_or_epoch_than_the_welcome_changes_nothing(
    caplog: pytest.LogCaptureFixture, kind: Any, named: dict[str, Any]
) -> None:
    more: dict[Any, dict[str, Any]] = {
        CatchUp: {"first_round": 1, "last": True},
        Update: {"round": 1, "learning_rate": 0.0},
        RoundStart: {"round": 1, "deadline_s": 1.0},
        EvalStart: {"round": 1},
    }
    tensors = {
        "coefficients": np.zeros((1, 2) if kind is CatchUp else 2, np.float32),
        "learning_rates": np.zeros(1),
        "loss": np.zeros((), np.float32),
    }
    task = Task(name="t", kind="lm", template="{text}")
    unused: Any = SimpleNamespace(say=print)
    session = Session(unused, unused, Progress(), "test", Cloud("ws://nowhere", Token("", "token")))
    session._welcome = Welcome(
        run="r",
        epoch=0,
        round=0,
        width=1,
        update=UpdateShape(coefficients=2),
        settings=RunSettings(task=task),
        plan="continue",
    )
    assert asyncio.run(handle(session, Frame(kind(**named, **more[kind]), tensors))) is None
    assert f"{name_of(kind)} of another run or epoch is ignored" in caplog.text


def join(applied_round: int) -> Session:
    """A session whose device stands there."""
    device: Any = SimpleNamespace(applied_round=applied_round, eval=object())
    display: Any = SimpleNamespace(say=print)
    session = Session(device, display, Progress(), "test", Cloud("ws://nowhere", Token("", "token")))
    task = Task(name="t", kind="lm", template="{text}")
    session._welcome = Welcome(
        run="r",
        epoch=0,
        round=0,
        width=1,
        update=UpdateShape(coefficients=2),
        settings=RunSettings(task=task),
        plan="continue",
    )
    return session


@pytest.mark.parametrize("rows", [0, 1])
def test_a_catch_up_that_leaves_rounds_out_breaks_the_protocol(rows: int) -> None:
    message = CatchUp(run="r", epoch=0, first_round=5, last=True)
    tensors = {"coefficients": np.zeros((rows, 2), np.float32), "learning_rates": np.zeros(rows)}
    with pytest.raises(ProtocolError, match=r"^catch-up from round 5, expected round 4$"):
        asyncio.run(handle(join(3), Frame(message, tensors)))


@pytest.mark.parametrize("round_", [2, 4])
def test_an_evaluation_of_another_round_than_the_devices_ends_the_connection(round_: int) -> None:
    with pytest.raises(ConnectionLost, match=f"^an evaluation of round {round_} began at round 3$"):
        asyncio.run(handle(join(3), Frame(EvalStart(run="r", epoch=0, round=round_, attempt=1))))


@pytest.mark.parametrize(
    ("retry", "sentence"),
    [
        (True, "the cloud is not ready for this device: run r is being loaded"),
        (False, "the cloud refused this device: run r is being loaded"),
    ],
)
def test_a_cloud_that_is_not_ready_has_refused_nobody(retry: bool, sentence: str) -> None:
    async def main() -> None:
        unused: Any = SimpleNamespace(say=print)
        session = Session(unused, unused, Progress(), "test", Cloud("ws://nowhere", Token("", "token")))
        session.link._incoming.put_nowait(Frame(Refusal(code="run", reason="run r is being loaded", retry=retry)))
        with pytest.raises(RefusedError, match=f"^{sentence}$") as caught:
            await session._receive_frame()
        assert caught.value.retry is retry

    asyncio.run(main())


def test_a_disk_that_cannot_be_used_is_not_called_a_cloud_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "state/journal.new")

    device: Any = SimpleNamespace(header=None, catch_up_speed=fail)
    display: Any = SimpleNamespace(say=print)
    session = Session(device, display, Progress(), "test", Cloud("ws://nowhere", Token("", "token")))
    monkeypatch.setattr(session.link, "open", lambda cloud: contextlib.nullcontext())
    left: list[str] = []

    async def leave(reason: str) -> None:
        left.append(reason)

    monkeypatch.setattr(session.link, "leave", leave)
    with pytest.raises(ConnectionLost, match=r"^this device's disk: .*No space left on device: 'state/journal.new'$"):
        asyncio.run(session.take_part())
    assert left == ["its disk cannot be used, see its log"]


@pytest.mark.parametrize("start", [RoundStart(**{**NAMED, "attempt": 0}, deadline_s=1.0), EvalStart(**NAMED)])
def test_a_start_that_comes_twice_is_run_once(monkeypatch: pytest.MonkeyPatch, start: RoundStart | EvalStart) -> None:
    ran: list[object] = []

    async def main() -> None:
        nobody: Any = SimpleNamespace(say=print)
        session = Session(nobody, nobody, Progress(), "test", Cloud("ws://nowhere", Token("", "token")))

        async def work(message: RoundStart | EvalStart, frame: Frame) -> None:
            session._started = message
            ran.append(message)

        monkeypatch.setattr(session, "_train", work)
        monkeypatch.setattr(session, "_evaluate", work)
        for message in (start, start, msgspec.structs.replace(start, attempt=start.attempt + 1)):
            await handle(session, Frame(message))

    asyncio.run(main())
    assert len(ran) == 2
