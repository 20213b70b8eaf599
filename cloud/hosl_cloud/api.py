"""The admin's HTTP API: runs, their figures, logs and checkpoints. The commands and the status page use it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from hosl_cloud import metrics
from hosl_cloud.checkpoint import Checkpoint, Metrics, list_checkpoints
from hosl_cloud.coordinator import Coordinator
from hosl_cloud.exceptions import ApiError
from hosl_cloud.operations import Call, Operation, Query
from hosl_cloud.records import Evaluation, RunRow
from hosl_cloud.runs import Runs
from hosl_cloud.settings import parse_config
from hosl_protocol import load_manifest
from hosl_protocol.manifest import MANIFEST

STOP_WAIT_S = 10.0
"""Longest wait for a run's round to end; the answer then says that it still runs."""
AFTER = Query("after", 0, 10**12, "Only what comes after this one.")
MOST = Query("most", 1000, 10_000, "How many, from the first of these on.")


class NewRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to train."""

    bundle: str
    """A bundle's folder, in one of the folders that the service takes bundles from."""
    config: dict[str, Any]
    """The settings, with the names that run.toml has."""


class WaitsFor(msgspec.Struct, frozen=True):
    """What a run waits for now."""

    what: str
    """Type of message, or `devices` between rounds."""
    devices: tuple[str, ...]
    since: float
    """Unix time."""


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
    state: str
    """pending, running, paused, completed, failed or stopped."""
    reason: str
    """Why it failed, or could not go on."""
    epoch: int
    round: int
    """The last finished one."""
    rounds: int
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
    """Of all devices that were there at its start."""


class RunList(msgspec.Struct, frozen=True):
    """All runs, oldest first."""

    runs: list[RunSummary]


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


class RunStatus(RunSummary, frozen=True, kw_only=True):
    """Everything about a run but its history."""

    config: dict[str, Any]
    waits_for: WaitsFor | None
    members: list[DeviceStatus]
    returning: ReturningDevices
    wire_bytes: dict[str, dict[str, int]]
    """Of all runs since the service started: `sent` or `received`, then type of message."""


class RoundFigures(msgspec.Struct, frozen=True):
    """A finished round."""

    round: int
    loss: float
    seconds: float
    wire_bytes: int
    """On the wire, both ways, since the round before."""
    finished_at: float
    """Unix time."""


class EvaluationFigures(msgspec.Struct, frozen=True):
    """An evaluation after a round."""

    round: int
    loss: float
    accuracy: float
    correct: int
    scored: int
    examples: int
    """Of devices that sent all they have."""
    of_examples: int
    """Of all devices that were there at the start; where they are more, it does not count for the best."""


class History(msgspec.Struct, frozen=True):
    """A run's rounds in force, and its evaluations."""

    rounds: list[RoundFigures]
    evaluations: list[EvaluationFigures]


class Event(msgspec.Struct, frozen=True):
    """A sentence of a run's log."""

    id: int
    at: float
    """Unix time."""
    level: str
    text: str


class Log(msgspec.Struct, frozen=True):
    """A part of a run's log."""

    events: list[Event]


class CheckpointFile(msgspec.Struct, frozen=True):
    """A checkpoint of the tail."""

    round: int
    epoch: int
    size_bytes: int
    sha256: str
    loss: float | None
    accuracy: float | None
    examples: int
    """Of devices that sent all they have; 0 where it was not evaluated."""
    of_examples: int
    """Of all devices that were there at the start; where they are more, it does not count for the best."""


class CheckpointList(msgspec.Struct, frozen=True):
    """A run's checkpoints, oldest first."""

    checkpoints: list[CheckpointFile]


class Draining(msgspec.Struct, frozen=True):
    """The service pauses its runs, and leaves."""

    runs: list[str]


