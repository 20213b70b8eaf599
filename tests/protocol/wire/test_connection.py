"""The course of a connection: two sides that exchange bytes, and what each may say when."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from msgspec import structs

from hosl_protocol.arithmetic.rotation import rotation_of
from hosl_protocol.exceptions import FrameError, LimitError, ProtocolError, UnexpectedMessage
from hosl_protocol.run.settings import RunSettings, convert
from hosl_protocol.run.tasks import load_preset
from hosl_protocol.run.updates import UpdateShape
from hosl_protocol.wire.codec import encode
from hosl_protocol.wire.connection import Connection, Phase, Role, bounds_for
from hosl_protocol.wire.messages import (
    Anchor,
    CatchUp,
    Complete,
    CutGradient,
    EvalBatch,
    EvalResult,
    EvalStart,
    Goodbye,
    Gradient,
    Hello,
    Probe,
    ProbeLoss,
    Projections,
    Ready,
    Refusal,
    Report,
    RoundStart,
    Update,
    Welcome,
    name_of,
)
from hosl_protocol.wire.packing import Dither, pack, unpack

WIDTH = 3
DIGEST = "0" * 64
ROUND = {"run": "r1", "epoch": 0, "round": 1}
BATCH = {
    "activations": np.ones((5, WIDTH), np.float32),
    "lengths": np.array([2, 3], np.int32),
    "labels": np.array([0, 1], np.int32),
}
UPDATE = UpdateShape(coefficients=2)
NO_UPDATES = {"coefficients": np.empty((0, 2), np.float32), "learning_rates": np.empty(0)}
TWO_UPDATES = {"coefficients": np.ones((2, 2), np.float32), "learning_rates": np.ones(2)}
LOSS = np.float32(0.7)


def make_settings(preset="sst2", **changes):
    chosen = {"batch_size": 4, "max_length": 16, **changes}
    return convert({"task": load_preset(preset), **chosen}, RunSettings, "run")


HELLO = Hello(software="x 1", device="pi-1", shard_digest=DIGEST, data_digest=DIGEST)
READY = Ready(run="r1", epoch=0, applied_round=0, weights_digest=DIGEST, train_examples=9, eval_examples=2)
REPORT = Report(
    run="r1", epoch=0, applied_round=1, weights_digest=DIGEST, step_seconds=0.5, peak_rss_bytes=1, anonymous_bytes=1,
    sent_bytes=1, received_bytes=1,
)  # fmt: skip
COMPLETE = Complete(run="r1", reason="completed", round=1)
REFUSAL = Refusal(code="shard", reason="another shard", retry=False)
GOODBYE = Goodbye(reason="stopped by hand")


def update_of(settings):
    return UpdateShape(coefficients=0) if settings is not None and settings.algorithm == "frozen" else UPDATE


def welcome(settings=None, width=WIDTH):
    return Welcome(
        run="r1",
        epoch=0,
        round=0,
        width=width,
        update=update_of(settings),
        settings=settings or make_settings(),
        plan="continue",
    )


def catch_up(last=True):
    return CatchUp(run="r1", epoch=0, first_round=1, last=last)


FROM_EDGE = [
    (HELLO, {}),
    (READY, {}),
    (Probe(**ROUND, direction=0, sign=1), BATCH),
    (Anchor(**ROUND), BATCH),
    (Projections(**ROUND), {"projections": np.ones(2, np.float32)}),
    (Gradient(**ROUND, rotation=1), {"scales": np.ones(2, np.float32), "codes": np.empty(0, np.uint8)}),
    (EvalBatch(**ROUND, last=True), BATCH),
    (REPORT, {}),
    (GOODBYE, {}),
]
FROM_CLOUD = [
    (welcome(), {}),
    (catch_up(), NO_UPDATES),
    (RoundStart(**ROUND, deadline_s=60.0), {}),
    (ProbeLoss(**ROUND, direction=0, sign=1), {"loss": LOSS}),
    (CutGradient(**ROUND), {"lambda": np.ones((5, WIDTH), np.float32), "loss": LOSS}),
    (Update(**ROUND, learning_rate=0.0), {"coefficients": np.ones(2, np.float32), "loss": LOSS}),
    (EvalStart(**ROUND), {}),
    (EvalResult(**ROUND, correct=1, scored=2), {"loss": LOSS}),
    (COMPLETE, {}),
    (REFUSAL, {}),
]
IN_A_ROUND_FROM_EDGE = {"probe", "anchor", "projections", "gradient", "eval-batch", "report"}
IN_A_ROUND_FROM_CLOUD = {"round-start", "probe-loss", "cut-gradient", "update", "eval-start", "eval-result"}
# The same table stands in protocol/README.md.
ALLOWED = {
    (Role.EDGE, Phase.HELLO): {"hello", "goodbye"},
    (Role.EDGE, Phase.JOINING): {"ready", "goodbye"},
    (Role.EDGE, Phase.ACTIVE): {"goodbye", *IN_A_ROUND_FROM_EDGE},
    (Role.EDGE, Phase.CLOSED): set(),
    (Role.CLOUD, Phase.HELLO): {"welcome", "complete", "refusal"},
    (Role.CLOUD, Phase.JOINING): {"welcome", "catch-up", "complete", "refusal", *IN_A_ROUND_FROM_CLOUD},
    (Role.CLOUD, Phase.ACTIVE): {"complete", "refusal", *IN_A_ROUND_FROM_CLOUD},
    (Role.CLOUD, Phase.CLOSED): set(),
}
CASES = [
    pytest.param(sender, phase, message, tensors, id=f"{name_of(message)}-while-{phase.value}")
    for sender, spoken in ((Role.EDGE, FROM_EDGE), (Role.CLOUD, FROM_CLOUD))
    for phase in Phase
    for message, tensors in spoken
]


def carry(sender, receiver, message, tensors=None):
    """Every piece of a message from one side to the other; the frame that comes out."""
    frame = None
    for piece in sender.send(message, tensors):
        assert frame is None
        frame = receiver.receive(bytes(piece))
    return frame


def make_pair(phase=Phase.HELLO, settings=None):
    edge, cloud = Connection(Role.EDGE), Connection(Role.CLOUD)
    cloud.agree(settings or make_settings(), WIDTH, update_of(settings))
    if phase is not Phase.HELLO:
        carry(edge, cloud, HELLO)
        carry(cloud, edge, welcome(settings))
    if phase is Phase.ACTIVE:
        carry(cloud, edge, RoundStart(**ROUND, deadline_s=60.0))
    if phase is Phase.CLOSED:
        carry(cloud, edge, COMPLETE)
    assert edge.phase is cloud.phase is phase
    return edge, cloud


@pytest.mark.parametrize(("sender", "phase", "message", "tensors"), CASES)
def test_each_side_says_in_each_phase_what_the_table_allows_and_nothing_else(sender, phase, message, tensors):
    edge, cloud = make_pair(phase)
    speaker, listener = (edge, cloud) if sender is Role.EDGE else (cloud, edge)
    if name_of(message) in ALLOWED[sender, phase]:
        # Before the Welcome no bounds are agreed; nothing that is allowed then carries tensors.
        assert carry(speaker, listener, message, tensors).message == message
        assert speaker.phase is listener.phase
        return
    with pytest.raises(UnexpectedMessage) as ours:
        speaker.send(message, tensors)
    assert ours.value.got == name_of(message)
    assert f"from the {sender.value} while {phase.value}" in ours.value.expected
    header = next(encode(message, tensors))
    with pytest.raises(ProtocolError) as theirs:
        listener.receive(bytes(header))
    if phase is Phase.CLOSED:
        assert str(theirs.value) == "data after the end of the connection"
    else:
        assert str(theirs.value) == str(ours.value)


def test_a_sentence_about_a_wrong_message_names_what_was_due_and_what_came():
    edge, _ = make_pair(Phase.JOINING)
    with pytest.raises(UnexpectedMessage) as caught:
        edge.send(HELLO)
    assert str(caught.value) == "expected ready or goodbye from the edge while joining, got hello"


def test_a_device_that_rounds_pass_by_while_it_catches_up_is_told_again():
    edge, cloud = make_pair(Phase.JOINING)
    for last in (False, True):
        assert carry(cloud, edge, catch_up(last), TWO_UPDATES).tensors["coefficients"].shape == (2, 2)
    carry(edge, cloud, READY)
    carry(cloud, edge, catch_up(), TWO_UPDATES)
    carry(edge, cloud, READY)
    carry(cloud, edge, catch_up(), NO_UPDATES)
    carry(edge, cloud, READY)
    carry(cloud, edge, RoundStart(**ROUND, deadline_s=60.0))
    assert edge.phase is cloud.phase is Phase.ACTIVE


def test_a_rebuild_may_follow_a_ready_with_the_wrong_digest():
    edge, cloud = make_pair(Phase.JOINING)
    carry(cloud, edge, catch_up(), NO_UPDATES)
    carry(edge, cloud, READY)
    carry(cloud, edge, welcome())
    carry(cloud, edge, catch_up(), NO_UPDATES)
    carry(edge, cloud, READY)
    assert edge.phase is Phase.JOINING


@pytest.mark.parametrize("phase", [Phase.HELLO, Phase.JOINING])
def test_a_batch_before_its_time_is_refused_by_its_header_alone(phase):
    _, cloud = make_pair(phase)
    cloud.agree(make_settings(batch_size=65536, max_length=4096), 4096, UPDATE)
    header, _ = header_and_size(2**20, 4096)
    tracemalloc.start()
    try:
        with pytest.raises(UnexpectedMessage, match="got anchor"):
            cloud.receive(header)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def header_and_size(tokens, width):
    """An Anchor's header that declares tokens x width activations, made without them."""
    h_TD = np.broadcast_to(np.float32(0), (tokens, width))
    tensors = {"activations": h_TD, "lengths": np.ones(1, np.int32), "labels": np.ones(1, np.int32)}
    return next(iter(encode(Anchor(**ROUND), tensors))), h_TD.nbytes


