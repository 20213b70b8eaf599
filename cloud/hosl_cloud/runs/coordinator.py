"""The course of a run: which round is due, what is stored before it is sent, what is evaluated and kept.

One Coordinator leads one run, in one task of the event loop (RunQueue in runs/queue.py, or the simulation). What costs
time it hands to one compute thread of its own, which alone touches the tail and the mirror of the devices' weights; so
nothing of theirs needs a lock, and work is done in the order in which it is handed over. The store is asked on other
threads.

The invariant that resuming rests on is in `_commit_round`: the mirror takes an update first, then the store, and only
then is it sent. A device must never hold an update that the store could lose.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np
import psutil

from hosl_cloud import metrics
from hosl_cloud.exceptions import RoundsFailedError
from hosl_cloud.rounds.algorithms import ROUNDS, RoundFunction
from hosl_cloud.rounds.anchors import RoundResult
from hosl_cloud.rounds.evaluation import evaluate
from hosl_cloud.rounds.exchange import CloudRound, Exchange, Fault, StatefulTrainer
from hosl_cloud.runs.admission import Admission, refuse_after_strikes
from hosl_cloud.runs.backlog import Backlog
from hosl_cloud.runs.checkpointer import Checkpointer
from hosl_cloud.runs.curves.tensorboard import TENSORBOARD_FOLDER, TensorBoardWriter
from hosl_cloud.runs.curves.trackers import Trackers, flat
from hosl_cloud.runs.fleet import Fleet
from hosl_cloud.runs.progress import Evaluated, Evaluates, Over, RoundBegins, RoundDone
from hosl_cloud.runs.run import Ending, Paused, Run
from hosl_cloud.runs.selection import DeviceSelection, keep_for
from hosl_cloud.runs.snapshots import Snapshots
from hosl_cloud.sentences import counted, figures_text, score_text
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.records import Evaluation, perplexity
from hosl_cloud.tail.checkpoint import load_checkpoint, read_client
from hosl_cloud.tail.trainer import TailTrainer
from hosl_protocol.program.logs import log_scope, note_place
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.messages import Refusal, Update
from hosl_protocol.wire.updates import update_tensors

log = logging.getLogger(__name__)

MAX_VOID_ROUNDS = 5
"""Void tries of one round after which the run fails; those during which a device left do not count."""

MakeTail: TypeAlias = Callable[[Path, Manifest, RunConfig], StatefulTrainer]
"""Loads a bundle's tail."""

Pace: TypeAlias = Callable[[], Awaitable[None]]
"""Awaited before each try of a round: whoever leads the run by hand holds it there."""

T = TypeVar("T")


async def at_once() -> None:
    """Hold nothing up."""