class Api:
    """The handlers of the operations on runs."""

    def __init__(self, runs: Runs, bundles: Path, drain: asyncio.Event) -> None:
        """`bundles` is the folder that bundles of new runs are in; `drain` tells the service to leave."""
        self._runs, self._store = runs, runs.store
        self._bundles, self._drain = bundles, drain
        self._stopping: set[asyncio.Task[None]] = set()

    def operations(self) -> list[Operation]:
        """All of them."""
        run = "/v1/runs/{run}"
        return [
            Operation("GET", "/v1/runs", "All runs, oldest first.", self._list, RunList),
            Operation("POST", "/v1/runs", "Put a new run in line.", self._start, RunStatus, NewRun, 201, (), (404,)),
            Operation("GET", run, "A run.", self._show, RunStatus),
            Operation("DELETE", run, "Delete a run that is over.", self._remove, None, None, 204, (), (409,)),
            Operation(
                "POST", f"{run}/stop", "End a run after its round.", self._stop, RunStatus, None, 202, (), (409,)
            ),
            Operation("POST", f"{run}/resume", "Go on with a run.", self._resume, RunStatus, None, 202, (), (409,)),
            Operation("GET", f"{run}/history", "Losses and scores.", self._history, History, queries=(AFTER, MOST)),
            Operation("GET", f"{run}/log", "What was said about a run.", self._log, Log, queries=(AFTER, MOST)),
            Operation("GET", f"{run}/checkpoints", "The tail's checkpoints.", self._checkpoints, CheckpointList),
            Operation("GET", f"{run}/checkpoints/{{round}}", "A checkpoint's safetensors file.", self._checkpoint),
            Operation("POST", "/v1/drain", "Pause all runs, and leave.", self._leave, Draining, status=202),
        ]

    async def _list(self, call: Call) -> RunList:
        rows = [self._store.run(id_) for id_ in self._store.run_ids()]
        return RunList([RunSummary(**self._summary(row)) for row in rows])

    async def _start(self, call: Call) -> RunStatus:
        new: NewRun = call.body
        bundle = (self._bundles / new.bundle).resolve()
        if not bundle.is_relative_to(self._bundles.resolve()) or not (bundle / MANIFEST).is_file():
            raise ApiError(404, f"bundle is {new.bundle[:200]!r}: no bundle of this name is in {self._bundles}")
        manifest = await asyncio.to_thread(load_manifest, bundle)
        config = parse_config(new.config, manifest, "config")
        if config.baseline:
            raise ApiError(422, f"baseline is {config.baseline!r}: baselines are for hosl-cloud simulate: remove it")
        return self._status(self._runs.submit(bundle, config))

    async def _show(self, call: Call) -> RunStatus:
        return self._status(call.path["run"])

    async def _remove(self, call: Call) -> None:
        self._runs.remove(call.path["run"])

    async def _stop(self, call: Call) -> RunStatus:
        stopping = asyncio.create_task(self._runs.stop(call.path["run"]))
        self._stopping.add(stopping)
        stopping.add_done_callback(self._stopping.discard)
        done, _ = await asyncio.wait({stopping}, timeout=STOP_WAIT_S)
        for task in done:
            task.result()
        return self._status(call.path["run"])

    async def _resume(self, call: Call) -> RunStatus:
        self._runs.resume(call.path["run"])
        return self._status(call.path["run"])

    async def _history(self, call: Call) -> History:
        run, after = self._store.run(call.path["run"]).id, call.query["after"]
        rounds = await asyncio.to_thread(self._store.rounds, run, after, call.query["most"])
        evaluations = [e for e in self._store.evaluations(run) if e.round >= after]
        return History(
            [RoundFigures(r.round, r.loss, r.seconds, r.wire_bytes, r.finished_at) for r in rounds],
            [
                EvaluationFigures(e.round, e.loss, e.accuracy, e.correct, e.scored, e.examples, e.of_examples)
                for e in evaluations
            ],
        )

    async def _log(self, call: Call) -> Log:
        run = self._store.run(call.path["run"]).id
        events = await asyncio.to_thread(self._store.events, run, call.query["after"], call.query["most"])
        return Log([Event(e.id, e.at, e.level, e.text) for e in events])

    async def _checkpoints(self, call: Call) -> CheckpointList:
        found = await asyncio.to_thread(list_checkpoints, self._folder(call))
        described = [_describe(checkpoint) for checkpoint in found]
        return CheckpointList([each for each in described if each is not None])

    async def _checkpoint(self, call: Call) -> Path:
        round_, found = call.path["round"], await asyncio.to_thread(list_checkpoints, self._folder(call))
        for checkpoint in reversed(found):
            if str(checkpoint.info.round) == round_:
                return checkpoint.path
        known = ", ".join(str(checkpoint.info.round) for checkpoint in found) or "none"
        raise ApiError(404, f"no checkpoint of round {round_[:20]!r}; there are: {known}")

    async def _leave(self, call: Call) -> Draining:
        self._drain.set()
        return Draining([slot.run for slot in self._runs.slots() if not slot.is_over])

    def _folder(self, call: Call) -> Path:
        return self._runs.folder(self._store.run(call.path["run"]).id)

    def _coordinator(self, run: str) -> Coordinator | None:
        slot = self._runs.slot_of(run)
        return None if slot is None else slot.coordinator

    def _summary(self, row: RunRow) -> dict[str, Any]:
        coordinator = self._coordinator(row.id)
        evaluations: list[Evaluation] = self._store.evaluations(row.id)
        return {
            "id": row.id,
            "bundle": row.bundle.name,
            "algorithm": row.config.algorithm,
            "state": row.state,
            "reason": row.reason,
            "epoch": row.epoch,
            "round": row.round,
            "rounds": row.config.rounds,
            "created_at": row.created_at,
            "devices": 0 if coordinator is None else len(coordinator.fleet.ready_names()),
            "loss": next((r.loss for r in self._store.rounds(row.id, row.round - 1, 1)), None),
            "accuracy": evaluations[-1].accuracy if evaluations else None,
            "examples": evaluations[-1].examples if evaluations else 0,
            "of_examples": evaluations[-1].of_examples if evaluations else 0,
        }

    def _status(self, run: str) -> RunStatus:
        row, coordinator = self._store.run(run), self._coordinator(run)
        waiting = coordinator.fleet.waiting if coordinator is not None else None
        return RunStatus(
            **self._summary(row),
            config=msgspec.to_builtins(row.config),
            waits_for=None if waiting is None else WaitsFor(waiting.what, waiting.devices, waiting.since),
            members=self._members(run, coordinator),
            returning=ReturningDevices(self._runs.returning.count(), self._runs.returning.within_s()),
            wire_bytes=metrics.wire_bytes_by_kind(),
        )

    def _members(self, run: str, coordinator: Coordinator | None) -> list[DeviceStatus]:
        peers = {} if coordinator is None else coordinator.fleet.peers
        fields = set(DeviceStatus.__struct_fields__) - {"is_connected", "is_ready", "last_seen"}
        return [
            DeviceStatus(
                is_connected=peer is not None,
                is_ready=peer is not None and peer.is_ready,
                last_seen=row["last_seen"] if peer is None else peer.heard_at,
                **{name: row[name] for name in fields},
            )
            for row in self._store.devices(run)
            for peer in (peers.get(row["name"]),)
        ]


def _describe(checkpoint: Checkpoint) -> CheckpointFile | None:
    """None for one that was pruned meanwhile."""
    info, metrics = checkpoint.info, checkpoint.info.metrics
    try:
        size_bytes = checkpoint.path.stat().st_size
    except FileNotFoundError:
        return None
    return CheckpointFile(
        info.round,
        info.epoch,
        size_bytes,
        info.sha256,
        None if metrics is None else metrics.loss,
        None if metrics is None else _accuracy(metrics),
        0 if metrics is None else metrics.examples,
        0 if metrics is None else metrics.of_examples,
    )


def _accuracy(metrics: Metrics) -> float:
    return metrics.correct / max(metrics.scored, 1)
