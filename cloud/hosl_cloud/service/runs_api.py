"""The admin's HTTP API: runs, their figures, logs and checkpoints. The commands and the status page use it.

Handlers run on the event loop. What they tell of a run comes from the store, which is asked on another thread, and from
what the loop alone may look at (`_live`), which is taken before and handed over.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import msgspec

from hosl_cloud import metrics
from hosl_cloud.exceptions import ApiError
from hosl_cloud.runs.queue import RunQueue
from hosl_cloud.runs.run_status import (
    LiveState,
    ReturningDevices,
    RunStatus,
    RunSummary,
    WaitsFor,
    list_runs,
    run_status,
)
from hosl_cloud.service.openapi import Call, Operation, Query
from hosl_cloud.settings import override_config, parse_config
from hosl_cloud.storage.evaluations import (
    EvaluationDetail,
    EvaluationFigures,
    list_evaluations,
    show_evaluation,
)
from hosl_cloud.storage.records import perplexity
from hosl_cloud.tail.checkpoint import Checkpoint, best_checkpoint, list_checkpoints
from hosl_protocol.run.manifest import MANIFEST, load_manifest

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
    set: list[str] = []
    """Settings over those, each as KEY=VALUE: `tail.learning_rate=1e-4`."""


class RunList(msgspec.Struct, frozen=True):
    """All runs, oldest first."""

    runs: list[RunSummary]


class RoundFigures(msgspec.Struct, frozen=True):
    """A finished round."""

    round: int
    loss: float
    seconds: float
    wire_bytes: int
    """On the wire, both ways, since the round before."""
    finished_at: float
    """Unix time."""


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
    """Of all devices of the run, those that are away too."""
    right: int
    scored: int
    """Right predictions, and all of them; 0 where it was not evaluated."""
    correct: int
    """The same as `right`, by its former name."""
    perplexity: float | None
    """Of a language model that was evaluated."""
    macro_f1: float | None
    """Of a task with classes that was evaluated."""
    is_best: bool
    """Whether it is the best by evaluation, of those with which it can be compared."""


class CheckpointList(msgspec.Struct, frozen=True):
    """A run's checkpoints, oldest first."""

    checkpoints: list[CheckpointFile]


class Draining(msgspec.Struct, frozen=True):
    """The service pauses its runs, and leaves."""

    runs: list[str]


