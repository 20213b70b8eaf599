"""Errors of the protocol package, and the exit codes that every hosl command shares."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """What a hosl command ends with; the READMEs list the same numbers."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    SETTINGS = 3
    DATA = 4
    BUNDLE = 5
    REFUSED = 6
    PROTOCOL = 7
    RESOURCES = 8
    RANKS = 9
    INTERRUPTED = 130


class HoslError(Exception):
    """Root of every error that hosl raises on purpose.

    HoslError
    ├── SettingsError          a setting, manifest or task is wrong: change it
    │   └── MalformedSettings  a file of settings has unknown fields or wrong types
    ├── ProtocolError          a peer sent what the specification forbids: the connection ends
    │   ├── FrameError         bytes that are no frame
    │   ├── LimitError         a length above what was agreed, found before memory was taken
    │   └── UnexpectedMessage  a valid message at the wrong time
    ├── LatticeError           weights have diverged: no lattice holds them
    └── IrreversibleError      updates that cannot be taken back: replay from the base shard
    """

    exit_code = ExitCode.INTERNAL


class SettingsError(HoslError):
    """A field has a value that cannot be used. Stores the field, the value and the remedy."""

    exit_code = ExitCode.SETTINGS

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field} is {'not given' if value is None else repr(value)}: {remedy}")


class MalformedSettings(SettingsError):
    """Settings from a file or a peer do not have the form they should. Stores where, the field's path, and what."""

    def __init__(self, where: str, path: str, problem: str) -> None:
        super().__init__(path or where, None, problem)
        self.where, self.path, self.problem = where, path, problem
        place = f"{where}: {path}" if path else where
        self.args = (f"{place}: {problem[:1].lower()}{problem[1:]}",)


class ProtocolError(HoslError):
    """A peer departed from protocol/README.md."""

    exit_code = ExitCode.PROTOCOL


class FrameError(ProtocolError):
    """The bytes are not a frame."""


class LimitError(ProtocolError):
    """A declared length is above its limit."""

    def __init__(self, what: str, value: int, limit: int) -> None:
        self.what, self.value, self.limit = what, value, limit
        super().__init__(f"{what} is {value}, the limit is {limit}")


class UnexpectedMessage(ProtocolError):
    """A valid message arrived when another was due."""

    def __init__(self, expected: str, got: str) -> None:
        self.expected, self.got = expected, got
        super().__init__(f"expected {expected}, got {got}")


class LatticeError(HoslError):
    """A tensor's weights would leave the coarsest lattice that a run may use."""

    exit_code = ExitCode.SETTINGS

    def __init__(self, tensor: str, bound: float, limit: float) -> None:
        self.tensor, self.bound, self.limit = tensor, bound, limit
        super().__init__(
            f"weights of {tensor} may reach {bound:.6g}, the run's coarsest lattice ends at {limit:.6g}: "
            "the client's half diverges, lower client.learning_rate"
        )


class IrreversibleError(HoslError):
    """The updates cannot be taken back; the state before them is that of a replay from the base shard."""