def test_a_device_without_training_data_cannot_be_ready():
    _, cloud = make_pair(Phase.JOINING)
    with pytest.raises(FrameError, match="field train_examples"):
        cloud.receive(bytes(next(iter(encode(structs.replace(READY, train_examples=0), {})))))


def test_a_batch_larger_than_the_run_allows_is_refused_by_its_header():
    _, cloud = make_pair(Phase.ACTIVE)
    header, _ = header_and_size(4 * 16 + 1, WIDTH)
    with pytest.raises(LimitError, match=r"dimension T of anchor\.activations is 65, the limit is 64"):
        cloud.receive(header)


def test_another_wire_dtype_than_the_runs_is_refused():
    _, cloud = make_pair(Phase.ACTIVE, make_settings(wire_dtype="bfloat16"))
    with pytest.raises(FrameError, match="has type 'F32', expected BF16"):
        cloud.receive(next(iter(encode(Anchor(**ROUND), BATCH, "float32"))))


def test_both_sides_use_the_wire_dtype_of_the_welcome():
    edge, cloud = make_pair(Phase.ACTIVE, make_settings(wire_dtype="bfloat16"))
    tensors = {**BATCH, "activations": np.full((5, WIDTH), 1.0 + 2.0**-9, np.float32)}
    assert carry(edge, cloud, Anchor(**ROUND), tensors).tensors["activations"].max() == 1.0
    gradient = {"lambda": tensors["activations"], "loss": LOSS}
    assert carry(cloud, edge, CutGradient(**ROUND), gradient).tensors["lambda"].max() == 1.0


