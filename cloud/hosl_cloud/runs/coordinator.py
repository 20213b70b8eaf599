"""The course of a run: which round is due, what is stored before it is sent, what is evaluated and kept."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

from hosl_cloud import metrics
from hosl_cloud.exceptions import NoDevicesError, RoundsFailedError
from hosl_cloud.rounds.algorithms import ROUNDS, Outcome, RoundFunction
from hosl_cloud.rounds.evaluation import evaluate
from hosl_cloud.rounds.exchange import Exchange, Fault, RoundContext, TailHolder
from hosl_cloud.runs.admission import Admission, aside
from hosl_cloud.runs.fleet import Fleet
from hosl_cloud.runs.keeper import Keeper
from hosl_cloud.runs.run import Ending, Paused, Run
from hosl_cloud.runs.snapshots import Snapshots
from hosl_cloud.runs.tensorboard import CURVES, Curves
from hosl_cloud.sentences import score_text
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.records import Evaluation
from hosl_cloud.tail.checkpoint import load_checkpoint
from hosl_cloud.tail.trainer import TailTrainer
from hosl_protocol.program.logs import note_place
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.ordering import sample_devices
from hosl_protocol.weights.client_weights import UpdateRecord
from hosl_protocol.wire.messages import Refusal, Update

log = logging.getLogger(__name__)

MAX_FRUITLESS = 5
"""Tries of one round after which the run fails."""

MakeTail: TypeAlias = Callable[[Path, Manifest, RunConfig], TailHolder]
"""Loads a bundle's tail."""

T = TypeVar("T")