class RunsApi:
    """Handles the operations on runs."""

    def __init__(self, runs: RunQueue, bundles: Path, drain: asyncio.Event) -> None:
        """`bundles` is the folder that bundles of new runs are in; `drain` tells the service to leave."""
        self._runs, self._store = runs, runs.store
        self._bundles, self._drain = bundles, drain
        self._stopping: set[asyncio.Task[None]] = set()

    def operations(self) -> list[Operation]:
        """List the operations on runs."""
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
            Operation(
                "GET",
                f"{run}/evaluations/{{round}}",
                "An evaluation, class by class.",
                self._evaluation,
                EvaluationDetail,
            ),
            Operation("GET", f"{run}/log", "What was said about a run.", self._log, Log, queries=(AFTER, MOST)),
            Operation("GET", f"{run}/checkpoints", "The tail's checkpoints.", self._checkpoints, CheckpointList),
            Operation("GET", f"{run}/checkpoints/{{round}}", "A checkpoint's safetensors file.", self._checkpoint),
            Operation("POST", "/v1/drain", "Pause all runs, and leave.", self._leave, Draining, status=202),
        ]

    async def _list(self, call: Call) -> RunList:
        lives = {current.run: self._live(current.run) for current in self._runs.current.all()}
        return RunList(await asyncio.to_thread(list_runs, self._store, lives, self._runs.state()))

    async def _start(self, call: Call) -> RunStatus:
        new: NewRun = call.body
        # Resolved before it is compared: `..` and links must not lead out of the folder.
        bundle = (self._bundles / new.bundle).resolve()
        if not bundle.is_relative_to(self._bundles.resolve()) or not (bundle / MANIFEST).is_file():
            reason = f"no bundle of this name is in {self._bundles}: put it there with hosl-cloud bundle add"
            raise ApiError(404, f"bundle is {new.bundle[:200]!r}: {reason}")
        manifest = await asyncio.to_thread(load_manifest, bundle)
        override_config(new.config, new.set, "set")
        config = parse_config(new.config, manifest, "config")
        if config.baseline:
            raise ApiError(422, f"baseline is {config.baseline!r}: baselines are for hosl-cloud simulate: remove it")
        return await self._status(await self._runs.submit(bundle, config))

    async def _show(self, call: Call) -> RunStatus:
        return await self._status(call.path["run"])

    async def _remove(self, call: Call) -> None:
        await self._runs.remove(call.path["run"])

    async def _stop(self, call: Call) -> RunStatus:
        # A task of its own: the answer does not wait for a long round, and the run still ends after it.
        stopping = asyncio.create_task(self._runs.stop(call.path["run"]))
        self._stopping.add(stopping)  # the event loop alone would let it be collected
        stopping.add_done_callback(self._stopping.discard)
        done, _ = await asyncio.wait({stopping}, timeout=STOP_WAIT_S)
        for task in done:
            task.result()
        return await self._status(call.path["run"])

    async def _resume(self, call: Call) -> RunStatus:
        await self._runs.resume(call.path["run"])
        return await self._status(call.path["run"])

    async def _history(self, call: Call) -> History:
        run, after = call.path["run"], call.query["after"]
        await asyncio.to_thread(self._store.run, run)
        rounds = await asyncio.to_thread(self._store.rounds, run, after, call.query["most"])
        return History(
            [RoundFigures(r.round, r.loss, r.seconds, r.wire_bytes, r.finished_at) for r in rounds],
            await asyncio.to_thread(list_evaluations, self._store, run, after),
        )

    async def _evaluation(self, call: Call) -> EvaluationDetail:
        run, round_ = call.path["run"], call.path["round"]
        is_number = re.fullmatch(r"[0-9]{1,15}", round_) is not None
        found = await asyncio.to_thread(show_evaluation, self._store, run, int(round_) if is_number else -1)
        if found is None:
            raise ApiError(404, f"no evaluation of round {round_[:20]!r}; /v1/runs/{run}/history lists them")
        return found

    async def _log(self, call: Call) -> Log:
        run = call.path["run"]
        await asyncio.to_thread(self._store.run, run)  # raises RunNotFound
        await asyncio.to_thread(self._runs.events.flush)  # what was said is in the answer
        events = await asyncio.to_thread(self._store.events, run, call.query["after"], call.query["most"])
        return Log([Event(e.id, e.at, e.level, e.text) for e in events])

    async def _checkpoints(self, call: Call) -> CheckpointList:
        return CheckpointList(await asyncio.to_thread(describe_checkpoints, await self._folder(call)))

    async def _checkpoint(self, call: Call) -> Path:
        round_, found = call.path["round"], await asyncio.to_thread(list_checkpoints, await self._folder(call))
        # The newest epoch's: an older one of the same round may be of rounds that were dropped.
        for checkpoint in reversed(found):
            if str(checkpoint.info.round) == round_:
                return checkpoint.path
        known = ", ".join(str(checkpoint.info.round) for checkpoint in found) or "none"
        raise ApiError(404, f"no checkpoint of round {round_[:20]!r}; there are: {known}")

    async def _leave(self, call: Call) -> Draining:
        self._drain.set()
        return Draining([current.run for current in self._runs.current.under_way()])

    async def _folder(self, call: Call) -> Path:
        return self._runs.folder((await asyncio.to_thread(self._store.run, call.path["run"])).id)

    def _live(self, run: str) -> LiveState:
        """Take what only the event loop may look at, of a run under way, or over since this service began."""
        current = self._runs.current.of_run(run)
        if current is None or current.coordinator is None:
            return LiveState()

        fleet = current.coordinator.fleet
        ready, waiting = fleet.ready_names(), fleet.waiting
        waits_for = None
        if waiting is not None:
            is_named = waiting.what == "devices"
            devices = tuple(name for name in waiting.devices if not (is_named and name in ready))
            count = sum(name in ready for name in waiting.devices) if is_named and waiting.devices else len(ready)
            waits_for = WaitsFor(waiting.what, devices, waiting.since, count if is_named else 0, waiting.needed)
        heard_at = {peer.name: peer.heard_at for peer in fleet.peers.values()}
        kept = current.coordinator.kept
        return LiveState(frozenset(ready), heard_at, waits_for, {} if kept is None else kept.by_device())

    async def _status(self, run: str) -> RunStatus:
        returning = ReturningDevices(self._runs.retries.count(), self._runs.retries.within_s())
        more = self._live(run), self._runs.state(), returning, metrics.wire_bytes_by_kind()
        return await asyncio.to_thread(run_status, self._store, run, *more)


def describe_checkpoints(folder: Path) -> list[CheckpointFile]:
    """Describe a run's checkpoints, oldest first. Slow, off the event loop."""
    checkpoints = list_checkpoints(folder)
    best = best_checkpoint(checkpoints)
    described = [_describe(each, is_best=each is best) for each in checkpoints]
    return [each for each in described if each is not None]


def _describe(checkpoint: Checkpoint, *, is_best: bool) -> CheckpointFile | None:
    """Describe a checkpoint; None for one that was pruned meanwhile."""
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
        None if metrics is None else metrics.correct / max(metrics.scored, 1),
        0 if metrics is None else metrics.examples,
        0 if metrics is None else metrics.of_examples,
        0 if metrics is None else metrics.correct,
        0 if metrics is None else metrics.scored,
        0 if metrics is None else metrics.correct,
        None if metrics is None else perplexity(metrics.loss, info.config.task.kind),
        None if metrics is None else metrics.macro_f1,
        is_best,
    )
