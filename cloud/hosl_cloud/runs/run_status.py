"""What is told of runs, over HTTP and by the commands: from the store, and from a service in which they are under way.

The structs are the HTTP API's answers, so their field names stay. Their functions ask the store, off the event loop;
what only the loop may look at they are given, as a LiveState and a QueueState that were taken there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hosl_cloud.storage.evaluations import EvaluationFigures, list_evaluations
from hosl_cloud.storage.records import UNENDED, RunRow
from hosl_cloud.storage.store import Store


class WaitsFor(msgspec.Struct, frozen=True):
    """What a run waits for now."""

    what: str
    """Type of message, `devices` between rounds, or `room on the disk`."""
    devices: tuple[str, ...]
    """Whose, where these are known by name."""
    since: float
    """Unix time."""
    ready: int = 0
    needed: int = 0
    """Of devices: how many are there, and how many have to be; 0 where it waits for something else."""


class ReturningDevices(msgspec.Struct, frozen=True):
    """Devices that found no run to join, and ask again."""

    devices: int
    within_s: int
    """Seconds in which all of them will have asked."""


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A run in a line."""

    id: str
    bundle: str
    algorithm: str
    """Empty where another version of hosl wrote the settings, and it cannot be told."""
    state: str
    """pending, running, paused, completed, failed or stopped."""
    reason: str
    """Why it failed, or could not go on."""
    epoch: int
    round: int
    """The last finished one."""
    rounds: int
    """0 where another version of hosl wrote the settings, and it cannot be told."""
    created_at: float
    """Unix time."""
    devices: int
    """Ready for a round now."""
    loss: float | None
    """Of the last finished round."""
    accuracy: float | None
    """Of the last evaluation."""
    examples: int
    """In it, of devices that sent all they have; 0 without."""
    of_examples: int
    """Of all devices of the run, those that are away too."""
    right: int = 0
    scored: int = 0
    """Right predictions in it, and all of them; 0 without."""
    correct: int = 0
    """The same as `right`, by its former name."""
    perplexity: float | None = None
    """In it, of a language model."""
    macro_f1: float | None = None
    """In it, of a task with classes."""
    waits_for: WaitsFor | None = None
    behind: tuple[str, ...] = ()
    """Runs that have their turn before it, the one under way first."""
    problem: str = ""
    """Why its settings cannot be read; empty where they can."""


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A device in a run."""

    name: str
    is_connected: bool
    is_ready: bool
    """For a round."""
    last_seen: float
    """Unix time of its last message while it is connected, else of its last connection or report."""
    applied_round: int
    """Of its last report."""
    train_examples: int
    eval_examples: int
    connections: int
    strikes: int
    step_seconds: float | None
    peak_rss_bytes: int | None
    anonymous_bytes: int | None
    temperature_c: float | None
    sent_bytes: int | None
    received_bytes: int | None
    kept_examples: int = 0
    """Of its training data, in the service's cache."""
    kept_eval_examples: int = 0
    """Of its held-out data."""


class RunStatus(RunSummary, frozen=True, kw_only=True):
    """Everything about a run but its history."""

    config: dict[str, Any]
    evaluation: EvaluationFigures | None
    """The last one; /v1/runs/RUN/evaluations/ROUND has it class by class."""
    members: list[DeviceStatus]
    returning: ReturningDevices
    wire_bytes: dict[str, dict[str, int]]
    """Of all runs since the service started: `sent` or `received`, then type of message."""


@dataclass(frozen=True)
class LiveState:
    """What a service knows of one run under way, as it was at one moment; nothing where none runs."""

    ready: Collection[str] = ()
    """Devices that can take part in a round."""
    heard_at: Mapping[str, float] = field(default_factory=dict)
    """Unix time of the last message of each device that is connected."""
    waits_for: WaitsFor | None = None
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Examples in the cache by device: of its training data, and held out."""


@dataclass(frozen=True)
class QueueState:
    """Whose turn it is, as it was at one moment."""

    running: Mapping[str, str] = field(default_factory=dict)
    """Runs under way, by the digest of their bundle's shard."""
    held: frozenset[str] = frozenset()
    """Runs that wait until somebody resumes them."""


