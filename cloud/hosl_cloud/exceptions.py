"""Errors of the cloud: what went wrong as facts, one sentence for people, and the exit code that a command ends with.

The codes are hosl_protocol.exceptions.ExitCode; `run_command` (hosl_protocol/program/terminal.py) ends with an error's.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

from hosl_protocol.exceptions import ExitCode, HoslError, ProtocolError, SettingsError


class CloudError(HoslError):
    """Root of every error that the cloud raises on purpose, beside a wrong setting.

    CloudError
    ├── VerbalizerError        the task's words do not fit the bundle's tokenizer: change the task
    ├── BatchError             a device's batch contradicts itself: refuse the device
    ├── NotFiniteError         the tail's loss or gradient overflowed: leave the batch out, or lower the rate
    │   └── RoundSpoiltError   it was found too late to leave the batch out: the round's gradients are gone
    ├── RunNotFound            no run of this name is stored: choose another
    ├── AmbiguousRun           several runs begin so: give more of the name
    ├── ForeignSettings        a stored run's settings are another version's: use that one
    ├── CheckpointError        a tail checkpoint cannot be used: choose another
    │   ├── CheckpointMissing  there is none that fits
    │   ├── CheckpointDamaged  its bytes are not those that were written
    │   └── CheckpointMismatch it was written for a tail that trains other tensors
    ├── RankLostError          another process of the service is gone: start the service again, as torchrun does
    ├── RankLoadError          another process cannot load the tail: see its reason
    ├── AdapterError           what was trained is more than an adapter: merge without one
    ├── RoundsFailedError      round after round came to nothing: read the log
    ├── NoDevicesError         too few devices are left: bring them back and start again
    ├── StoreError             the database cannot be used: mend the folder, or use the hosl that wrote it
    │   └── StoreFull          there is no room for what should be written: make some
    ├── ApiError               a device's token cannot be made or revoked: choose another name
    └── ServiceError           the service cannot listen as asked: change the address
        └── RequestError       the service is away, or does not do what it was asked: see its reason
    """


class VerbalizerError(CloudError, SettingsError):
    """A class cannot be told by one token. Stores the field, the value and the remedy."""

    exit_code = ExitCode.SETTINGS


class BatchError(CloudError, ProtocolError):
    """Activations, lengths and labels of one batch do not belong together."""

    exit_code = ExitCode.PROTOCOL

    def __init__(self, what: str, expected: object, got: object) -> None:
        self.what, self.expected, self.got = what, expected, got
        super().__init__(f"{what}: expected {expected}, got {got}")


class NotFiniteError(CloudError):
    """A number of the tail is infinite or not a number; no weight was changed."""

    def __init__(self, what: str, value: float) -> None:
        self.what, self.value = what, value
        super().__init__(f"{what} is {value}: lower tail.learning_rate, or use float32 for wire and tail")


class RoundSpoiltError(NotFiniteError):
    """A gradient that was already added up is not finite; the round's gradients were dropped."""


class RunNotFound(CloudError):
    """The store has no such run."""

    exit_code = ExitCode.SETTINGS

    def __init__(self, run: str, known: list[str]) -> None:
        self.run, self.known = run, known
        super().__init__(f"no run {run!r}; stored runs: {', '.join(known) or 'none'}")


class AmbiguousRun(CloudError):
    """More than one run begins so. Stores what was given, and the runs."""

    exit_code = ExitCode.SETTINGS

    def __init__(self, run: str, found: list[str]) -> None:
        self.run, self.found = run, found
        super().__init__(f"{run!r} is the beginning of {len(found)} runs: {', '.join(found)}; give more of the name")


class ForeignSettings(CloudError):
    """A stored run's settings mean nothing to this version. Stores the run, and which setting it is."""

    exit_code = ExitCode.DATA

    def __init__(self, run: str, problem: str) -> None:
        self.run, self.problem = run, problem
        super().__init__(f"run {run}: {problem}; use the hosl that began it")


