"""How a device bears a cloud that answers pings and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from hosl_edge import step
from hosl_edge.connection.token import Token
from hosl_edge.connection.trust import Cloud
from hosl_edge.exceptions import ConnectionLost, RefusedError
from hosl_edge.host.display import Progress
from hosl_edge.session import Session
from hosl_protocol.exceptions import ProtocolError
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import Task
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import (
    CatchUp,
    CutGradient,
    EvalResult,
    EvalStart,
    Late,
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


Reply = CutGradient | EvalStart | EvalResult | Late


def drive(patience_s: float | None, answer_after_s: float, *answers: Reply) -> tuple[list[object], list[str], object]:
    """What a step got for a reply, what the device said, and what came in between."""
    got: list[object] = []
    said: list[str] = []

    def steps() -> step.Step:
        try:
            got.append((yield step.Receive(CutGradient, 2)))
        finally:
            got.append("closed")

    async def main() -> object:
        display: Any = SimpleNamespace(say=said.append)
        device: Any = None
        session = Session(device, display, Progress(), "test", Cloud("ws://nowhere", Token("", "token")))
        driving = asyncio.create_task(session._driver.drive(steps(), EVALUATION, patience_s))
        await asyncio.sleep(answer_after_s)
        for answer in answers:
            session.link._incoming.put_nowait(Frame(answer))
        return await driving

    return got, said, asyncio.run(main())


NAMED: dict[str, Any] = {"run": "r", "epoch": 0, "round": 3, "attempt": 1}
EVALUATION = EvalStart(**NAMED)
ANSWER = CutGradient(**NAMED, id=2)


def test_a_reply_that_does_not_come_ends_the_devices_part_of_the_round() -> None:
    got, said, _ = drive(0.05, 0.3, ANSWER)
    assert got == ["closed"]
    assert said == ["no answer in round 3 for 0 s; it goes on without this device"]


def test_without_a_deadline_a_device_waits() -> None:
    got, said, _ = drive(None, 0.3, ANSWER)
    assert got == [Frame(ANSWER), "closed"]
    assert said == []


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
    session._welcome = Welcome(run="r", epoch=0, round=0, width=1, settings=RunSettings(task=task), plan="continue")
    assert asyncio.run(handle(session, Frame(kind(**named, **more[kind]), tensors))) is None
    assert f"{name_of(kind)} of another run or epoch is ignored" in caplog.text


def join(applied_round: int) -> Session:
    """A session whose device stands there."""
    device: Any = SimpleNamespace(applied_round=applied_round, eval=object())
    display: Any = SimpleNamespace(say=print)
    session = Session(device, display, Progress(), "test", Cloud("ws://nowhere", Token("", "token")))
    task = Task(name="t", kind="lm", template="{text}")
    session._welcome = Welcome(run="r", epoch=0, round=0, width=1, settings=RunSettings(task=task), plan="continue")
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


def test_a_device_says_why_its_answer_was_not_taken() -> None:
    late = Late(**{**NAMED, "attempt": 0}, answer="anchor", code="attempt", reason="its attempt is 0")
    _, said, _ = drive(None, 0.0, late, ANSWER)
    assert said == ["its anchor of round 3 was not taken: its attempt is 0"]


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


@pytest.mark.parametrize(
    "stray",
    [
        CutGradient(**NAMED, id=1),
        CutGradient(**{**NAMED, "attempt": 0}, id=2),
        EvalResult(**NAMED, id=2, correct=1, scored=1),
        Late(**{**NAMED, "attempt": 0}, answer="anchor"),
        EVALUATION,
    ],
    ids=["repeated reply", "former attempt", "another kind", "former attempt's lateness", "repeated start"],
)
def test_repeats_and_what_belongs_to_a_former_attempt_are_dropped(stray: Reply) -> None:
    got, _, between = drive(None, 0.0, stray, ANSWER)
    assert got == [Frame(ANSWER), "closed"]
    assert between is None


@pytest.mark.parametrize("message", [EvalStart(**{**NAMED, "attempt": 2}), Late(**NAMED, answer="anchor")])
def test_another_attempt_or_lateness_ends_a_step(message: Reply) -> None:
    got, _, between = drive(None, 0.0, message, ANSWER)
    assert got == ["closed"]
    assert between == Frame(message)


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


def test_a_step_is_closed_once_its_thread_is_done_however_often_it_is_cancelled() -> None:
    got: list[str] = []

    def steps() -> step.Step:
        try:
            time.sleep(0.2)
            got.append("computed")
            yield step.Receive(CutGradient, 2)
        finally:
            got.append("closed")

    async def main() -> None:
        nobody: Any = SimpleNamespace(say=print)
        session = Session(nobody, nobody, Progress(), "test", Cloud("ws://nowhere", Token("", "token")))
        driving = asyncio.create_task(session._driver.drive(steps(), EVALUATION))
        for _ in range(3):
            await asyncio.sleep(0.03)
            driving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driving

    asyncio.run(main())
    assert got == ["computed", "closed"]


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