@pytest.mark.parametrize(("wire_dtype", "bits"), [("int8", 8), ("int4", 4)])
def test_λ_in_few_bits_is_rounded_with_the_words_of_the_run_the_round_and_the_device(wire_dtype, bits):
    edge, cloud = make_pair(Phase.ACTIVE, make_settings(wire_dtype=wire_dtype, seed=9))
    lambda_TD = np.random.default_rng(0).standard_normal((5, WIDTH)).astype(np.float32)
    got = carry(cloud, edge, CutGradient(**ROUND), {"lambda": lambda_TD, "loss": LOSS}).tensors["lambda"]
    expected = np.empty_like(got)
    dither = Dither(9, rotation_of(HELLO.device), ROUND["round"])
    unpack(pack(lambda_TD, bits, dither), bits, expected)
    np.testing.assert_array_equal(got, expected)
    sent = {**BATCH, "activations": lambda_TD}
    unpack(pack(lambda_TD, bits), bits, expected)
    np.testing.assert_array_equal(carry(edge, cloud, Anchor(**ROUND), sent).tensors["activations"], expected)


def test_a_client_without_a_wire_dtype_names_it():
    edge, cloud = Connection(Role.EDGE), Connection(Role.CLOUD)
    carry(edge, cloud, HELLO)
    unknown = make_settings()
    structs.force_setattr(unknown, "wire_dtype", "int3")
    with pytest.raises(ProtocolError, match=r"welcome: field settings\.wire_dtype: invalid enum value 'int3'"):
        carry(cloud, edge, welcome(unknown))


def test_a_welcome_whose_settings_cannot_be_used_ends_the_connection():
    edge, cloud = Connection(Role.EDGE), Connection(Role.CLOUD)
    carry(edge, cloud, HELLO)
    with pytest.raises(ProtocolError, match="batch_size is -1"):
        carry(cloud, edge, welcome(make_settings(batch_size=-1)))
    assert edge.settings is None


def test_a_welcome_of_another_protocol_ends_the_connection():
    edge, cloud = Connection(Role.EDGE), Connection(Role.CLOUD)
    carry(edge, cloud, HELLO)
    with pytest.raises(ProtocolError, match="welcome of protocol 2, expected 1"):
        carry(cloud, edge, structs.replace(welcome(), protocol=2))
    assert edge.phase is Phase.HELLO


def test_labels_may_be_as_many_as_tokens_only_for_the_language_model():
    assert bounds_for(make_settings("sst2"), WIDTH, UPDATE).largest["N"] == 4
    assert bounds_for(make_settings("lm"), WIDTH, UPDATE).largest["N"] == 64


def test_a_frozen_client_gets_updates_without_coefficients():
    edge, cloud = make_pair(Phase.ACTIVE, make_settings(algorithm="frozen"))
    tensors = {"coefficients": np.empty(0, np.float32), "loss": LOSS}
    assert carry(cloud, edge, Update(**ROUND, learning_rate=0.0), tensors).tensors["coefficients"].size == 0


def test_an_end_between_frames_is_told_from_one_within():
    edge, cloud = make_pair(Phase.ACTIVE)
    pieces = list(edge.send(Anchor(**ROUND), BATCH))
    assert cloud.is_between_frames
    cloud.receive(bytes(pieces[0]))
    assert not cloud.is_between_frames
    for piece in pieces[1:]:
        cloud.receive(bytes(piece))
    assert cloud.is_between_frames