class Coordinator:
    """One run and the devices in it. All methods but `_compute`'s work run on the event loop."""

    def __init__(
        self,
        run: Run,
        say: Callable[[str], None],
        round_: RoundFunction | None = None,
        make_tail: MakeTail = TailTrainer,
    ) -> None:
        """`say` tells a person how the run goes; `round_` stands for the algorithm's own round."""
        self.run, self.config, self.store, self.say = run, run.config, run.store, say
        self._make_tail = make_tail
        self.fleet = Fleet(self._compute, self._strike, run.bundle.name)
        self.snapshots = Snapshots(run, self._compute)
        self.admission = Admission(run, self.fleet, self._compute, self.snapshots, say)
        self.keeper = Keeper(run, self.fleet, self._compute, say)
        self._executor = ThreadPoolExecutor(1, "trainer")
        self._leaving = contextlib.ExitStack()
        self._round = round_ or ROUNDS[run.config.algorithm]
        self._roster: list[str] = []
        """Who was there at the start: the devices of a strict run."""
        self._attempts = itertools.count()
        """Numbers the starts of rounds and evaluations."""
        self._fruitless = 0
        """Tries of a round in a row that came to nothing."""
        self._unfinished: Counter[str] = Counter()
        """Evaluations in a row for which devices did not send all their data."""
        self._counted_bytes = 0
        self._is_checkpoint_due = False
        self._is_stopping = self._is_pausing = False

    async def prepare(self, checkpoint: Path | None = None) -> None:
        """Load the tail, as it is in `checkpoint` where the run goes on from one, and the mirror of the client's
        weights at the run's round."""
        run = self.run
        self.trainer = await self._compute(self._load_tail)
        if checkpoint is not None:
            await self._compute(lambda: load_checkpoint(checkpoint, self.trainer))
        await self._compute(run.load)
        self._curves = Curves(run.folder / CURVES, run.round + 1)
        for evaluation in await asyncio.to_thread(self.store.evaluations, run.id):
            self.keeper.note(evaluation)

    def _load_tail(self) -> TailHolder:
        run = self.run
        trainer = self._make_tail(run.bundle, run.manifest, run.config)
        self._leaving.callback(trainer.close)
        return trainer

    async def _compute(self, work: Callable[[], T]) -> T:
        """Run on the one thread that owns the tail and the mirror."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, copy_context().run, work)

    def close(self) -> None:
        """Stop the compute thread after what it does now, and let the tail go."""
        self._executor.submit(self._leaving.close)
        self._executor.shutdown(wait=False)

    async def request_stop(self, *, pause: bool = False) -> None:
        """End the run after the round that is under way, or `pause` it, so that a later service goes on with it."""
        self._is_stopping, self._is_pausing = True, pause
        await self.fleet.notify()

    async def train(self) -> Ending | Paused:
        """All rounds and evaluations to the end. Raises NoDevicesError, RoundsFailedError, LatticeError."""
        run, rounds = self.run, self.config.rounds
        self._roster = await asyncio.to_thread(self.store.roster, run.id)
        if run.round == 0:
            await self._begin()
        await self._set_state("running")
        if run.round and self._is_evaluation_due():
            if not await self._is_evaluated():  # the service stopped before it could
                await self._wait_for_quorum()
                await self._evaluate()
            if self.keeper.is_overdue:
                return await self._finish("stopped-early")
        while run.round < rounds and not self._is_stopping:
            if not await self._train_round():
                continue
            if self._is_evaluation_due():
                await self._evaluate()
                if self.keeper.is_overdue:
                    return await self._finish("stopped-early")
            if self._is_checkpoint_due or self.keeper.is_due:
                await self.keeper.keep(self.trainer)
                self._is_checkpoint_due = False
        if run.round == rounds and (not self._is_pausing or await self._is_evaluated()):
            return await self._finish("completed")
        return await self._pause() if self._is_pausing else await self._finish("stopped")

    async def _begin(self) -> None:
        """Wait for the devices to start with, and measure where the run begins."""
        await self._set_state("pending")
        enough = max(self.config.devices.start_with, self.config.devices.quorum, len(self._roster))
        await self._wait_for_devices(enough, timeout_s=None)
        if not self._roster and not self._is_stopping:
            self._roster = self.fleet.ready_names()
            await self.keeper.durably(lambda: self.store.set_roster(self.run.id, self._roster))
        if not self._is_stopping:
            await (self._evaluate() if self.config.evaluation.start else self.keeper.keep(self.trainer))

    async def _pause(self) -> Paused:
        """Leave everything so that a later service goes on with this round."""
        await self.keeper.keep(self.trainer)
        await self.pause()
        return "paused"

    async def pause(self) -> None:
        """Tell every device to come back, and the store."""
        await asyncio.to_thread(self._curves.close)
        for peer in list(self.fleet.peers.values()):
            peer.end(Refusal(code="run", reason="the service stops; the run goes on when it is back", retry=True))
        await self._set_state("paused")

    async def _set_state(self, state: str) -> None:
        # Not on the compute thread: a round that was cut off may still be under way there.
        await self.keeper.durably(lambda: self.store.set_state(self.run.id, state), asyncio.to_thread)

    async def _wait_for_devices(self, count: int, timeout_s: float | None) -> None:
        """Wait for so many, whoever they are. Raises TimeoutError."""
        ready = self.fleet.ready_names()
        if len(ready) < count and not self._is_stopping:
            self.say(f"waits for devices: {len(ready)} of {count} are there")

        def is_time() -> bool:
            return self._is_stopping or len(self.fleet.ready_names()) >= count

        await self.fleet.wait_until(is_time, timeout_s, count)

    async def _wait_for_these(self, devices: Collection[str]) -> None:
        """Wait for the devices of a strict run, however long it takes."""
        absent = sorted(set(devices) - set(self.fleet.ready_names()))
        if absent and not self._is_stopping:
            self.say(f"waits for devices: {', '.join(absent)}")
        await self.fleet.wait_until(
            lambda: self._is_stopping or self._is_complete(devices), None, len(devices), devices
        )

    async def _train_round(self) -> bool:
        """One round; False where it came to nothing, or the run is to stop."""
        devices = await self._gather()
        if self._is_stopping:
            return False
        began = time.monotonic()
        note_place(round=self.run.round + 1)
        context = self._context(self.run.round + 1, devices)
        outcome = await self._drive(self._round(context))
        if outcome is None:
            self._count_fruitless(context)
            return False
        self._fruitless = 0
        await self._settle(outcome, time.monotonic() - began)
        return True

    async def _gather(self) -> list[str]:
        """Who takes part in the next round, once they are there. Raises NoDevicesError."""
        devices, round_ = self.config.devices, self.run.round + 1
        if self.config.strict:
            chosen = sample_devices(self.config.seed, round_, self._roster, devices.per_round)
            await self._wait_for_these(chosen)
            return chosen
        await self._wait_for_quorum()
        return sample_devices(self.config.seed, round_, self.fleet.ready_names(), devices.per_round)

    async def _wait_for_quorum(self) -> None:
        """Wait for as many devices as a round needs. Raises NoDevicesError."""
        limit_s, quorum = self.config.devices.rejoin_deadline_s, self.config.devices.quorum
        try:
            await self._wait_for_devices(quorum, timeout_s=limit_s)
        except asyncio.TimeoutError:
            present = len(self.fleet.ready_names())
            raise NoDevicesError(self.run.id, self.run.round, limit_s, present, quorum) from None

    def _count_fruitless(self, context: RoundContext) -> None:
        """Raise RoundsFailedError where round after round failed though nobody left."""
        self.say(f"round {context.round} came to nothing; it starts again")
        if set(context.devices) <= set(self.fleet.ready_names()):
            self._fruitless += 1
        if self._fruitless >= MAX_FRUITLESS:
            raise RoundsFailedError(self.run.id, context.round, self._fruitless)

    async def _settle(self, outcome: Outcome, seconds: float) -> None:
        """Store, mirror, broadcast: in this order."""
        update = self._bounded(outcome.update)
        # The mirror refuses weights that diverge; then nothing is stored or sent.
        known = len(self.run.mirror.coarsenings)
        await self._compute(lambda: self.run.apply(update))
        wire_bytes = self._count_bytes()
        await self.keeper.durably(
            lambda: self.store.add_round(
                self.run.id,
                self.run.epoch,
                update,
                seconds=seconds,
                loss=outcome.loss,
                devices=outcome.devices,
                wire_bytes=wire_bytes,
            )
        )
        self.run.round = update.round
        if self.run.round % self.config.report_every == 0 or self.run.round == self.config.rounds:
            await self._compute(self.run.note_digest)
        message = Update(run=self.run.id, epoch=self.run.epoch, round=update.round, learning_rate=update.learning_rate)
        tensors = {"coefficients": update.coefficients, "loss": np.float32(outcome.loss).reshape(())}
        self.fleet.broadcast(message, tensors)
        self._observe(outcome, seconds)
        figures = {
            "train/loss": outcome.loss,
            "round/seconds": seconds,
            "round/wire_bytes": wire_bytes,
            "round/devices": len(outcome.devices),
        }
        await self._compute(lambda: self._curves.add(update.round, figures))
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
        return UpdateRecord(update.round, np.zeros_like(update.coefficients), update.learning_rate)

    def _observe(self, outcome: Outcome, seconds: float) -> None:
        bundle = self.run.bundle.name
        metrics.rounds.labels(bundle).inc()
        metrics.round_seconds.labels(bundle).observe(seconds)
        metrics.train_loss.labels(bundle).set(outcome.loss)
        if self.run.round % self.config.report_every == 0 or self.run.round in (1, self.config.rounds):
            self.say(
                f"round {self.run.round}/{self.config.rounds}: loss {outcome.loss:.4f}, {seconds:.2f} s, "
                f"{len(outcome.devices)} device{'s' if len(outcome.devices) != 1 else ''}"
            )

    def _context(self, round_: int, devices: list[str]) -> RoundContext:
        attempt = next(self._attempts)
        return RoundContext(self.run.id, self.run.epoch, round_, self.config, self.trainer, devices, attempt)

    async def _drive(self, exchange: Exchange[T], deadline_s: float = math.inf) -> T:
        if self.config.strict:
            return await self.fleet.drive(exchange, math.inf)
        return await self.fleet.drive(exchange, self.config.devices.round_deadline_s, deadline_s)

    async def _strike(self, fault: Fault) -> None:
        """Count a fault against its device, and put it aside where there were too many."""
        extra = {"device": fault.device}
        log.warning("round %d: device %s sent %s", self.run.round + 1, fault.device, fault.reason, extra=extra)
        metrics.faults.inc()
        strikes = await self.keeper.durably(lambda: self.store.add_strike(self.run.id, fault.device))
        refusal, peer = aside(strikes, self.config.devices.strikes), self.fleet.peers.get(fault.device)
        if refusal is not None and peer is not None:
            self.say(f"device {fault.device} is put aside after {strikes} faults, the last: {fault.reason}")
            peer.is_ready = False
            peer.end(refusal)

    async def _evaluate(self) -> None:
        evaluation = await self._score()
        if evaluation is None:
            await self.keeper.keep(self.trainer)
            return
        await self.keeper.durably(lambda: self.store.add_evaluation(self.run.id, self.run.epoch, evaluation))
        metrics.eval_accuracy.labels(self.run.bundle.name).set(evaluation.accuracy)
        figures = {"eval/accuracy": evaluation.accuracy, "eval/loss": evaluation.loss}
        await self._compute(lambda: self._curves.add(self.run.round, figures))
        score = score_text(evaluation.correct, evaluation.scored, evaluation.examples, evaluation.of_examples)
        self.say(f"evaluation at round {self.run.round}: accuracy {score}, loss {evaluation.loss:.4f}")
        self.keeper.note(evaluation)
        await self.keeper.keep(self.trainer, evaluation)

    def _is_evaluation_due(self) -> bool:
        every, round_ = self.config.evaluation.every, self.run.round
        return round_ == self.config.rounds or (bool(every) and round_ % every == 0)

    async def _is_evaluated(self) -> bool:
        newest = await asyncio.to_thread(self.store.evaluations, self.run.id, 1)
        return any(evaluation.round == self.run.round for evaluation in newest)

    async def _score(self) -> Evaluation | None:
        """What the devices' held-out data scores; a strict run asks all its devices until they have all answered."""
        while True:
            if self.config.strict:
                await self._wait_for_these(self._roster)
            devices = [name for name in self.fleet.ready_names() if self.fleet.peers[name].eval_examples]
            if self.config.strict:
                devices = [name for name in devices if name in self._roster]
            else:
                devices = [name for name in devices if not self._is_unreliable(name)]
            if not devices or self._is_stopping:
                return None
            peers = [self.fleet.peers[name] for name in devices]
            examples = await asyncio.to_thread(self.store.held_out, self.run.id)
            if not self.config.strict:  # what never comes must not leave every evaluation in want of it
                examples = {name: count for name, count in examples.items() if not self._is_unreliable(name)}
            examples |= {peer.name: peer.eval_examples for peer in peers}
            digests = {peer.name: peer.eval_digest for peer in peers}
            context = self._context(self.run.round, devices)
            came = await self._drive(evaluate(context, examples, digests), self.config.evaluation.deadline_s)
            self._note_unfinished(devices, came.unfinished)
            # One that has come back since it left has not answered everything.
            if not self.config.strict or not any(peer.gone.is_set() for peer in peers):
                return came.evaluation

    def _is_unreliable(self, device: str) -> bool:
        """Whether a device has so often not sent what it said it has that no evaluation should wait for it."""
        return 0 < self.config.devices.strikes <= self._unfinished[device]

    def _note_unfinished(self, devices: Collection[str], unfinished: Collection[str]) -> None:
        for device in devices:
            self._unfinished[device] = self._unfinished[device] + 1 if device in unfinished else 0
            if not self.config.strict and self._is_unreliable(device):
                times = self._unfinished[device]
                self.say(
                    f"device {device} did not send all its held-out data in {times} evaluations: it is asked no more"
                )

    def _is_complete(self, devices: Collection[str]) -> bool:
        return set(devices) <= set(self.fleet.ready_names())

    async def _finish(self, ending: Ending) -> Ending:
        await self.keeper.keep(self.trainer)
        await self.end(ending)
        return ending

    async def end(self, ending: Ending) -> None:
        """Tell every device, and then the store: a service that is cut off before goes on with the run, and ends it."""
        self.run.ending = ending
        await asyncio.to_thread(self._curves.close)
        await self._await_reports()
        # Those that are about to join first catch up: admission tells them.
        for name in self.fleet.ready_names():
            self.admission.complete(self.fleet.peers[name])
        await self._set_state("completed" if ending == "stopped-early" else ending)

    async def _await_reports(self) -> None:
        """Give devices a moment to report on the last round; their figures are the run's record."""
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
