"""The protocol without sockets: a state machine per side, fed with what arrives and asked for what to send.

    HELLO  --Welcome-->  JOINING  --a round's message-->  ACTIVE  --Complete, Refusal, Goodbye-->  CLOSED

Whoever owns the socket feeds it; it never waits, so that a reader and a writer on one event loop may share it. `phase`
is changed by what is sent as by what arrives: what either side may say next follows from it alone (`_ALLOWED`).
Specification: protocol/README.md, section "Course of a connection".
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping

from hosl_protocol.arithmetic.rotation import rotation_of
from hosl_protocol.exceptions import ProtocolError, SettingsError, UnexpectedMessage
from hosl_protocol.run.settings import RunSettings, check_run_settings
from hosl_protocol.run.updates import UpdateShape
from hosl_protocol.wire import messages as m
from hosl_protocol.wire.codec import Array, Bounds, Frame, FrameReader, Piece, encode, wire_name
from hosl_protocol.wire.messages import Message, name_of
from hosl_protocol.wire.packing import Dither


class Phase(enum.Enum):
    """How far the connection has come."""

    HELLO = "hello"
    JOINING = "joining"
    ACTIVE = "active"
    CLOSED = "closed"


class Role(enum.Enum):
    """Which side this is."""

    EDGE = "edge"
    CLOUD = "cloud"


_ROUND_FROM_EDGE = (m.Probe, m.Anchor, m.Projections, m.Gradient, m.EvalBatch, m.Report)
_ROUND_FROM_CLOUD = (m.RoundStart, m.ProbeLoss, m.CutGradient, m.Update, m.EvalStart, m.EvalResult, m.Late)
_END_FROM_CLOUD = (m.Complete, m.Refusal)

_ALLOWED: dict[tuple[Role, Phase], tuple[type, ...]] = {
    (Role.EDGE, Phase.HELLO): (m.Hello, m.Goodbye),
    (Role.EDGE, Phase.JOINING): (m.Ready, m.Goodbye),
    (Role.EDGE, Phase.ACTIVE): (*_ROUND_FROM_EDGE, m.Goodbye),
    (Role.CLOUD, Phase.HELLO): (m.Welcome, *_END_FROM_CLOUD),
    (Role.CLOUD, Phase.JOINING): (m.Welcome, m.CatchUp, *_ROUND_FROM_CLOUD, *_END_FROM_CLOUD),
    (Role.CLOUD, Phase.ACTIVE): (*_ROUND_FROM_CLOUD, *_END_FROM_CLOUD),
}


def bounds_for(settings: RunSettings, width: int, update: UpdateShape) -> Bounds:
    """Bound the frames that a run may send in either direction."""
    return Bounds(
        {
            "B": settings.batch_size,
            "N": max(settings.batch_size, settings.max_tokens if settings.task.scores_tokens else 0),
            "T": settings.max_tokens,
            "D": width,
            "P": update.coefficients,
            "C": update.codes,
            "R": m.CATCH_UP_ROUNDS,
        },
        wire_dtypes=(wire_name(m.Anchor.tensors["activations"], settings.wire_dtype),),
    )


class Connection:
    """One side of a connection; knows who may say what, and when."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.phase = Phase.HELLO
        self.settings: RunSettings | None = None
        self._refused: ProtocolError | None = None
        """Why nothing more is taken from the peer."""
        self._was_greeted = False
        self._number = 0
        """The rotation of the device that said Hello."""
        self._peer = Role.CLOUD if role is Role.EDGE else Role.EDGE
        self._reader = FrameReader(
            m.FromCloud if role is Role.EDGE else m.FromEdge, check_due=lambda message: self._check(self._peer, message)
        )

    @property
    def is_between_frames(self) -> bool:
        """Whether a connection that ends now ends cleanly."""
        return self._reader.is_between_frames

    def agree(self, settings: RunSettings, width: int, update: UpdateShape) -> None:
        """Set the bounds that incoming frames must keep: the cloud's own run, or what the Welcome says."""
        self.settings = settings
        self._reader.bounds = bounds_for(settings, width, update)

    def receive(self, piece: bytes | bytearray | memoryview) -> Frame | None:
        """Take one websocket message; a frame when it is whole. Raises ProtocolError: end the connection then.

        After that nothing more is taken, whatever comes; a last message can still be sent.
        """
        if self.phase is Phase.CLOSED:
            raise ProtocolError("data after the end of the connection")
        if self._refused is not None:
            raise ProtocolError(f"data after a refusal: {self._refused}")

        try:
            return self._receive(piece)
        except ProtocolError as error:
            self._refused = error
            raise

    def _receive(self, piece: bytes | bytearray | memoryview) -> Frame | None:
        frame = self._reader.feed(piece)
        if frame is None:
            return None
        # Before anybody sees it: the next frame is bounded by what this one says.
        if isinstance(frame.message, m.Welcome):
            self._agree_to(frame.message)
        self._advance(frame.message)
        return frame

    def _agree_to(self, welcome: m.Welcome) -> None:
        if welcome.protocol != m.PROTOCOL_VERSION:
            raise ProtocolError(f"welcome of protocol {welcome.protocol}, expected {m.PROTOCOL_VERSION}")
        try:
            check_run_settings(welcome.settings)
        except SettingsError as error:
            raise ProtocolError(f"welcome with settings that cannot be used: {error}") from error
        self.agree(welcome.settings, welcome.width, welcome.update)

    def send(self, message: Message, tensors: Mapping[str, Array] | None = None) -> Iterator[Piece]:
        """The pieces to send, one websocket message each. Raises UnexpectedMessage on our own mistake."""
        # At once, not as the pieces are taken: what comes meanwhile is judged by what has been said.
        self._check(self.role, message)
        self._advance(message)
        if self.settings is None:
            return encode(message, tensors or {})
        return encode(message, tensors or {}, self.settings.wire_dtype, Dither(self.settings.seed, self._number))

    def _check(self, sender: Role, message: Message) -> None:
        allowed = _ALLOWED.get((sender, self.phase), ())
        # A second Hello would change who the peer is.
        if self._was_greeted:
            allowed = tuple(kind for kind in allowed if kind is not m.Hello)
        if not isinstance(message, allowed):
            expected = " or ".join(name_of(kind) for kind in allowed) or "nothing"
            raise UnexpectedMessage(f"{expected} from the {sender.value} while {self.phase.value}", name_of(message))

    def _advance(self, message: Message) -> None:
        if isinstance(message, m.Hello):
            self._was_greeted, self._number = True, rotation_of(message.device)
        if isinstance(message, (m.Complete, m.Refusal, m.Goodbye)):
            self.phase = Phase.CLOSED
        elif isinstance(message, m.Welcome):
            self.phase = Phase.JOINING
        elif isinstance(message, _ROUND_FROM_CLOUD):
            self.phase = Phase.ACTIVE
