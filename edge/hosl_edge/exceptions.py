"""Errors of the agent, split by what the caller can do next."""

from __future__ import annotations

from pathlib import Path

from hosl_protocol.exceptions import ExitCode, HoslError, SettingsError
from hosl_protocol.run.manifest import BundleError


class EdgeError(HoslError):
    """Root of the agent's errors.

    EdgeError
    ├── DataError           the device's data cannot be used: mend the file named
    ├── ConsentError        the run asks for more than the device allows: decide
    ├── UnservedError       the run has a setting that this device cannot serve: update one side, or change the run
    ├── MemoryBudgetError   the shard does not fit: raise the budget, or export another split
    ├── NoSpaceError        the disk is too small for what is to be fetched: make room
    ├── JournalError        the journal cannot be read: mend its permissions, or delete it
    ├── SnapshotError       a snapshot cannot be used: start at the base shard, and replay
    ├── HistoryError        what is kept of the run cannot go on: it was dropped, connect again and catch up
    ├── LowMemoryError      the machine runs out of memory: give it less to do
    ├── RefusedError        the cloud says no: see its reason
    ├── TrustError          the cloud is not the one that the token is for: check address and token
    ├── SignerError         nobody whom this machine knows vouches for the cloud: copy the whole token again
    └── ConnectionLost      the cloud is away: try again later
        ├── NoRun           it is there, and has no run to join: try again when it says
        └── NotFoundError   it is there, and has no such thing
    """


class DataError(EdgeError):
    """A data file is empty, unreadable, or has an unusable example; names the file and the line."""

    exit_code = ExitCode.DATA

    def __init__(self, path: Path, line: int | None, problem: str) -> None:
        self.path, self.line, self.problem = path, line, problem
        place = str(path) if line is None else f"{path}:{line}"
        super().__init__(f"{place}: {problem}")


class ConsentError(EdgeError):
    """The run's task reads fields, or needs text, that this device has not been told to share."""

    exit_code = ExitCode.SETTINGS


class UnservedError(EdgeError):
    """A setting of the run that this device cannot serve; the sentence names nothing of this machine."""

    exit_code = ExitCode.SETTINGS

    def __init__(self, error: SettingsError) -> None:
        self.field, self.value = error.field, error.value
        super().__init__(f"it cannot serve the run, whose {error}")


class MemoryBudgetError(EdgeError):
    """`--memory-budget` cannot hold the shard with one example; stores both figures in bytes."""

    exit_code = ExitCode.RESOURCES

    def __init__(self, needed_bytes: int, budget_bytes: int) -> None:
        self.needed_bytes, self.budget_bytes = needed_bytes, budget_bytes
        super().__init__(
            f"memory budget is {budget_bytes / 1e6:.0f} MB, this run needs {needed_bytes / 1e6:.0f} MB "
            "with one example at a time: raise --memory-budget, or use a smaller split, batch or max_length"
        )


class NoSpaceError(EdgeError):
    """The disk cannot hold what is to be fetched."""

    exit_code = ExitCode.RESOURCES


class LowMemoryError(EdgeError):
    """The machine has less memory left than `min_available_memory`; stores both figures in bytes."""

    exit_code = ExitCode.RESOURCES

    def __init__(self, available_bytes: int, lowest_bytes: int) -> None:
        self.available_bytes, self.lowest_bytes = available_bytes, lowest_bytes
        super().__init__(
            f"{available_bytes / 1e6:.0f} MB of memory are left, less than min_available_memory = "
            f"{lowest_bytes / 1e6:.0f} MB: stopped before the kernel kills something; lower memory_budget, "
            "or run less beside it"
        )


class WrongDigestError(BundleError):
    """A file came whole and is another than the manifest's. Stores the digest that was expected."""

    def __init__(self, url: str, digest: str, expected: str) -> None:
        self.expected = expected
        super().__init__(f"{url} has digest {digest}, expected {expected}: fetch it again")


class JournalError(EdgeError):
    """The journal is there and cannot be read. Stores its path."""

    exit_code = ExitCode.DATA

    def __init__(self, path: Path, problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(f"journal {path}: {problem}; mend it, or delete it and its updates come again from the cloud")


class SnapshotError(EdgeError):
    """A snapshot is missing or damaged, or not what it should be. Stores its path."""

    exit_code = ExitCode.DATA

    def __init__(self, path: Path, problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(f"snapshot {path.name}: {problem}")


class HistoryError(EdgeError):
    """The kept state of a run cannot be taken to where the cloud is; the device stands at the base shard."""

    exit_code = ExitCode.DATA


class RefusedError(EdgeError):
    """The cloud refused the device, for good or for now; `code` is its Refusal's, empty where HTTP said it."""

    exit_code = ExitCode.REFUSED

    def __init__(self, reason: str, *, retry: bool, code: str = "") -> None:
        self.reason, self.retry, self.code = reason, retry, code
        super().__init__(f"{'the cloud is not ready for' if retry else 'the cloud refused'} this device: {reason}")


class TrustError(EdgeError):
    """The service shows another CA than the token names. Stores both fingerprints."""

    exit_code = ExitCode.REFUSED

    def __init__(self, server: str, expected: str, got: str) -> None:
        self.server, self.expected, self.got = server, expected, got
        super().__init__(
            f"{server} is not the service that this token is for: its CA has the fingerprint {got}, "
            f"expected {expected}; check --server, or make a new token with hosl-cloud device add"
        )


class SignerError(EdgeError):
    """The cloud's certificate is of an authority that neither this machine nor the token names."""

    exit_code = ExitCode.REFUSED


class ConnectionLost(EdgeError):
    """The connection broke, or could not be made."""

    exit_code = ExitCode.REFUSED


class NoRun(ConnectionLost):
    """The cloud has no run that goes on; stores how many seconds it wants to be left alone for."""

    def __init__(self, retry_after: str | None) -> None:
        self.retry_after_s = float(retry_after) if retry_after and retry_after.isdecimal() else None
        super().__init__("the cloud has no run to join")


class NotFoundError(ConnectionLost):
    """The cloud answered 404: it is of another version, or no hosl-cloud."""