def summarize(store: Store, row: RunRow, live: LiveState, queue: QueueState | None = None) -> dict[str, Any]:
    """The fields of a RunSummary: slow, off the event loop. `queue` is None where no service runs."""
    last = next(iter(list_evaluations(store, row.id, newest=1)), None)

    # Of settings that another version wrote nothing is sure but that they are a table.
    settings = row.settings.data
    algorithm, rounds = settings.get("algorithm"), settings.get("rounds")

    return {
        "id": row.id,
        "bundle": row.bundle.name,
        "algorithm": algorithm if isinstance(algorithm, str) else "",
        "state": row.state,
        "reason": row.reason,
        "epoch": row.epoch,
        "round": row.round,
        "rounds": rounds if isinstance(rounds, int) else 0,
        "created_at": row.created_at,
        "devices": len(live.ready),
        "loss": next((r.loss for r in store.rounds(row.id, row.round - 1, 1)), None),
        "accuracy": last.accuracy if last else None,
        "examples": last.examples if last else 0,
        "of_examples": last.of_examples if last else 0,
        "right": last.right if last else 0,
        "scored": last.scored if last else 0,
        "correct": last.correct if last else 0,
        "perplexity": last.perplexity if last else None,
        "macro_f1": last.macro_f1 if last else None,
        "waits_for": live.waits_for,
        "behind": () if queue is None else _runs_ahead(store, row, queue),
        "problem": row.settings.problem,
    }


def _runs_ahead(store: Store, row: RunRow, queue: QueueState) -> tuple[str, ...]:
    """The runs of the same shard that have their turn before this one."""
    under_way = queue.running.get(row.shard_digest)
    if row.state not in UNENDED or under_way in (None, row.id) or row.id in queue.held:
        return ()
    line = [id_ for id_ in store.line(row.shard_digest) if id_ not in queue.held | {under_way}]
    return (f"{under_way}", *line[: line.index(row.id)]) if row.id in line else (f"{under_way}",)


def list_runs(store: Store, lives: Mapping[str, LiveState], queue: QueueState | None = None) -> list[RunSummary]:
    """All runs, oldest first: slow, off the event loop."""
    return [RunSummary(**summarize(store, row, lives.get(row.id, LiveState()), queue)) for row in store.runs()]


def run_status(
    store: Store,
    run: str,
    live: LiveState,
    queue: QueueState | None = None,
    returning: ReturningDevices | None = None,
    wire_bytes: dict[str, dict[str, int]] | None = None,
) -> RunStatus:
    """Everything about a run but its history: slow, off the event loop. Raises RunNotFound."""
    row = store.run(run)
    return RunStatus(
        **summarize(store, row, live, queue),
        config=row.settings.data,
        evaluation=next(iter(list_evaluations(store, run, newest=1)), None),
        members=_members(store, run, live),
        returning=returning or ReturningDevices(0, 0),
        wire_bytes=wire_bytes or {},
    )


def _members(store: Store, run: str, live: LiveState) -> list[DeviceStatus]:
    live_fields = {"is_connected", "is_ready", "last_seen", "kept_examples", "kept_eval_examples"}
    fields = set(DeviceStatus.__struct_fields__) - live_fields
    return [
        DeviceStatus(
            is_connected=row["name"] in live.heard_at,
            is_ready=row["name"] in live.ready,
            last_seen=live.heard_at.get(row["name"], row["last_seen"]),
            kept_examples=live.kept.get(row["name"], (0, 0))[0],
            kept_eval_examples=live.kept.get(row["name"], (0, 0))[1],
            **{name: row[name] for name in fields},
        )
        for row in store.devices(run)
    ]
