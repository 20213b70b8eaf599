"""Whatever a peer sends: a refusal of the protocol's own, no memory beyond the run's bounds, and a valid peer goes on.

`make fuzz` runs the same for as long as one likes.
"""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from fuzzing import MESSAGES, SETTINGS, UPDATE, VALID, Tally, connection_in, feed, fuzz_frame, pieces_of, with_length
from hosl_protocol.exceptions import FrameError, LimitError, ProtocolError
from hosl_protocol.wire.connection import Phase, Role
from hosl_protocol.wire.messages import Welcome
from machines import MACHINES

QUICK = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_a_connection_keeps_its_course_whatever_comes(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=QUICK)  # type: ignore[no-untyped-call]


def test_no_damaged_frame_escapes() -> None:
    tally = Tally()
    for seed in range(4000):
        fuzz_frame(random.Random(seed), tally)
    assert tally.frames == 4000
    assert tally.accepted > 100, "faults so coarse that nothing deep is reached"
    assert {"FrameError", "LimitError", "UnexpectedMessage"} <= tally.refused.keys()


@pytest.mark.parametrize("role", Role)
def test_after_a_refusal_nothing_is_accepted_but_a_last_word_can_be_said(role: Role) -> None:
    connection = connection_in(role, Phase.ACTIVE)
    assert isinstance(feed(connection, b"nonsense" * 3), FrameError)
    for frames in VALID.values():
        for frame in frames:
            assert "data after a refusal: " in str(feed(connection, frame[0]))
    goodbye_or_refusal, _ = MESSAGES[role][-1]
    assert [bytes(piece) for piece in connection.send(goodbye_or_refusal)] == VALID[role][-1]
    assert connection.phase is Phase.CLOSED


def test_a_second_hello_is_not_due() -> None:
    cloud = connection_in(Role.CLOUD, Phase.HELLO)
    (hello,) = VALID[Role.EDGE][0]
    assert not isinstance(feed(cloud, hello), ProtocolError)
    assert "expected goodbye from the edge while hello, got hello" in str(feed(cloud, hello))


@pytest.mark.parametrize(("width", "batch", "length"), [(2**53 - 1, 65536, 2**20), (2**20, 65536, 2**12)])
def test_a_run_of_absurd_bounds_does_not_make_a_device_take_memory(width: int, batch: int, length: int) -> None:
    edge = connection_in(Role.EDGE, Phase.JOINING)
    changed = msgspec.structs.replace(SETTINGS, batch_size=batch, max_length=length)
    welcome = Welcome(run="r1", epoch=0, round=6, width=width, update=UPDATE, settings=changed, plan="continue")
    assert not isinstance(feed(edge, pieces_of(welcome, {})[0]), ProtocolError)
    rows = batch * length
    size = 4 * rows * width
    text = (
        r'{"__metadata__":{"hosl":"{\"type\":\"cut-gradient\",\"run\":\"r1\",\"epoch\":0,\"round\":7}"},'
        f'"lambda":{{"dtype":"F32","shape":[{rows},{width}],"data_offsets":[0,{size}]}},'
        f'"loss":{{"dtype":"F32","shape":[],"data_offsets":[{size},{size + 4}]}}}}'
    )
    assert isinstance(feed(edge, with_length(text.encode())), LimitError)


def test_a_frame_that_memory_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = connection_in(Role.CLOUD, Phase.ACTIVE)

    def no_memory(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("hosl_protocol.wire.codec.np.empty", no_memory)
    refusal = feed(cloud, VALID[Role.EDGE][3][0])
    assert "anchor of 76 bytes does not fit into memory" in str(refusal)