class CheckpointError(CloudError):
    """A checkpoint cannot be used. Stores its path."""

    exit_code = ExitCode.DATA

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"checkpoint {path}: {reason}")


class CheckpointMissing(CheckpointError):
    """No checkpoint where one was looked for."""


class CheckpointDamaged(CheckpointError):
    """The file differs from the one that was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, f"{reason}; take another with --checkpoint, or remove this one and the next best counts")


class CheckpointMismatch(CheckpointError):
    """The checkpoint's tensors are not those that this tail trains."""


class RankLostError(CloudError):
    """The ranks of a service can no longer talk to each other. Stores the rank that says so."""

    exit_code = ExitCode.RANKS

    def __init__(self, rank: int, error: Exception) -> None:
        self.rank = rank
        # gloo puts its source file before what happened, and advice behind it.
        reason = re.sub(r"^\[[^]]*\] |\. This is typically.*|\n.*", "", f"{error}", flags=re.DOTALL)
        reason = reason or type(error).__name__
        super().__init__(f"rank {rank} cannot go on with the others ({reason}): start all ranks again")


class RankLoadError(CloudError):
    """Another rank has no use for the bundle. Stores the rank."""

    def __init__(self, rank: int, reason: str, exit_code: int) -> None:
        self.rank, self.exit_code = rank, ExitCode(exit_code)
        super().__init__(f"rank {rank}: {reason}")


class AdapterError(CloudError):
    """The run's result is no PEFT adapter."""

    exit_code = ExitCode.SETTINGS

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"no adapter can be made: {reason}; merge without --adapter")


class NoDevicesError(CloudError):
    """Fewer devices than the quorum came back in time."""

    exit_code = ExitCode.REFUSED

    def __init__(self, run: str, round_: int, waited_s: float, present: int, quorum: int) -> None:
        self.run, self.round, self.waited_s, self.present, self.quorum = run, round_, waited_s, present, quorum
        super().__init__(
            f"run {run} has had {present} of the {quorum} devices that a round needs (devices.quorum) "
            f"for {waited_s:.0f} s after round {round_}"
        )


class RoundsFailedError(CloudError):
    """A round was tried again and again and came to nothing."""

    def __init__(self, run: str, round_: int, tries: int) -> None:
        self.run, self.round, self.tries = run, round_, tries
        super().__init__(f"run {run}: round {round_} came to nothing {tries} times in a row; the log says why")


class StoreError(CloudError):
    """The database can't be opened, read or written, or is of another version."""

    exit_code = ExitCode.DATA


class StoreFull(StoreError):
    """The database took nothing, for its disk is full."""

    exit_code = ExitCode.RESOURCES

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}: make room on its disk")


class ServiceError(CloudError):
    """The service can't listen where it was told to."""

    exit_code = ExitCode.SETTINGS


class RequestError(ServiceError):
    """The service can't be reached, or refuses a request. Stores the HTTP status, 0 where there was no answer."""

    exit_code = ExitCode.REFUSED

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason
        if status == 422:  # a setting, or an option, that it cannot use
            self.exit_code = ExitCode.SETTINGS
        super().__init__(reason)


class ApiError(CloudError):
    """What is asked of the service can't be done. Stores the HTTP status that says so."""

    exit_code = ExitCode.SETTINGS

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason
        super().__init__(reason)


def is_disk_full(error: BaseException) -> bool:
    """Tell whether a write failed for want of room, however the library says it: disk, quota, a limit on files."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if getattr(cause, "sqlite_errorname", None) in _NO_ROOM:
            return True
        if "disk is full" in str(cause) or "No space left" in str(cause):
            return True
        cause = cause.__cause__
    return False


_NO_ROOM = ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE")
"""What SQLite calls it (from Python 3.11 on): it knows ENOSPC by name, a quota or a limit as a write that failed."""
