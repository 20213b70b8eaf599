"""Stateful tests of a connection: one side against a peer that may say anything, and two sides that are valid.

The model here is the table of protocol/README.md, "Course of a connection", written down a second time.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fuzzing import (
    MESSAGES,
    SETTINGS,
    UPDATE,
    VALID,
    WIDTH,
    check_held,
    damage_bytes,
    feed,
    held_bytes,
    other,
    pieces_of,
    with_length,
)
from hosl_protocol.exceptions import ProtocolError, UnexpectedMessage
from hosl_protocol.wire.codec import PIECE_BYTES, Frame
from hosl_protocol.wire.connection import Connection, Phase, Role
from hosl_protocol.wire.messages import Message, name_of

_ROUND_FROM_CLOUD = {"round-start", "probe-loss", "cut-gradient", "update", "eval-start", "eval-result", "late"}
_ENDS = {"complete", "refusal", "goodbye"}
_MAY_SAY = {
    (Role.EDGE, Phase.HELLO): {"hello", "goodbye"},
    (Role.EDGE, Phase.JOINING): {"ready", "goodbye"},
    (Role.EDGE, Phase.ACTIVE): {"goodbye", "report", "probe", "anchor", "projections", "gradient", "eval-batch"},
    (Role.CLOUD, Phase.HELLO): {"welcome", "complete", "refusal"},
    (Role.CLOUD, Phase.JOINING): {"welcome", "catch-up", "complete", "refusal"} | _ROUND_FROM_CLOUD,
    (Role.CLOUD, Phase.ACTIVE): {"complete", "refusal"} | _ROUND_FROM_CLOUD,
}

NAMES = {role: [name_of(message) for message, _ in MESSAGES[role]] for role in Role}
seeds = st.integers(0, 2**32 - 1)
places = st.integers(0, 10)
mostly = st.sampled_from([True] * 9 + [False])
"""A sequence of faults alone would end at its first step."""
seldom = st.sampled_from([False] * 9 + [True])

REACHED: Counter[Phase] = Counter()
"""Sequences by the last phase in which something was exchanged."""


class Course:
    """The phase that the specification gives a connection, from the names of what was said."""

    def __init__(self) -> None:
        self.phase = Phase.HELLO
        self.was_greeted = False

    def allows(self, sender: Role, name: str) -> bool:
        """Whether `sender` may say this now."""
        return name in _MAY_SAY.get((sender, self.phase), set()) and not (name == "hello" and self.was_greeted)

    def hears(self, name: str) -> None:
        """Go on by what was said."""
        self.was_greeted |= name == "hello"
        if name in _ENDS:
            self.phase = Phase.CLOSED
        elif name == "welcome" and self.phase is Phase.HELLO:
            self.phase = Phase.JOINING
        elif name in _ROUND_FROM_CLOUD:
            self.phase = Phase.ACTIVE


class AnyPeer(RuleBasedStateMachine):
    """A connection whose peer sends what is due and what is not, whole, torn, repeated, damaged."""

    role = Role.CLOUD

    @initialize()
    def begin(self) -> None:
        self.connection = Connection(self.role)
        self.peer = other(self.role)
        self.course = Course()
        self.is_agreed = False
        self.is_refused = False
        self.rest: list[bytes] = []
        """Pieces of a frame that is under way."""
        self.under_way: Message | None = None

    # What the test knows

    @property
    def takes_nothing(self) -> bool:
        return self.is_refused or self.course.phase is Phase.CLOSED

    def fits(self, message: Message) -> bool:
        """Whether the run's bounds allow the message's tensors."""
        return self.is_agreed or not type(message).tensors

    def pick(self, sender: Role, place: int, *, is_due: bool) -> tuple[Message, Mapping[str, Any]]:
        """Any message, or one that goes on with the course."""
        frames = MESSAGES[sender]
        if is_due:
            going_on = [
                frame for frame in frames if self.course.allows(sender, name := name_of(frame[0])) and name not in _ENDS
            ]
            frames = [frame for frame in going_on if sender is self.role or self.fits(frame[0])] or frames
        return frames[place % len(frames)]

    def give(self, piece: bytes) -> Frame | ProtocolError | None:
        got = feed(self.connection, piece)
        if isinstance(got, ProtocolError):
            self.is_refused = True
        return got

    def heard(self, frame: Frame) -> None:
        self.course.hears(name_of(frame.message))
        self.is_agreed |= name_of(frame.message) == "welcome"
        self.under_way, self.rest = None, []

    # What may happen

    @precondition(lambda self: self.role is Role.CLOUD and self.course.was_greeted)
    @rule()
    def agrees(self) -> None:
        self.connection.agree(SETTINGS, WIDTH, UPDATE)
        self.is_agreed = True

    @rule(place=places, is_due=mostly)
    def we_say(self, place: int, is_due: bool) -> None:
        message, tensors = self.pick(self.role, place, is_due=is_due)
        try:
            pieces = [bytes(piece) for piece in self.connection.send(message, tensors)]
        except UnexpectedMessage:
            assert not self.course.allows(self.role, name_of(message))
            return
        assert self.course.allows(self.role, name_of(message))
        assert pieces == pieces_of(message, tensors)
        self.course.hears(name_of(message))

    @precondition(lambda self: self.under_way is None)
    @rule(place=places, parts=st.integers(0, 3), is_due=mostly)
    def peer_says(self, place: int, parts: int, is_due: bool) -> None:
        """A valid frame, due or not: its header, and where it has tensors the rest in parts to come."""
        message, tensors = self.pick(self.peer, place, is_due=is_due)
        header, *rest = pieces_of(message, tensors)
        is_due = not self.takes_nothing and self.course.allows(self.peer, name_of(message)) and self.fits(message)
        got = self.give(header)
        assert isinstance(got, ProtocolError) is not is_due, got
        if not is_due:
            return
        if not rest:
            assert isinstance(got, Frame)
            assert got.message == message
            self.heard(got)
            return
        assert got is None
        payload = b"".join(rest)
        cuts = sorted({0, len(payload), *(len(payload) * n // 4 for n in range(parts))})
        self.under_way, self.rest = message, [payload[a:b] for a, b in pairwise(cuts)]

    @precondition(lambda self: self.under_way is not None and not self.is_refused and self.rest)
    @rule()
    def peer_goes_on(self) -> None:
        """The next piece of the frame that is under way."""
        got = self.give(self.rest.pop(0))
        if self.course.phase is Phase.CLOSED:
            assert isinstance(got, ProtocolError)
            return
        assert not isinstance(got, ProtocolError), got
        assert (got is None) == bool(self.rest)
        if got is not None:
            assert got.message == self.under_way
            self.heard(got)

    @precondition(lambda self: self.under_way is not None and self.rest)
    @rule(size=st.sampled_from([0, PIECE_BYTES, PIECE_BYTES + 1]), seed=seeds, is_wanted=seldom)
    def peer_goes_on_wrongly(self, size: int, seed: int, is_wanted: bool) -> None:
        """Nothing, or more than the frame has room for."""
        if not is_wanted:
            return
        assert isinstance(self.give(random.Random(seed).randbytes(size)), ProtocolError)

    @precondition(lambda self: self.under_way is not None and self.rest)
    @rule(place=places, is_wanted=seldom)
    def peer_begins_anew(self, place: int, is_wanted: bool) -> None:
        """Another frame inside of one: taken for its bytes where it has room, as no receiver can know better."""
        if not is_wanted:
            return
        header = VALID[self.peer][place % len(VALID[self.peer])][0]
        room = sum(map(len, self.rest))
        got = self.give(header)
        assert isinstance(got, ProtocolError) == (self.takes_nothing or len(header) > room)
        if isinstance(got, Frame):
            self.heard(got)
        elif got is None:
            self.rest = [bytes(room - len(header))]

    @precondition(lambda self: self.under_way is None)
    @rule(place=places, seed=seeds, is_wanted=seldom)
    def peer_damages(self, place: int, seed: int, is_wanted: bool) -> None:
        """A header with faults: refused, or a message that was due and its tensors within the bounds."""
        if not is_wanted:
            return
        random_ = random.Random(seed)
        header, *_ = VALID[self.peer][place % len(VALID[self.peer])]
        took_nothing, course = self.takes_nothing, self.course
        got = self.give(with_length(damage_bytes(random_, header[8:])) if seed % 4 else damage_bytes(random_, header))
        if isinstance(got, ProtocolError):
            return
        assert not took_nothing
        message = got.message if got is not None else self.connection._reader._message
        assert message is not None
        assert course.allows(self.peer, name_of(message))
        if got is not None:
            self.heard(got)
            if name_of(message) == "welcome":
                self.connection.agree(SETTINGS, WIDTH, UPDATE)  # its settings may have been what was damaged
            return
        size = held_bytes(self.connection)
        self.under_way = message
        self.rest = [bytes(size)] if size else []

    @precondition(lambda self: self.under_way is None)
    @rule(seed=seeds, size=st.sampled_from([0, 1, 7, 8, 9, 300, 65544, 65545]), is_wanted=seldom)
    def peer_sends_noise(self, seed: int, size: int, is_wanted: bool) -> None:
        if not is_wanted:
            return
        assert isinstance(self.give(random.Random(seed).randbytes(size)), ProtocolError)

    def teardown(self) -> None:
        if hasattr(self, "course"):
            REACHED[self.course.phase] += 1

    # What is always so

    @invariant()
    def phases_agree(self) -> None:
        assert self.connection.phase is self.course.phase
        assert self.connection.is_between_frames or self.under_way is not None or self.is_refused
        check_held(self.connection)

    @precondition(lambda self: self.takes_nothing)
    @invariant()
    def what_has_ended_stays_ended(self) -> None:
        for frame in VALID[self.peer]:
            assert isinstance(feed(self.connection, frame[0]), ProtocolError)
        assert self.connection.phase is self.course.phase


class AnyCloud(AnyPeer):
    """The same, seen from the edge."""

    role = Role.EDGE


class ValidPair(RuleBasedStateMachine):
    """Two sides that say what they may, with any delay both ways: neither ever refuses the other."""

    @initialize()
    def begin(self) -> None:
        self.sides = {role: Connection(role) for role in Role}
        self.wires: dict[Role, deque[bytes]] = {role: deque() for role in Role}
        """By sender."""
        self.said: dict[Role, deque[Message]] = {role: deque() for role in Role}

    @rule(role=st.sampled_from(list(Role)), place=places)
    def says(self, role: Role, place: int) -> None:
        side = self.sides[role]
        message, tensors = MESSAGES[role][place % len(MESSAGES[role])]
        if name_of(message) == "welcome":
            side.agree(SETTINGS, WIDTH, UPDATE)
        elif type(message).tensors and side.settings is None:
            return
        if role is Role.CLOUD and side.phase is Phase.HELLO and not side._was_greeted:
            return  # the first message is the device's
        try:
            pieces = side.send(message, tensors)
        except UnexpectedMessage:
            return
        self.wires[role] += [bytes(piece) for piece in pieces]
        self.said[role].append(message)

    @rule(role=st.sampled_from(list(Role)), count=st.integers(1, 6))
    def arrives(self, role: Role, count: int) -> None:
        receiver = self.sides[other(role)]
        for _ in range(min(count, len(self.wires[role]))):
            piece = self.wires[role].popleft()
            if receiver.phase is Phase.CLOSED:
                continue  # who said the last word reads no further
            frame = receiver.receive(piece)
            if frame is not None:
                assert frame.message == self.said[role].popleft()

    def teardown(self) -> None:
        """All that was said arrives."""
        if hasattr(self, "wires"):
            for role in Role:
                self.arrives(role, 10**6)
                receiver = self.sides[other(role)]
                assert receiver.phase is Phase.CLOSED or (receiver.is_between_frames and not self.said[role])


MACHINES: tuple[type[RuleBasedStateMachine], ...] = (AnyPeer, AnyCloud, ValidPair)
