"""A round's conversation with devices: who is waited for, for how long, and what becomes of those who are late."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from hosl_cloud.rounds.exchange import Answer, Ask, Await, Exchange, Fault, Tell, first_few
from hosl_cloud.runs import peer
from hosl_cloud.runs.fleet import Fleet
from hosl_cloud.runs.peer import Peer
from hosl_protocol.exceptions import ProtocolError
from hosl_protocol.wire.codec import Frame, encode
from hosl_protocol.wire.connection import Phase
from hosl_protocol.wire.messages import (
    Anchor,
    CutGradient,
    EvalBatch,
    EvalStart,
    Gradient,
    Late,
    Message,
    Probe,
    Projections,
    Refusal,
    Report,
    RoundStart,
    Update,
    name_of,
)

NAME: dict[str, Any] = {"run": "r", "epoch": 0, "round": 1}


class Silent:
    """A websocket that never says a thing."""

    async def receive(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, event: dict[str, Any]) -> None: ...


class Device(Peer):
    """A real peer whose frames a test puts in by hand; what it is told is kept."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        super().__init__(Silent())  # type: ignore[arg-type]
        self.on_arrival = fleet.on_arrival
        self.name, self.is_ready = name, True
        self.told: list[Message] = []
        fleet.peers[name] = self

    def tell(self, message: Message, tensors: Mapping[str, Any] | None = None) -> None:
        self.told.append(message)
        super().tell(message, tensors)

    def answer(self, message: Message, **tensors: Any) -> None:
        self._sort(Frame(message, tensors))

    def leave(self) -> None:
        self._set_gone()


