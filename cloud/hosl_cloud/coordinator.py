"""The course of a run: who is admitted, which round is due, what is stored before it is sent."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from hosl_cloud import metrics
from hosl_cloud.checkpoint import Metrics, prune_checkpoints, rank, save_checkpoint
from hosl_cloud.exceptions import NoDevicesError, RoundsFailedError
from hosl_cloud.mirror import load_shard_weights
from hosl_cloud.peer import Peer
from hosl_cloud.rounds import ROUNDS, Ask, Outcome, RoundContext, Tell, evaluate
from hosl_cloud.settings import RunConfig
from hosl_cloud.store import Evaluation, Store
from hosl_cloud.trainer import TailTrainer
from hosl_protocol import (
    CATCH_UP_ROUNDS,
    PROTOCOL_VERSION,
    CatchUp,
    ClientWeights,
    Complete,
    Frame,
    Hello,
    Manifest,
    Ready,
    Refusal,
    Update,
    UpdateRecord,
    Welcome,
    make_client_weights,
    sample_devices,
)

log = logging.getLogger(__name__)

JOIN_DEADLINE_S = 600.0
"""Longest wait for a joining device, which may have to tokenize its data first."""

MAX_FRUITLESS = 5
"""Tries of one round after which the run fails."""

T = TypeVar("T")
Ending = Literal["completed", "stopped-early", "stopped", "failed"]


@dataclass
class Coordinator:
    """One run and the devices in it. All methods but `_compute`'s work run on the event loop."""

    run: str
    config: RunConfig
    manifest: Manifest
    bundle: Path
    folder: Path
    """The run's folder; checkpoints go below it."""
    store: Store
    say: Callable[[str], None]
    """Tells a person how the run goes."""
    epoch: int = 0
    round: int = 0
    """The last finished round; stored, and in the mirror."""
    ending: Ending | None = None
    peers: dict[str, Peer] = field(default_factory=dict)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "trainer"))
    _digests: dict[int, str] = field(default_factory=dict)
    _best: Evaluation | None = None
    _since_best: int = 0
    _checkpointed: int = 0
    """The round of the newest checkpoint; 0 is what the bundle holds."""
    _fruitless: int = 0
    """Tries of a round in a row that came to nothing."""
    _is_checkpoint_due: bool = False
    _is_stopping: bool = False

    async def prepare(self) -> None:
        """Load the tail and the mirror of the client's weights."""
        self.settings = self.config.wire_settings()
        self.trainer = await self._compute(lambda: TailTrainer(self.bundle, self.manifest, self.config))
        self.mirror: ClientWeights = await self._compute(self._load_mirror)
        await self._note_digest()

    def _load_mirror(self) -> ClientWeights:
        return make_client_weights(
            self.manifest, load_shard_weights(self.bundle, self.manifest, only_trainable=True), self.settings
        )

    async def _compute(self, work: Callable[[], T]) -> T:
        """Run on the one thread that owns the tail and the mirror."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self) -> None:
        """Stop the compute thread."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    # A device joins.

    async def attend(self, peer: Peer) -> None:
        """A connection from Hello to its end."""
        reports = asyncio.create_task(self._take_reports(peer))
        try:
            if await self._admit(peer):
                await peer.gone.wait()
        except asyncio.TimeoutError:
            peer.end(Refusal(code="late", reason="no answer in time while joining", retry=True))
        finally:
            reports.cancel()
            if self.peers.get(peer.name) is peer:
                del self.peers[peer.name]
                self.say(f"device {peer.name} is away" + (f": {peer.farewell}" if peer.farewell else ""))
            await self._notify()

    async def _admit(self, peer: Peer) -> bool:
        hello = (await peer.next(JOIN_DEADLINE_S)).message
        assert isinstance(hello, Hello)
        refusal = self._objection(hello)
        if refusal is not None:
            peer.end(refusal)
            return False
        peer.name = hello.device
        if self.ending is not None:
            peer.end(Complete(run=self.run, reason=self.ending, round=self.round))
            return False
        former = self.peers.get(peer.name)
        if former is not None:
            former.end(Refusal(code="device", reason="the device has connected again", retry=False))
        self.peers[peer.name] = peer
        self.store.add_device(self.run, peer.name, hello.data_digest)
        peer.connection.agree(self.settings, self.manifest.width)
        return await self._bring_up(peer, hello)

    def _objection(self, hello: Hello) -> Refusal | None:
        if hello.protocol != PROTOCOL_VERSION:
            reason = f"protocol {hello.protocol}, this service speaks {PROTOCOL_VERSION}"
            return Refusal(code="protocol", reason=reason, retry=False)
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", hello.device):
            return Refusal(code="device", reason="a name is 1 to 64 characters of A-Za-z0-9._-", retry=False)
        if hello.shard_digest != self.manifest.shard_digest:
            return Refusal(code="shard", reason="another shard; fetch this service's shard again", retry=False)
        known = self.store.data_digest(self.run, hello.device)
        if known is not None and known != hello.data_digest:
            reason = (
                "its data has changed since it joined this run: put the old files back, "
                "or join as a new device with another --name"
            )
            return Refusal(code="data", reason=reason, retry=False)
        return None

    async def _bring_up(self, peer: Peer, hello: Hello) -> bool:
        """Welcome, then CatchUp and Ready until the device stands at our round with our digest."""
        plan: Literal["continue", "rebuild"] = "continue"
        applied = hello.applied_round if hello.run == self.run else 0
        if hello.run is not None and (hello.run != self.run or hello.epoch != self.epoch or applied > self.round):
            plan, applied = "rebuild", 0
        attempts: list[tuple[Literal["continue", "rebuild"], int]] = [(plan, applied), ("rebuild", 0)]
        for attempt, start in attempts:
            self._welcome(peer, attempt)
            ready = await self._catch_up(peer, start)
            if ready.weights_digest == self._digests.get(ready.applied_round):
                self._make_ready(peer, ready)
                await self._notify()
                return True
            log.warning("device %s: digest differs at round %d", peer.name, ready.applied_round)
        peer.end(Refusal(code="weights", reason="its weights differ even after a rebuild", retry=False))
        return False

    def _welcome(self, peer: Peer, plan: Literal["continue", "rebuild"]) -> None:
        welcome = Welcome(
            run=self.run,
            epoch=self.epoch,
            round=self.round,
            width=self.manifest.width,
            settings=self.settings,
            plan=plan,
        )
        peer.tell(welcome)

    async def _catch_up(self, peer: Peer, applied: int) -> Ready:
        """Send what is missing until nothing is; the last Ready speaks of the current round and its digest is known."""
        while True:
            self._send_missed(peer, applied)
            ready = (await peer.next(JOIN_DEADLINE_S)).message
            assert isinstance(ready, Ready)
            applied = ready.applied_round
            if applied == self.round:
                await self._note_digest()
            if applied == self.round and applied in self._digests:
                return ready

    def _send_missed(self, peer: Peer, applied: int) -> None:
        target = self.round
        for first in range(applied + 1, max(target, applied + 1) + 1, CATCH_UP_ROUNDS):
            updates = self.store.updates(self.run, first, min(first + CATCH_UP_ROUNDS - 1, target))
            shape = (len(updates), self.settings.coefficients)
            coefficients = np.array([update.coefficients for update in updates], np.float32).reshape(shape)
            rates = np.array([update.learning_rate for update in updates], np.float64)
            is_last = first + CATCH_UP_ROUNDS > target
            message = CatchUp(run=self.run, epoch=self.epoch, first_round=first, last=is_last)
            peer.tell(message, {"coefficients": coefficients, "learning_rates": rates})

    def _make_ready(self, peer: Peer, ready: Ready) -> None:
        peer.is_ready = True
        peer.eval_examples = ready.eval_examples
        self.store.set_examples(self.run, peer.name, ready.train_examples, ready.eval_examples)
        self.say(f"device {peer.name} is ready: {ready.train_examples} examples, {ready.eval_examples} held out")

    async def _notify(self) -> None:
        metrics.devices_connected.set(len(self._ready_names()))
        async with self._changed:
            self._changed.notify_all()

    def _ready_names(self) -> list[str]:
        return sorted(name for name, peer in self.peers.items() if peer.is_ready)

    async def _take_reports(self, peer: Peer) -> None:
        while True:
            report = await peer.reports.get()
            self.store.set_report(peer.name, report)
            expected = self._digests.get(report.applied_round)
            if expected is not None and report.weights_digest != expected:
                log.error("device %s: weights differ at round %d", peer.name, report.applied_round)
                peer.is_ready = False
                reason = f"its weights differ from round {report.applied_round}; connect again to rebuild them"
                peer.end(Refusal(code="weights", reason=reason, retry=True))

    # The run.

    async def request_stop(self) -> None:
        """End the run after the round that is under way."""
        self._is_stopping = True
        await self._notify()

    async def train(self) -> Ending:
        """All rounds and evaluations to the end. Raises NoDevicesError, RoundsFailedError, LatticeError."""
        self.store.set_state(self.run, "pending")
        await self._wait_for_devices(self.config.devices.start_with, timeout_s=None)
        self.store.set_state(self.run, "running")
        await self._evaluate()
        while self.round < self.config.rounds and not self._is_stopping:
            if not await self._train_round():
                continue
            is_due = self.config.evaluation.every and self.round % self.config.evaluation.every == 0
            if is_due or self.round == self.config.rounds:
                await self._evaluate()
                if self._is_overdue() and self.round < self.config.rounds:
                    return await self._finish("stopped-early")
            if self._is_checkpoint_due:
                await self._checkpoint(None)
                self._is_checkpoint_due = False
        return await self._finish("completed" if self.round == self.config.rounds else "stopped")

    async def _wait_for_devices(self, count: int, timeout_s: float | None) -> None:
        def is_time() -> bool:
            return self._is_stopping or len(self._ready_names()) >= count

        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(is_time), timeout_s)

    async def _train_round(self) -> bool:
        """One round; False where it came to nothing, or the run is to stop."""
        began = time.monotonic()
        await self._wait_or_fail()
        if self._is_stopping:
            return False
        devices = sample_devices(self.config.seed, self.round + 1, self._ready_names(), self.config.devices.per_round)
        outcome: Outcome | None = await self._drive(
            ROUNDS[self.config.algorithm](self._context(self.round + 1, devices))
        )
        if outcome is None:
            self._fruitless += 1
            self.say(f"round {self.round + 1} came to nothing; it starts again")
            if self._fruitless >= MAX_FRUITLESS:
                raise RoundsFailedError(self.run, self.round + 1, self._fruitless)
            return False
        self._fruitless = 0
        await self._settle(outcome, time.monotonic() - began)
        return True

    async def _wait_or_fail(self) -> None:
        limit_s = self.config.devices.rejoin_deadline_s
        try:
            await self._wait_for_devices(1, timeout_s=limit_s)
        except asyncio.TimeoutError:
            raise NoDevicesError(self.run, self.round, limit_s) from None

    async def _settle(self, outcome: Outcome, seconds: float) -> None:
        """Store, mirror, broadcast: in this order."""
        update = self._bounded(outcome.update)
        # The mirror refuses weights that diverge; then nothing is stored or sent.
        known = len(self.mirror.coarsenings)
        await self._compute(lambda: self.mirror.apply([update]))
        await self._compute(
            lambda: self.store.add_round(
                self.run, self.epoch, update, seconds=seconds, loss=outcome.loss, devices=outcome.devices
            )
        )
        self.round = update.round
        if self.round % self.config.report_every == 0 or self.round == self.config.rounds:
            await self._note_digest()
        message = Update(run=self.run, epoch=self.epoch, round=update.round, learning_rate=update.learning_rate)
        tensors = {"coefficients": update.coefficients, "loss": np.float32(outcome.loss).reshape(())}
        for name in self._ready_names():
            self.peers[name].tell(message, tensors)
        self._observe(outcome, seconds)
        for event in self.mirror.coarsenings[known:]:
            self.say(f"round {event.round}: {event.tensor} outgrew its lattice, its steps are now {event.spacing:.2g}")
            # The event can't be taken back: a run that resumes must not begin before it.
            self._is_checkpoint_due = True

    def _bounded(self, update: UpdateRecord) -> UpdateRecord:
        """The update, or one of zeros where its numbers overflow."""
        if np.isfinite(update.coefficients).all():
            return update
        log.error("round %d: the update is not finite; the devices' weights stay as they are", update.round)
        return UpdateRecord(update.round, np.zeros_like(update.coefficients), update.learning_rate)

    def _observe(self, outcome: Outcome, seconds: float) -> None:
        metrics.rounds.inc()
        metrics.round_seconds.observe(seconds)
        metrics.train_loss.set(outcome.loss)
        if self.round % self.config.report_every == 0 or self.round in (1, self.config.rounds):
            self.say(
                f"round {self.round}/{self.config.rounds}: loss {outcome.loss:.4f}, {seconds:.2f} s, "
                f"{len(outcome.devices)} device{'s' if len(outcome.devices) != 1 else ''}"
            )

    async def _note_digest(self) -> None:
        """Remember the mirror's digest at the current round; the oldest are forgotten."""
        if self.round not in self._digests:
            round_, digest = await self._compute(lambda: (self.mirror.applied_round, self.mirror.digest()))
            self._digests[round_] = digest
            while len(self._digests) > 16:
                del self._digests[min(self._digests)]

    def _context(self, round_: int, devices: list[str]) -> RoundContext:
        return RoundContext(self.run, self.epoch, round_, self.config, self.trainer, devices)

    async def _drive(self, exchange: Generator[Tell | Ask, Frame | None, T]) -> T:
        """Run a round's generator, computing on the trainer's thread.

        It talks to the connections that stood at its start, so that a device that comes back waits for the next
        round. A stage has one deadline, however many devices it asks.
        """
        peers = dict(self.peers)
        deadlines: dict[object, float] = {}
        answer: Frame | None = None
        while True:
            action, result = await self._compute(partial(_advance, exchange, answer))
            answer = None
            if action is None:
                return result  # type: ignore[no-any-return]
            peer = peers.get(action.device)
            if peer is None:
                continue
            if isinstance(action, Ask):
                latest = asyncio.get_running_loop().time() + self.config.devices.round_deadline_s
                answer = await peer.answer(action, deadlines.setdefault(action.stage, latest))
            elif isinstance(action.message, Refusal):
                peer.is_ready = False
                peer.end(action.message)
            else:
                peer.tell(action.message, action.tensors)

    async def _evaluate(self) -> None:
        devices = [name for name in self._ready_names() if self.peers[name].eval_examples]
        evaluation: Evaluation | None = None
        if devices:
            evaluation = await self._drive(evaluate(self._context(self.round, devices)))
        if evaluation is None:
            await self._checkpoint(None)
            return
        self.store.add_evaluation(self.run, self.epoch, evaluation)
        metrics.eval_accuracy.set(evaluation.accuracy)
        self.say(
            f"evaluation at round {self.round}: accuracy {100 * evaluation.accuracy:.1f} % "
            f"({evaluation.correct} of {evaluation.scored}), loss {evaluation.loss:.4f}"
        )
        self._since_best += 1
        if self._best is None or self._rank(evaluation) > self._rank(self._best):
            self._best, self._since_best = evaluation, 0
        await self._checkpoint(evaluation)

    def _rank(self, evaluation: Evaluation) -> tuple[float, float]:
        return rank(_metrics(evaluation), self.config.task.kind)

    def _is_overdue(self) -> bool:
        patience = self.config.evaluation.patience
        return bool(patience) and self._since_best >= patience

    async def _checkpoint(self, evaluation: Evaluation | None) -> None:
        """Save the tail as it is after this round, once; the best by evaluation and the newest ones are kept."""
        if self._checkpointed == self.round:
            return
        scores = None if evaluation is None else _metrics(evaluation)
        await self._compute(
            lambda: save_checkpoint(self.folder, self.round, self.epoch, self.trainer, self.config, scores)
        )
        await self._compute(lambda: prune_checkpoints(self.folder))
        self._checkpointed = self.round

    async def _finish(self, ending: Ending) -> Ending:
        await self._checkpoint(None)
        await self.end(ending)
        return ending

    async def end(self, ending: Ending) -> None:
        """Tell every device, and the store."""
        self.ending = ending
        self.store.set_state(self.run, "completed" if ending == "stopped-early" else ending)
        await self._await_reports()
        for peer in list(self.peers.values()):
            peer.end(Complete(run=self.run, reason=ending, round=self.round))

    async def _await_reports(self) -> None:
        """Give devices a moment to report on the last round; their figures are the run's record."""
        for _ in range(50):
            behind = [
                row
                for row in self.store.devices(self.run)
                if row["name"] in self._ready_names() and row["applied_round"] < self.round
            ]
            if not behind or self.ending != "completed":
                return
            await asyncio.sleep(0.1)


def _metrics(evaluation: Evaluation) -> Metrics:
    return Metrics(loss=evaluation.loss, correct=evaluation.correct, scored=evaluation.scored)


def _advance(exchange: Generator[Tell | Ask, Frame | None, Any], answer: Frame | None) -> tuple[Tell | Ask | None, Any]:
    try:
        return exchange.send(answer), None
    except StopIteration as stop:
        return None, stop.value
