"""What a run leaves on disk: its checkpoints, and which evaluation is the best. A full disk makes the run wait.

Used by a run's Coordinator on the event loop; all work on disk goes to the compute thread, in its order with the steps
of the tail. So a checkpoint holds the tail of exactly `run.round`, for no step is made while the Coordinator awaits it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from hosl_cloud import metrics
from hosl_cloud.rounds.exchange import StatefulTrainer
from hosl_cloud.runs.fleet import Fleet, Waiting
from hosl_cloud.runs.run import Compute, Run
from hosl_cloud.storage.disk_space import when_there_is_room
from hosl_cloud.storage.records import Evaluation
from hosl_cloud.tail.checkpoint import (
    CheckpointScore,
    comparable_scores,
    find_checkpoint,
    prune_checkpoints,
    record_score,
    save_checkpoint,
    score_key,
)

ROOM = "room on the disk"
"""What a run waits for whose disk is full."""


T = TypeVar("T")


class Checkpointer:
    """Saves one run's checkpoints, and knows when one is due."""

    def __init__(self, run: Run, fleet: Fleet, compute: Compute, say: Callable[[str], None]) -> None:
        self._run, self._fleet, self._compute, self._say = run, fleet, compute, say
        self._saved_round = run.round
        """The round of the newest checkpoint; 0 is what the bundle holds."""
        self._saved_at = time.monotonic()
        self._scored: list[tuple[int, CheckpointScore]] = []
        """Evaluations by round."""

    @property
    def is_waiting_for_room(self) -> bool:
        """Whether the disk is full."""
        return self._fleet.waiting is not None and self._fleet.waiting.what == ROOM

    @property
    def is_due(self) -> bool:
        """Whether rounds or minutes enough have passed since the last checkpoint."""
        settings = self._run.config.checkpoints
        is_due = bool(settings.every) and self._run.round % settings.every == 0
        is_late = bool(settings.minutes) and time.monotonic() - self._saved_at >= 60.0 * settings.minutes
        return is_due or is_late

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the best evaluation is as many evaluations ago as the run has patience, and rounds are left.

        Those that cannot be compared with the best do not count.
        """
        config = self._run.config
        patience, comparable = config.evaluation.patience, comparable_scores(self._scored)
        if not (patience and comparable and self._run.round < config.rounds):
            return False
        ranks = [score_key(metrics, config.task.kind) for _, metrics in comparable]
        return len(ranks) - 1 - ranks.index(max(ranks)) >= patience

    def note(self, evaluation: Evaluation) -> None:
        """Remember an evaluation."""
        self._scored.append((evaluation.round, score_of(evaluation)))

    async def save(self, trainer: StatefulTrainer, evaluation: Evaluation | None = None) -> None:
        """Save the tail as it is after this round, once; the best by evaluation and the newest ones are kept."""
        run, config = self._run, self._run.config
        scores = None if evaluation is None else score_of(evaluation)

        if self._saved_round == run.round:  # once a round: an evaluation adds its score to what is there
            if run.round and scores is not None:
                await self.durably(lambda: record_score(find_checkpoint(run.folder, run.round).path, scores))
            return

        # The store keeps no update of first-order training for good: the client's state goes into the checkpoint.
        write_client = run.write_state if run.kept_updates is not None else None
        await self.durably(
            lambda: save_checkpoint(run.folder, run.round, run.epoch, trainer, config, scores, write_client)
        )
        # Pruned only once the new one is whole.
        await self._compute(lambda: prune_checkpoints(run.folder, config.checkpoints.keep))
        self._saved_round, self._saved_at = run.round, time.monotonic()
        metrics.checkpoint_time.labels(run.bundle.name).set_to_current_time()

    async def durably(self, work: Callable[[], T], on: Compute | None = None) -> T:
        """Write to disk, on the compute thread or `on` another; where it is full, the run waits, and says so."""
        run = on or self._compute

        async def write() -> T:
            result: T = await run(work)
            return result

        return await when_there_is_room(write, self._say, self._notice_room)

    def _notice_room(self, is_waiting: bool) -> None:
        self._fleet.waiting = Waiting(ROOM, (), time.time()) if is_waiting else None


def score_of(evaluation: Evaluation) -> CheckpointScore:
    """Take what a checkpoint keeps of an evaluation."""
    return CheckpointScore(
        loss=evaluation.loss,
        correct=evaluation.correct,
        scored=evaluation.scored,
        examples=evaluation.examples,
        of_examples=evaluation.of_examples,
        held_out=evaluation.held_out,
        macro_f1=evaluation.macro_f1,
    )