async def compute(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


@pytest.fixture
def faults() -> list[Fault]:
    return []


@pytest.fixture
def fleet(faults: list[Fault]) -> Fleet:
    async def note(fault: Fault) -> None:
        faults.append(fault)

    return Fleet(compute, note)


def start(*devices: str) -> Exchange[list[tuple[str, bool]]]:
    """Open a round and take everybody's Anchor: who answered, in the order of the answers."""
    for device in devices:
        yield Tell(device, RoundStart(**NAME, deadline_s=1.0))
    asks = [Ask(device, Anchor, 1) for device in devices]
    came = []
    while asks:
        answer = yield Await(tuple(asks))
        assert isinstance(answer, Answer)
        asks.remove(answer.ask)
        came.append((answer.ask.device, answer.frame is not None))
    return came


async def after(delay_s: float, work: Callable[[], None]) -> None:
    await asyncio.sleep(delay_s)
    work()


async def once_asked(device: Device, work: Callable[[], None]) -> None:
    """On a busy machine it takes a while until a device hears of a round."""
    while not device.told:
        await asyncio.sleep(0.005)
    work()


def test_answers_are_taken_as_they_come(fleet: Fleet) -> None:
    async def main() -> None:
        first, second = Device(fleet, "a"), Device(fleet, "b")
        driving = asyncio.create_task(fleet.drive(start("a", "b"), 10.0))
        await once_asked(second, lambda: second.answer(Anchor(**NAME)))
        await asyncio.sleep(0.05)
        assert fleet.waiting is not None
        assert (fleet.waiting.what, fleet.waiting.devices) == ("anchor", ("a",))
        assert 0.0 < time.time() - fleet.waiting.since < 5.0
        first.answer(Anchor(**NAME))
        assert await driving == [("b", True), ("a", True)]
        assert fleet.waiting is None

    asyncio.run(main())


def test_a_device_that_is_still_joining_hears_nothing_of_a_round(fleet: Fleet) -> None:
    async def main() -> None:
        joining, ready = Device(fleet, "a"), Device(fleet, "b")
        joining.is_ready = False
        driving = asyncio.create_task(fleet.drive(start("a", "b"), 10.0))
        await once_asked(ready, lambda: ready.answer(Anchor(**NAME)))
        assert sorted(await driving) == [("a", False), ("b", True)]
        assert joining.told == []

    asyncio.run(main())


def test_a_probe_that_came_too_early_may_come_again_under_another_id(fleet: Fleet) -> None:
    def probes() -> Exchange[list[int]]:
        yield Tell("a", RoundStart(**NAME, deadline_s=1.0))
        ids = []
        for sign in (+1, -1):
            answer = yield Await((Ask("a", Probe, 1, 0, sign),))
            assert isinstance(answer, Answer)
            assert answer.frame is not None
            ids.append(answer.frame.message.id)  # type: ignore[union-attr]
        return ids

    async def main() -> None:
        device = Device(fleet, "a")
        driving = asyncio.create_task(fleet.drive(probes(), 10.0))
        await once_asked(device, lambda: device.answer(Probe(**NAME, id=0, direction=0, sign=-1)))
        while not any(isinstance(message, Late) for message in device.told):
            await asyncio.sleep(0.005)
        device.answer(Probe(**NAME, id=1, direction=0, sign=+1))
        device.answer(Probe(**NAME, id=2, direction=0, sign=-1))
        assert await driving == [1, 2]

    asyncio.run(main())


def test_several_that_are_there_are_taken_at_once_and_no_others_are_waited_for(fleet: Fleet) -> None:
    def few() -> Exchange[list[list[str]]]:
        asks, waves = [Ask(device, Anchor, 1) for device in "abcd"], []
        for device in "abcd":
            yield Tell(device, RoundStart(**NAME, deadline_s=1.0))
        while asks:
            time.sleep(0.2)  # while others arrive
            waves.append([ask.device for ask, _ in (yield from first_few(asks, 2))])
        return waves

    async def main() -> None:
        devices = [Device(fleet, name) for name in "abcd"]
        driving = asyncio.create_task(fleet.drive(few(), 10.0))
        await once_asked(devices[3], lambda: [each.answer(Anchor(**NAME)) for each in devices[:3]])
        await after(1.0, lambda: devices[3].answer(Anchor(**NAME)))
        assert await driving == [["a", "b"], ["c"], ["d"]]

    asyncio.run(main())


def test_a_device_that_is_late_is_left_out_and_told_so_by_name(fleet: Fleet) -> None:
    async def main() -> None:
        slow, quick = Device(fleet, "a"), Device(fleet, "b")
        driving = asyncio.create_task(fleet.drive(start("a", "b"), 1.0))
        await once_asked(quick, lambda: quick.answer(Anchor(**NAME)))
        assert await driving == [("b", True), ("a", False)]
        assert not any(isinstance(message, Late) for message in slow.told)
        slow.answer(Anchor(**NAME, id=4))
        assert slow.told[-1] == Late(**NAME, id=4, answer="anchor", code="stage", reason="its stage is over")

    asyncio.run(main())


def test_the_deadline_is_one_for_all_that_a_stage_asks(fleet: Fleet) -> None:
    async def main() -> None:
        for name in "abcdef":
            Device(fleet, name)
        began = time.monotonic()
        assert [is_there for _, is_there in await fleet.drive(start(*"abcdef"), 0.3)] == [False] * 6
        assert 0.3 <= time.monotonic() - began < 0.3 * 3

    asyncio.run(main())


def test_a_deadline_of_it_all_ends_what_each_answer_keeps_going(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    def endless() -> Exchange[int]:
        yield Tell("a", EvalStart(**NAME))
        for came in itertools.count():
            answer = yield Await((Ask("a", EvalBatch, 1),))
            if answer is None or answer.frame is None:
                return came
        raise AssertionError

    async def feed(device: Device) -> None:
        await once_asked(device, lambda: None)
        for id_ in itertools.count():
            device.answer(EvalBatch(**NAME, id=id_, last=False))
            await asyncio.sleep(0.02)

    async def main() -> None:
        device = Device(fleet, "a")
        driving = asyncio.create_task(fleet.drive(endless(), 10.0, 1.0))
        feeding = asyncio.create_task(feed(device))
        assert await asyncio.wait_for(driving, 10.0) > 0
        feeding.cancel()

    asyncio.run(main())
    assert "device a sent no eval-batch of round 1 before the deadline of it all" in caplog.text


def test_a_device_that_leaves_is_not_waited_for(fleet: Fleet) -> None:
    async def main() -> None:
        device = Device(fleet, "a")
        driving = asyncio.create_task(fleet.drive(start("a", "unknown"), 1e9))
        await after(0.05, device.leave)
        assert dict(await asyncio.wait_for(driving, 5.0)) == {"a": False, "unknown": False}

    asyncio.run(main())


def test_what_already_waits_is_taken_though_the_deadline_has_passed(fleet: Fleet) -> None:
    def slow_round() -> Exchange[bool]:
        yield Tell("a", RoundStart(**NAME, deadline_s=1.0))
        yield Await((Ask("a", Anchor, 1), Ask("b", Anchor, 1)))
        time.sleep(0.3)  # the tail computes while the deadline of b passes
        answer = yield Await((Ask("b", Anchor, 1),))
        return answer is not None and answer.frame is not None

    async def main() -> None:
        first, second = Device(fleet, "a"), Device(fleet, "b")
        second.tell(RoundStart(**NAME, deadline_s=1.0))
        driving = asyncio.create_task(fleet.drive(slow_round(), 0.2))
        await once_asked(first, lambda: first.answer(Anchor(**NAME)))
        await after(0.1, lambda: second.answer(Anchor(**NAME)))
        assert await driving

    asyncio.run(main())


WRONG = {
    "run": ({"run": "other"}, "its run is other, that of the last start here is r"),
    "epoch": ({"epoch": 7}, "its epoch is 7, that of the last start here is 0"),
    "round": ({"round": 7, "attempt": 0}, "its round is 7, that of the last start here is 1"),
    "attempt": ({"attempt": 0}, "its attempt is 0, that of the last start here is 3"),
}


@pytest.mark.parametrize("field", WRONG)
@pytest.mark.parametrize("kind", [Anchor, Probe, Projections, Gradient, EvalBatch])
def test_every_answer_of_another_run_epoch_round_or_attempt_is_refused_with_what_is_wrong(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, kind: type, field: str
) -> None:
    async def main() -> None:
        device = Device(fleet, "a")
        changes, reason = WRONG[field]
        more = {Probe: {"direction": 0, "sign": 1}, EvalBatch: {"last": True}, Gradient: {"rotation": 1}}.get(kind, {})
        device.tell(RoundStart(**NAME, attempt=3, deadline_s=1.0))
        device.answer(kind(**{**NAME, "attempt": 3, **changes}, id=2, **more))
        answer = name_of(kind)
        named = {**NAME, "attempt": 3, **changes}
        assert device.told[-1] == Late(**named, id=2, answer=answer, code=field, reason=reason)
        assert f"device a: its {answer} of round {named['round']} is not taken: {reason}" in caplog.text
        assert device.take(Ask("a", kind, 1)) is None

    asyncio.run(main())


def test_an_answer_of_a_round_that_went_on_without_the_device_comes_too_late(fleet: Fleet) -> None:
    async def main() -> None:
        device = Device(fleet, "a")
        for round_, attempt in ((1, 3), (2, 4), (2, 5)):
            device.tell(RoundStart(run="r", epoch=0, round=round_, attempt=attempt, deadline_s=1.0))
            device.leave_round()
        reason = "its stage is over, the last start here is of round 2"
        for round_, attempt in ((1, 3), (2, 4)):
            named = {"run": "r", "epoch": 0, "round": round_, "attempt": attempt}
            device.answer(Anchor(**named))
            assert device.told[-1] == Late(**named, answer="anchor", code="stage", reason=reason)

    asyncio.run(main())


def test_answers_of_another_round_or_stage_are_refused_by_name(fleet: Fleet) -> None:
    async def main() -> None:
        device = Device(fleet, "a")
        device.answer(Anchor(run="r", epoch=0, round=7))
        reason = "no round has begun for this device on this connection"
        assert device.told == [Late(run="r", epoch=0, round=7, answer="anchor", code="round", reason=reason)]
        device.tell(RoundStart(**NAME, deadline_s=1.0))
        device.answer(Probe(**NAME, id=1, direction=0, sign=-1))
        device.answer(Probe(**NAME, id=2, direction=0, sign=1))
        found = device.take(Ask("a", Probe, 1, 0, 1))
        assert found is not None
        assert found.message == Probe(**NAME, id=2, direction=0, sign=1)
        reason = "what is asked for now is: probe of direction 0, sign +1"
        assert device.told[-1] == Late(**NAME, id=1, answer="probe", code="unasked", reason=reason)
        reason = "it is made of a cut-gradient, and none was sent in this round"
        for answer in (Projections(**NAME, id=2), Gradient(**NAME, id=2, rotation=1)):
            device.answer(answer)
            assert device.told[-1] == Late(**NAME, id=2, answer=name_of(answer), code="unasked", reason=reason)
        device.tell(CutGradient(**NAME))
        device.answer(Projections(**NAME, id=3))
        device.leave_round()
        assert device.told[-1] == Late(**NAME, id=3, answer="projections", reason="its stage is over")
        assert device.take(Ask("a", Projections, 1)) is None

    asyncio.run(main())


def test_more_answers_than_anybody_may_have_waiting_break_the_protocol(fleet: Fleet) -> None:
    async def main() -> None:
        device = Device(fleet, "a")
        device.tell(RoundStart(**NAME, deadline_s=1.0))
        for id_ in range(4):
            device.answer(Anchor(**NAME, id=id_))
        with pytest.raises(ProtocolError, match="anchor while 4 messages wait already"):
            device.answer(Anchor(**NAME, id=4))
        device.answer(report())  # reports have a queue of their own

    asyncio.run(main())


def report() -> Report:
    figures = dict.fromkeys(("peak_rss_bytes", "anonymous_bytes", "sent_bytes", "received_bytes"), 0)
    return Report(run="r", epoch=0, applied_round=0, weights_digest="0" * 64, step_seconds=0.0, **figures)


def test_a_refusal_ends_the_devices_part_and_faults_are_passed_on(fleet: Fleet, faults: list[Fault]) -> None:
    def round_() -> Exchange[None]:
        yield Fault("a", "nonsense")
        yield Tell("a", Refusal(code="message", reason="no", retry=True))

    async def main() -> None:
        device = Device(fleet, "a")
        await fleet.drive(round_(), 1.0)
        assert not device.is_ready
        assert [type(message) for message in device.told] == [Refusal]

    asyncio.run(main())
    assert faults == [Fault("a", "nonsense")]


def test_an_error_in_a_round_leaves_nobody_in_it(fleet: Fleet) -> None:
    def round_() -> Exchange[None]:
        yield Tell("a", RoundStart(**NAME, deadline_s=1.0))
        raise ArithmeticError

    async def main() -> None:
        device = Device(fleet, "a")
        with pytest.raises(ArithmeticError):
            await fleet.drive(round_(), 1.0)
        device.answer(Anchor(**NAME))
        assert device.told[-1] == Late(**NAME, answer="anchor", reason="its stage is over")

    asyncio.run(main())


def test_λ_reaches_a_float16_device_with_its_small_entries() -> None:
    from hosl_cloud.rounds.anchors import _scale_for_wire

    lambda_TD = np.array([[3e-9, -2e-7, 1e-12]], np.float32)
    scaled, exponent = _scale_for_wire(lambda_TD, "float16")
    assert 2**14 <= np.abs(scaled).max() < 2**15
    received = np.ldexp(scaled.astype(np.float16).astype(np.float64), exponent)
    np.testing.assert_allclose(received, lambda_TD, rtol=1e-3)
    assert _scale_for_wire(lambda_TD, "bfloat16")[1] == 0


def test_what_is_told_is_on_its_way_while_the_round_computes(fleet: Fleet) -> None:
    is_told = threading.Event()

    def exchange() -> Exchange[bool]:
        yield Tell("a", RoundStart(**NAME, deadline_s=1.0))
        return is_told.wait(10.0)

    async def main() -> None:
        device = Device(fleet, "a")
        driving = asyncio.create_task(fleet.drive(exchange(), 10.0))
        while not device.told:
            await asyncio.sleep(0.01)
        is_told.set()
        assert await driving

    asyncio.run(main())


class Link(Silent):
    """A websocket that keeps what is sent, as long as it is open."""

    def __init__(self) -> None:
        self.is_open = asyncio.Event()
        self.sent: list[Any] = []

    async def send(self, event: dict[str, Any]) -> None:
        await self.is_open.wait()
        self.sent.append(event["bytes"])

    async def close(self) -> None: ...


def connected(fleet: Fleet, name: str) -> tuple[Device, Link]:
    """A device in the middle of a run, and its link, which takes nothing yet."""
    device, link = Device(fleet, name), Link()
    device._socket = link  # type: ignore[assignment]
    device.connection.phase = Phase.ACTIVE
    return device, link


UPDATE = Update(**NAME, learning_rate=0.1)
TENSORS = {"coefficients": np.ones(2, np.float32), "loss": np.ones((), np.float32)}


def test_an_update_is_encoded_once_for_all(fleet: Fleet) -> None:
    async def main() -> None:
        pairs = [connected(fleet, name) for name in "abc"]
        serving = [asyncio.create_task(device.serve()) for device, _ in pairs]
        fleet.broadcast(UPDATE, TENSORS)
        for device, link in pairs:
            link.is_open.set()
            await device.emptied(5.0)
        (first, *others) = [link.sent for _, link in pairs]
        assert b"".join(first) == b"".join(encode(UPDATE, TENSORS))
        for other in others:
            assert all(ours is theirs for ours, theirs in zip(first, other, strict=True))
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    asyncio.run(main())


def test_a_device_that_takes_nothing_is_cut_off_at_a_limit(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peer, "OUTBOX_BYTES", 100_000)

    async def main() -> None:
        device, _ = connected(fleet, "a")
        serving = asyncio.create_task(device.serve())
        await asyncio.sleep(0)
        tensors = {"lambda": np.zeros((1000, 10), np.float32), "loss": np.ones((), np.float32)}
        for told in range(3):
            assert not device.gone.is_set(), told
            device.tell(CutGradient(**NAME), tensors)
        with pytest.raises(asyncio.TimeoutError):
            await device.emptied(0.05)
        device.tell(CutGradient(**NAME), tensors)
        assert device.gone.is_set()
        assert not device.is_ready
        await asyncio.wait_for(serving, 5.0)

    asyncio.run(main())
    assert "device a takes nothing: 121548 bytes wait for it, the limit is 100000; it is cut off" in caplog.text
