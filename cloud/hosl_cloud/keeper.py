"""What a run leaves on disk: its checkpoints, and which evaluation is the best. A full disk makes the run wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from hosl_cloud import metrics
from hosl_cloud.checkpoint import (
    Metrics,
    find_checkpoint,
    prune_checkpoints,
    rank,
    record_metrics,
    save_checkpoint,
)
from hosl_cloud.exceptions import StoreError, is_disk_full
from hosl_cloud.exchange import TailHolder
from hosl_cloud.fleet import Fleet, Waiting
from hosl_cloud.records import Evaluation
from hosl_cloud.run import Compute, Run

DISK_PAUSE_S = 5.0
"""Between tries to write to a full disk."""

ROOM = "room on the disk"
"""What a run waits for whose disk is full."""


class Keeper:
    """One run's checkpoints."""

    def __init__(self, run: Run, fleet: Fleet, compute: Compute, say: Callable[[str], None]) -> None:
        self._run, self._fleet, self._compute, self._say = run, fleet, compute, say
        self._kept_round = run.round
        """The round of the newest checkpoint; 0 is what the bundle holds."""
        self._kept_at = time.monotonic()
        self._best: Evaluation | None = None
        self._since_best = 0

    @property
    def is_waiting_for_room(self) -> bool:
        """Whether the disk is full."""
        return self._fleet.waiting is not None and self._fleet.waiting.what == ROOM

    @property
    def is_due(self) -> bool:
        """Whether rounds or minutes enough have passed since the last checkpoint."""
        settings = self._run.config.checkpoints
        is_due = bool(settings.every) and self._run.round % settings.every == 0
        is_late = bool(settings.minutes) and time.monotonic() - self._kept_at >= 60.0 * settings.minutes
        return is_due or is_late

    @property
    def is_overdue(self) -> bool:
        """Whether the best evaluation is as many evaluations ago as the run has patience, and rounds are left."""
        config = self._run.config
        patience = config.evaluation.patience
        return bool(patience) and self._since_best >= patience and self._run.round < config.rounds

    def note(self, evaluation: Evaluation) -> None:
        """See whether an evaluation is the best; one that devices left half way says nothing."""
        if not evaluation.is_complete:
            return
        kind = self._run.config.task.kind
        self._since_best += 1
        if self._best is None or rank(_metrics(evaluation), kind) > rank(_metrics(self._best), kind):
            self._best, self._since_best = evaluation, 0

    async def keep(self, trainer: TailHolder, evaluation: Evaluation | None = None) -> None:
        """Save the tail as it is after this round, once; the best by evaluation and the newest ones are kept."""
        run, config = self._run, self._run.config
        scores = None if evaluation is None else _metrics(evaluation)
        if self._kept_round == run.round:
            if run.round and scores is not None:
                path = find_checkpoint(run.folder, run.round).path
                await self.durably(lambda: record_metrics(path, scores))
            return
        await self.durably(lambda: save_checkpoint(run.folder, run.round, run.epoch, trainer, config, scores))
        await self._compute(lambda: prune_checkpoints(run.folder, config.checkpoints.keep))
        self._kept_round, self._kept_at = run.round, time.monotonic()
        metrics.checkpoint_time.labels(run.bundle.name).set_to_current_time()

    async def durably(self, work: Callable[[], object]) -> None:
        """Write to disk; where that is full, the run waits for room, and says so."""
        while True:
            try:
                await self._compute(work)
            except (OSError, StoreError) as error:
                if not is_disk_full(error):
                    raise
                if not self.is_waiting_for_room:
                    self._say(f"the disk is full ({error}); the run goes on when there is room")
                    self._fleet.waiting = Waiting(ROOM, (), time.time())
                await asyncio.sleep(DISK_PAUSE_S)
            else:
                self._fleet.waiting = None
                return


def _metrics(evaluation: Evaluation) -> Metrics:
    return Metrics(
        loss=evaluation.loss,
        correct=evaluation.correct,
        scored=evaluation.scored,
        examples=evaluation.examples,
        of_examples=evaluation.of_examples,
    )
