"""The tail of all ranks as rank 0 uses it: rounds and checkpoints see what one process would show them.

A round's devices are spread over the ranks by their tokens. A batch goes from here to a rank (Group.send_batch), there
through its part of the tail (ranks/trainers.py), and comes back as an outcome and λ (ranks/follower.py).

Called on a run's compute thread, as TailTrainer is. Every method that touches the other ranks does so within
Group.command, and there makes the collective calls that ranks/follower.py makes for that command.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from hosl_cloud.exceptions import BatchError, NotFiniteError, RankLoadError, RoundSpoiltError
from hosl_cloud.ranks import commands
from hosl_cloud.ranks.group import Group
from hosl_cloud.ranks.trainers import BroadcastTensors, Result, digest_of, load_part
from hosl_cloud.rounds.exchange import BatchArrays
from hosl_cloud.settings import RunConfig
from hosl_cloud.tail.trainer import BATCHES_AT_ONCE, EvalScore, StepResult, StepStatistics, split_rows
from hosl_protocol.run.manifest import Manifest


class GroupTrainer:
    """The tail of all ranks, as rank 0 uses it; a StatefulTrainer of rounds/exchange.py."""

    def __init__(self, group: Group, bundle: Path, manifest: Manifest, config: RunConfig) -> None:
        """Load the tail on all ranks. Raises what TailTrainer raises, and RankLoadError for another rank's error."""
        self._group, self._tail = group, group.new_tail_id()
        load = commands.Load(tail=self._tail, bundle=str(bundle), digest=digest_of(manifest), config=config)
        # Errors wait until all ranks have replied: to leave in the middle would put them out of step.
        with group.command(load):
            error: Exception | None = None
            try:
                self._own = load_part(group, bundle, manifest, config)
            except Exception as own_error:
                error = own_error
            for rank in range(1, group.size):
                reply = group.receive_reply(rank)
                if reply.error and error is None:
                    error = RankLoadError(rank, reply.error, reply.exit_code)

        if error is not None:
            self.close()  # some ranks may have loaded it
            raise error

    @property
    def at_once(self) -> int:
        """Count the batches that are worth handing over together."""
        return BATCHES_AT_ONCE * self._group.size

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """List what trains, by plain name; its shapes are those of the whole."""
        return self._own.parameters

    @property
    def head_rows(self) -> tuple[int, ...]:
        """List the vocabulary rows that the head keeps."""
        return self._own.head_rows

    def forward_backward_many(
        self, batches: Sequence[BatchArrays], weights: Sequence[float], *, wants_cut_gradient: bool
    ) -> list[Any]:
        """Train on batches, as TailTrainer does, each on one of the ranks."""

        def order(shares: tuple[tuple[commands.BatchShape, ...], ...], passes: int) -> commands.Train:
            return commands.Train(tail=self._tail, shares=shares, passes=passes, wants_cut_gradient=wants_cut_gradient)

        return self._spread(batches, weights, order)

    def evaluate_many(self, batches: Sequence[BatchArrays]) -> list[Any]:
        """Score batches, as TailTrainer does, each on one of the ranks."""

        def order(shares: tuple[tuple[commands.BatchShape, ...], ...], passes: int) -> commands.Evaluate:
            return commands.Evaluate(tail=self._tail, shares=shares, passes=passes)

        return self._spread(batches, [1.0] * len(batches), order)

    def _spread(self, batches: Sequence[BatchArrays], weights: Sequence[float], make_order: Any) -> list[Any]:
        """Check batches here, share the good ones out over the ranks, and put their results in the batches' order."""
        # Checked before anything is sent: an error that only one rank finds would put the ranks out of step.
        results: list[Any] = [self._check(batch) for batch in batches]
        fit = [place for place, error in enumerate(results) if error is None]
        if not fit:
            return results

        tokens = [len(batches[place][0]) for place in fit]
        shares = [
            [fit[index] for index in share]
            for share in spread(tokens, self._group.size, is_in_step=self._own.is_in_step)
        ]
        parts = tuple(tuple(_describe(batches[place], weights[place]) for place in share) for share in shares)

        # Ranks in step run as many passes as the one with the most micro-batches.
        order = make_order(parts, max(self._passes(batches[place] for place in share) for share in shares))
        with self._group.command(order):
            for share, outcomes in zip(shares, self._run(order, batches, shares), strict=True):
                for place, result in zip(share, outcomes, strict=True):
                    results[place] = result
        return results

    def _check(self, batch: BatchArrays) -> BatchError | None:
        try:
            self._own.check(*batch)
        except BatchError as error:
            return error
        return None

    def _passes(self, batches: Iterator[BatchArrays]) -> int:
        most = self._own.config.tail.micro_batch_tokens
        return sum(len(split_rows(lengths, most)) for _, lengths, _ in batches)

    def _run(
        self, order: commands.Train | commands.Evaluate, batches: Sequence[BatchArrays], shares: list[list[int]]
    ) -> Iterator[list[Any]]:
        """Send each rank its share, do our own meanwhile, and yield the results rank by rank."""
        # Begun, not awaited: gloo's threads send while this rank computes.
        sent = [
            each
            for rank in range(1, self._group.size)
            for place in shares[rank]
            for each in self._group.send_batch(batches[place], rank)
        ]

        yield self._own.work([batches[place] for place in shares[0]], order)
        for work, _ in sent:
            assert work is not None
            work.wait()

        for rank in range(1, self._group.size):
            # Rank by rank, outcomes first and then λ of each: the order in which ranks/follower.py sends.
            outcomes = self._group.receive_reply(rank).outcomes
            yield [
                self._result(order, outcome, batches[place], rank)
                for place, outcome in zip(shares[rank], outcomes, strict=True)
            ]

    def _result(
        self, order: commands.Train | commands.Evaluate, outcome: commands.BatchOutcome, batch: BatchArrays, rank: int
    ) -> Result:
        value = float(outcome.value)
        if outcome.error:  # the same error as on the rank, so that a round treats it as its own
            return (RoundSpoiltError if outcome.error == "spoilt" else NotFiniteError)(outcome.what, value)
        if isinstance(order, commands.Evaluate):
            predicted = None if outcome.predicted is None else np.array(outcome.predicted, np.int64)
            return EvalScore(value, outcome.correct, outcome.scored, predicted)
        lambda_TD = self._group.receive_array(batch[0].shape, rank) if order.wants_cut_gradient else None
        return StepResult(value, lambda_TD, outcome.correct, outcome.scored)

    def step(self, round_: int, total_weight: float) -> StepStatistics:
        """Make a step as TailTrainer does, on all ranks."""
        with self._group.command(commands.Step(tail=self._tail, round=round_, total_weight=total_weight)):
            return self._own.step(round_, total_weight)

    def discard(self) -> None:
        """Drop the round's gradients on all ranks."""
        with self._group.command(commands.Discard(tail=self._tail)):
            self._own.discard()

    def state(self) -> dict[str, Tensor]:
        """Name what training changes, with the shapes of the whole; `gather` has the values."""
        return self._own.state()

    def gather(self) -> Generator[Tensor, None, None]:
        """Yield the tensors of `state`, in its order, whole and on the CPU, one at a time."""
        with self._group.command(commands.Gather(tail=self._tail)):
            tensors = self._own.gather()
            try:
                while (tensor := next(tensors, None)) is not None:
                    yield tensor
            finally:
                for _ in tensors:  # where the disk is full, the others still go on to the end
                    pass

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state, as TailTrainer does: rank 0 sends each tensor, of which each rank keeps its part."""
        entries = tuple(commands.Entry(name=name, shape=tuple(tensor.shape)) for name, tensor in state.items())
        with self._group.command(commands.Restore(tail=self._tail, entries=entries)):
            self._own.load_state(BroadcastTensors(entries, state))

    def close(self) -> None:
        """Let the other ranks free their parts."""
        self._group.free_tail(self._tail)


def spread(tokens: Sequence[int], ranks: int, *, is_in_step: bool) -> list[list[int]]:
    """Share batches out, as their indices by rank: the longest first, each to the rank with the fewest tokens.

    Where ranks run in step a pass takes as long as its longest batch: so those of like length meet, one on each rank.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for place in sorted(range(len(tokens)), key=lambda place: -tokens[place]):
        rank = min(range(ranks), key=lambda rank: (len(shares[rank]) if is_in_step else 0, loads[rank]))
        shares[rank].append(place)
        loads[rank] += tokens[place]
    return shares


def _describe(batch: BatchArrays, weight: float) -> commands.BatchShape:
    return commands.BatchShape(tokens=len(batch[0]), examples=len(batch[1]), labels=len(batch[2]), weight=weight)