class Coordinator:
    """One run and the devices in it. All methods but `_compute`'s work run on the event loop."""

    def __init__(
        self,
        run: Run,
        say: Callable[[str], None],
        round_: RoundFunction | None = None,
        make_tail: MakeTail = TailTrainer,
        pace: Pace = at_once,
    ) -> None:
        """`say` tells a person how the run goes; `round_` stands for the algorithm's own round."""
        self.run, self.config, self.store, self.say = run, run.config, run.store, say
        self._make_tail, self._pace = make_tail, pace
        self.fleet = Fleet(self._compute, self._strike, run.bundle.name)
        self.snapshots = Snapshots(run, self._compute)
        self.admission = Admission(run, self.fleet, self._compute, self.snapshots, say)
        self.checkpointer = Checkpointer(run, self.fleet, self._compute, say)
        self.kept = keep_for(run, say)
        """None where nothing is kept."""
        self._selection = DeviceSelection(run, self.fleet, lambda: self._is_stopping, say, self.kept)
        self._backlog = Backlog(run, self.fleet)

        self._executor = ThreadPoolExecutor(1, "trainer")
        self._leaving = contextlib.ExitStack()
        self._round = round_ or ROUNDS[run.config.algorithm]
        self._attempts = itertools.count()
        """Numbers the starts of rounds and evaluations."""
        self._void_rounds = 0
        """Tries of a round in a row that were void though nobody left."""
        self._counted_bytes = 0
        self._is_checkpoint_due = False
        self._is_stopping = self._is_pausing = False

    async def prepare(self, checkpoint: Path | None = None) -> None:
        """Load the tail, as it is in `checkpoint` where the run goes on from one, and the mirror of the client's
        weights at the run's round."""
        run = self.run
        self.trainer = await self._compute(self._load_tail)
        state = None
        if checkpoint is not None:
            await self._compute(lambda: load_checkpoint(checkpoint, self.trainer))
            state = await self._compute(lambda: read_client(checkpoint, run.manifest))
        await self._compute(lambda: run.load(state))

        self._tensorboard = TensorBoardWriter(run.folder / TENSORBOARD_FOLDER, run.round + 1)
        facts = flat(msgspec.to_builtins(run.config)) | {"bundle": run.bundle.name, "model": run.manifest.model}
        self._trackers = Trackers(run.config.tracking, run.id, facts, run.folder)
        # Whatever ends the run, an error too; nothing where its end has closed them.
        self._leaving.callback(lambda: self._close_curves(has_failed=True))
        for evaluation in await asyncio.to_thread(self.store.evaluations, run.id):
            self.checkpointer.note(evaluation)

    def _close_curves(self, *, has_failed: bool = False) -> None:
        """Write what is left of the curves. Slow, off the event loop."""
        self._tensorboard.close()
        self._trackers.close(has_failed)

    def _draw(self, round_: int, figures: Mapping[str, float]) -> None:
        """Add figures to the curves. Slow, off the event loop."""
        self._trackers.add(round_, figures)
        self._tensorboard.add(round_, figures)

    def _load_tail(self) -> StatefulTrainer:
        run = self.run
        trainer = self._make_tail(run.bundle, run.manifest, run.config)
        self._leaving.callback(trainer.close)
        return trainer

    async def _compute(self, work: Callable[[], T]) -> T:
        """Run on the one thread that owns the tail and the mirror."""
        # In a copy of this task's context, so that log lines of that thread name the run and the round, too.
        return await asyncio.get_running_loop().run_in_executor(self._executor, copy_context().run, work)

    def close(self) -> None:
        """Stop the compute thread after what it does now, and let the tail go."""
        # On its own thread, behind all work: a step that was cut off may still be under way there.
        if self.kept is not None:
            self._leaving.callback(self.kept.close)
        self._executor.submit(self._leaving.close)
        self._executor.shutdown(wait=False)

    async def request_stop(self, *, pause: bool = False) -> None:
        """End the run after the round that is under way, or `pause` it, so that a later service goes on with it."""
        self._is_stopping, self._is_pausing = True, pause
        await self.fleet.notify()

    async def train(self) -> Ending | Paused:
        """Train all rounds, with their evaluations. Raises NoDevicesError, RoundsFailedError, LatticeError."""
        run, rounds = self.run, self.config.rounds
        self._selection.roster = await asyncio.to_thread(self.store.roster, run.id)
        await self._selection.find_kept(self._compute)
        if run.round == 0:
            await self._begin()
        await self._set_state("running")

        # Where a run resumes, the service may have stopped between a round and its evaluation.
        if run.round and self._is_evaluation_due():
            if not await self._is_evaluated():
                await self._selection.wait_for_quorum()
                await self._evaluate()
            if self.checkpointer.is_out_of_patience:
                return await self._finish("stopped-early")

        while run.round < rounds and not self._is_stopping:
            await self._pace()
            if not await self._train_round():
                continue
            if self._is_evaluation_due():
                await self._evaluate()
                if self.checkpointer.is_out_of_patience:
                    return await self._finish("stopped-early")
            if self._is_checkpoint_due or self.checkpointer.is_due:
                await self.checkpointer.save(self.trainer)
                self._is_checkpoint_due = False

        if run.round == rounds and (not self._is_pausing or await self._is_evaluated()):
            return await self._finish("completed")
        return await self._pause() if self._is_pausing else await self._finish("stopped")

    async def _begin(self) -> None:
        """Wait for the devices to start with, and measure where the run begins."""
        await self._set_state("pending")
        selection, devices = self._selection, self.config.devices
        enough = max(devices.start_with, devices.quorum, len(selection.roster))
        await selection.wait_for_devices(enough, timeout_s=None)

        # Stored before the first round: a service that goes on with a strict run must wait for the same devices.
        if not selection.roster and not self._is_stopping:
            selection.roster = selection.present()
            await self.checkpointer.durably(lambda: self.store.set_roster(self.run.id, selection.roster))
        if not self._is_stopping:
            await (self._evaluate() if self.config.evaluation.start else self.checkpointer.save(self.trainer))

    async def _pause(self) -> Paused:
        """Leave everything so that a later service goes on with this round."""
        await self.checkpointer.save(self.trainer)
        await self.pause()
        return "paused"

    async def pause(self) -> None:
        """Tell every device to come back, and the store."""
        await asyncio.to_thread(self._close_curves)
        for peer in list(self.fleet.peers.values()):
            peer.end(Refusal(code="run", reason="the service stops; the run goes on when it is back", retry=True))
        await self._set_state("paused")
        self.run.tell(Over(self.run.id, self.run.round, "paused"))

    async def _set_state(self, state: str) -> None:
        # Not on the compute thread: a round that was cut off may still be under way there.
        await self.checkpointer.durably(lambda: self.store.set_state(self.run.id, state), asyncio.to_thread)

    async def _train_round(self) -> bool:
        """Try one round; False where it was void (see rounds/algorithms.py), a device that was chosen has to come back
        first, or the run is to stop."""
        devices = await self._selection.for_round()
        if self._is_stopping or not await self._backlog.clear(devices):
            return False

        began = time.monotonic()
        note_place(round=self.run.round + 1)
        self.run.tell(RoundBegins(self.run.id, self.run.round + 1, self.config.rounds))
        context = self._context(self.run.round + 1, devices)
        result = await self._drive(self._round(context))
        if result is None:
            self._count_void(context)
            return False

        self._void_rounds = 0
        await self._commit_round(result, devices, time.monotonic() - began)
        return True

    def _count_void(self, context: CloudRound) -> None:
        """Count a void round. Raises RoundsFailedError where round after round was void though nobody left."""
        self.say(f"round {context.round} came to nothing; it starts again")
        if set(context.devices) <= set(self._selection.present()):
            self._void_rounds += 1
        if self._void_rounds >= MAX_VOID_ROUNDS:
            raise RoundsFailedError(self.run.id, context.round, self._void_rounds)

    async def _commit_round(self, result: RoundResult, devices: list[str], seconds: float) -> None:
        """Apply a round's update to the mirror, store it, and send it to the devices: in this order.

        A gradient is sent to `devices` alone, which were asked for the round; the others' backlog has it.
        """
        # The mirror refuses weights that diverge; then nothing is stored or sent.
        update = self._bounded(result.update)
        known = len(self.run.mirror.coarsenings)
        await self._compute(lambda: self.run.apply(update))

        # What is sent from here on, a service that is killed can replay.
        wire_bytes = self._count_bytes()
        kept = self.run.kept_updates
        pruned = 0 if kept is None else max(update.round - kept, 0)
        await self._backlog.rescue(pruned)
        await self.checkpointer.durably(
            lambda: self.store.add_round(
                self.run.id,
                self.run.epoch,
                update,
                seconds=seconds,
                loss=result.loss,
                devices=result.devices,
                wire_bytes=wire_bytes,
                pruned=pruned,
            )
        )
        self.run.pruned_to = max(pruned, self.run.pruned_to)

        # From here on admission brings a joining device up to this round, from the store; ready ones get the broadcast.
        self.run.round = update.round
        if self.run.round % self.config.report_every == 0 or self.run.round == self.config.rounds:
            await self._compute(self.run.note_digest)
        message = Update(run=self.run.id, epoch=self.run.epoch, round=update.round, learning_rate=update.learning_rate)
        tensors = update_tensors(update, result.loss)
        if self.run.layout is None:
            self.fleet.broadcast(message, tensors)
        else:
            ready = set(self.fleet.ready_names())
            self.fleet.send_update([self.fleet.peers[name] for name in devices if name in ready], message, tensors)

        await self._report_round(result, seconds, wire_bytes)
        for event in self.run.mirror.coarsenings[known:]:
            self.say(f"round {event.round}: {event.tensor} outgrew its lattice, its steps are now {event.spacing:.2g}")
            # The event can't be taken back: a run that resumes must not begin before it.
            self._is_checkpoint_due = True

    def _count_bytes(self) -> int:
        """Bytes on the wire since the last call."""
        before, self._counted_bytes = self._counted_bytes, self.fleet.tally.wire_bytes
        return self._counted_bytes - before

    def _bounded(self, update: UpdateRecord) -> UpdateRecord:
        """The update, or one of zeros where its numbers overflow."""
        if np.isfinite(update.coefficients).all():
            return update
        log.error("round %d: the update is not finite; the devices' weights stay as they are", update.round)
        return dataclasses.replace(update, coefficients=np.zeros_like(update.coefficients))

    async def _report_round(self, result: RoundResult, seconds: float, wire_bytes: int) -> None:
        """Tell Prometheus, a person and TensorBoard of a finished round."""
        bundle, run = self.run.bundle.name, self.run
        metrics.rounds.labels(bundle).inc()
        metrics.round_seconds.labels(bundle).observe(seconds)
        metrics.train_loss.labels(bundle).set(result.loss)

        devices = len(result.devices)
        run.tell(RoundDone(run.id, run.round, self.config.rounds, result.loss, seconds, devices, wire_bytes))
        if run.round % self.config.report_every == 0 or run.round in (1, self.config.rounds):
            # A display has drawn the figures of all rounds but the last, which are to stay.
            with log_scope(is_figure=run.round < self.config.rounds):
                who = counted(devices, "device")
                self.say(f"round {run.round}/{self.config.rounds}: loss {result.loss:.4f}, {seconds:.2f} s, {who}")

        figures = {
            "train/loss": result.loss,
            "round/seconds": seconds,
            "round/wire_bytes": wire_bytes,
            "round/devices": devices,
            "service/memory_mib": psutil.Process().memory_info().rss / 2**20,
        }
        await self._compute(lambda: self._draw(result.update.round, figures))

    def _context(self, round_: int, devices: list[str]) -> CloudRound:
        """Number another attempt: answers to a former one are told apart by it, and are late."""
        attempt = next(self._attempts)
        run = self.run
        self._selection.note_data()
        return CloudRound(run.id, run.epoch, round_, self.config, self.trainer, devices, attempt, run.layout, self.kept)

    async def _drive(self, exchange: Exchange[T], deadline_s: float = math.inf) -> T:
        """Run a round or an evaluation with the run's deadlines."""
        if self.config.strict:  # its bits must not depend on how fast a device is
            return await self.fleet.drive(exchange, math.inf)
        return await self.fleet.drive(exchange, self.config.devices.round_deadline_s, deadline_s)

    async def _strike(self, fault: Fault) -> None:
        """Count a fault against its device, and end its part in the run where there were too many."""
        extra = {"device": fault.device}
        log.warning("round %d: device %s sent %s", self.run.round + 1, fault.device, fault.reason, extra=extra)
        metrics.faults.inc()
        strikes = await self.checkpointer.durably(lambda: self.store.add_strike(self.run.id, fault.device))
        refusal = refuse_after_strikes(strikes, self.config.devices.strikes)
        peer = self.fleet.peers.get(fault.device)
        if refusal is not None and self.kept is not None:
            self.kept.set_aside(fault.device)
        if refusal is not None and peer is not None:
            self.say(f"device {fault.device} is put aside after {strikes} faults, the last: {fault.reason}")
            peer.is_ready = False
            peer.end(refusal)

    async def _evaluate(self) -> None:
        """Score the devices' held-out data, store and report the score, and save a checkpoint beside it."""
        evaluation = await self._score()
        if evaluation is None:
            await self.checkpointer.save(self.trainer)
            return
        await self.checkpointer.durably(lambda: self.store.add_evaluation(self.run.id, self.run.epoch, evaluation))

        self.run.tell(Evaluated(self.run.id, evaluation))
        await self._report_evaluation(evaluation)
        self.checkpointer.note(evaluation)
        await self.checkpointer.save(self.trainer, evaluation)

    async def _report_evaluation(self, evaluation: Evaluation) -> None:
        """Tell Prometheus, TensorBoard and a person of an evaluation."""
        task = self.config.task
        perplexity_ = perplexity(evaluation.loss, task.kind)
        by_class = evaluation.by_class
        recall = {} if by_class is None else dict(zip(task.labels, by_class.recall_K.tolist(), strict=True))
        metrics.note_evaluation(
            self.run.bundle.name,
            accuracy=evaluation.accuracy,
            right=evaluation.correct,
            scored=evaluation.scored,
            macro_f1=evaluation.macro_f1,
            perplexity=perplexity_,
            accuracy_of={name: share for name, share in recall.items() if not math.isnan(share)},
        )

        figures = {
            "eval/accuracy": evaluation.accuracy,
            "eval/right": evaluation.correct,
            "eval/scored": evaluation.scored,
            "eval/loss": evaluation.loss,
            "eval/macro_f1": evaluation.macro_f1,
            "eval/perplexity": perplexity_,
        }
        known = {name: value for name, value in figures.items() if value is not None}
        await self._compute(lambda: self._draw(self.run.round, known))

        score = score_text(evaluation.correct, evaluation.scored, evaluation.examples, evaluation.of_examples)
        more = figures_text(evaluation.macro_f1, perplexity_)
        self.say(f"evaluation at round {self.run.round}: accuracy {score}, loss {evaluation.loss:.4f}{more}")

    def _is_evaluation_due(self) -> bool:
        every, round_ = self.config.evaluation.every, self.run.round
        return round_ == self.config.rounds or (bool(every) and round_ % every == 0)

    async def _is_evaluated(self) -> bool:
        newest = await asyncio.to_thread(self.store.evaluations, self.run.id, 1)
        return any(evaluation.round == self.run.round for evaluation in newest)

    async def _score(self) -> Evaluation | None:
        """Score the devices' held-out data; a strict run asks all its devices until they have all answered."""
        while True:
            devices = await self._selection.for_evaluation()
            if not devices or self._is_stopping:
                return None
            # Before the await: one that leaves meanwhile is no longer among the fleet's.
            ready = set(self.fleet.ready_names())
            peers = [self.fleet.peers[name] for name in devices if name in ready]
            await self._backlog.clear(devices)

            self.run.tell(Evaluates(self.run.id, self.run.round))
            examples = await self._selection.held_out_examples(peers)
            digests = {peer.name: peer.eval_digest for peer in peers}
            for name, holding in self._selection.away(set(devices) - digests.keys()).items():
                examples[name], digests[name] = holding.eval_examples, holding.eval_digest
            context = self._context(self.run.round, devices)
            scored = await self._drive(evaluate(context, examples, digests), self.config.evaluation.deadline_s)
            self._selection.note_unfinished(devices, scored.unfinished)

            # One that has come back since it left has not answered everything, nor has one whose kept data are damaged.
            lacking = scored.unfinished - {peer.name for peer in peers}
            if self.kept is not None:
                lacking -= self.kept.evaluation_names()
            if not self.config.strict or not (lacking or any(peer.gone.is_set() for peer in peers)):
                return scored.evaluation

    async def _finish(self, ending: Ending) -> Ending:
        await self.checkpointer.save(self.trainer)
        # A run that is stopped ends at once; whoever is behind may catch up when it goes on.
        await self._backlog.clear(self.fleet.ready_names(), may_leave=ending != "stopped")
        if ending != "stopped" and (awaited := self._backlog.awaited):
            await self._selection.wait_for_return(awaited)
        await self.end(ending)
        return ending

    async def end(self, ending: Ending) -> None:
        """Tell every device, and then the store: a service that is cut off before goes on with the run, and ends it."""
        # First, so that a device that joins from here on is told the end by admission.
        self.run.ending = ending
        await asyncio.to_thread(lambda: self._close_curves(has_failed=ending == "failed"))
        await self._await_reports()
        # Those that are about to join first catch up: admission tells them.
        for name in self.fleet.ready_names():
            self.admission.complete(self.fleet.peers[name])
        await self._set_state("completed" if ending == "stopped-early" else ending)
        self.run.tell(Over(self.run.id, self.run.round, ending))

    async def _await_reports(self) -> None:
        """Give devices a moment to report on the last round; their figures are the run's record."""
        # At most five seconds: a device that is gone, or does not report, must not hold the end up.
        ready = set(self.fleet.ready_names())
        for _ in range(50):
            behind = [
                row
                for row in await asyncio.to_thread(self.store.devices, self.run.id)
                if row["name"] in ready and row["applied_round"] < self.run.round
            ]

            if not behind or self.run.ending != "completed":
                return
            await asyncio.sleep(0.1)
