"""How a step is driven: what it takes for a reply, what ends it, and that it is closed whatever did."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import pytest

from hosl_edge.driver import StepDriver
from hosl_edge.rounds import Receive, Step
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import CutGradient, EvalResult, EvalStart, Late, Message

Reply = CutGradient | EvalStart | EvalResult | Late


def send_nothing(message: Message, tensors: Mapping[str, Any]) -> None:
    raise AssertionError("no step here sends")


def drive(patience_s: float | None, answer_after_s: float, *answers: Reply) -> tuple[list[object], list[str], object]:
    """What a step got for a reply, what the device said, and what came in between."""
    got: list[object] = []
    said: list[str] = []

    def steps() -> Step:
        try:
            got.append((yield Receive(CutGradient, 2)))
        finally:
            got.append("closed")

    async def main() -> object:
        incoming: asyncio.Queue[Frame] = asyncio.Queue()
        driving = asyncio.create_task(
            StepDriver(send_nothing, incoming.get, said.append).drive(steps(), EVALUATION, patience_s)
        )
        await asyncio.sleep(answer_after_s)
        for answer in answers:
            incoming.put_nowait(Frame(answer))
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


def test_a_device_says_why_its_answer_was_not_taken() -> None:
    late = Late(**{**NAMED, "attempt": 0}, answer="anchor", code="attempt", reason="its attempt is 0")
    _, said, _ = drive(None, 0.0, late, ANSWER)
    assert said == ["its anchor of round 3 was not taken: its attempt is 0"]


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


def test_a_step_is_closed_once_its_thread_is_done_however_often_it_is_cancelled() -> None:
    got: list[str] = []

    def steps() -> Step:
        try:
            time.sleep(0.2)
            got.append("computed")
            yield Receive(CutGradient, 2)
        finally:
            got.append("closed")

    async def main() -> None:
        incoming: asyncio.Queue[Frame] = asyncio.Queue()
        driver = StepDriver(send_nothing, incoming.get, print)
        driving = asyncio.create_task(driver.drive(steps(), EVALUATION))
        for _ in range(3):
            await asyncio.sleep(0.03)
            driving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driving

    asyncio.run(main())
    assert got == ["computed", "closed"]
