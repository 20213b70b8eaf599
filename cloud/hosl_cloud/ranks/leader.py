"""The tail of all ranks as rank 0 uses it: rounds and checkpoints see what one process would show them.

A round's devices are spread over the ranks by their tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hosl_cloud.exceptions import BatchError, NotFiniteError, RankLoadError, RoundSpoiltError
from hosl_cloud.ranks import group as words
from hosl_cloud.ranks.group import Group
from hosl_cloud.ranks.trainers import Passing, Result, digest_of, load_part
from hosl_cloud.rounds.exchange import BatchArrays
from hosl_cloud.settings import RunConfig
from hosl_cloud.tail.trainer import BATCHES_AT_ONCE, EvalScore, StepResult, StepStatistics, split_rows
from hosl_protocol.run.manifest import Manifest


class GroupTrainer:
    """The tail of all ranks, as rank 0 uses it; see hosl_cloud.rounds.exchange.Trainer."""

    def __init__(self, group: Group, bundle: Path, manifest: Manifest, config: RunConfig) -> None:
        """Load the tail on all ranks. Raises what TailTrainer raises, and RankLoadError for another rank's error."""
        self._group, self._tail = group, group.next_tail()
        load = words.Load(tail=self._tail, bundle=str(bundle), digest=digest_of(manifest), config=config)
        with group.command(load):
            error: Exception | None = None
            try:
                self._own = load_part(group, bundle, manifest, config)
            except Exception as own_error:
                error = own_error
            for rank in range(1, group.size):
                reply = group.reply_of(rank)
                if reply.error and error is None:
                    error = RankLoadError(rank, reply.error, reply.exit_code)
        if error is not None:
            self.close()
            raise error

    @property
    def at_once(self) -> int:
        """Batches that are worth handing over together."""
        return BATCHES_AT_ONCE * self._group.size

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by plain name; its shapes are those of the whole."""
        return self._own.parameters

    @property
    def head_rows(self) -> tuple[int, ...]:
        """Vocabulary rows that the head keeps."""
        return self._own.head_rows

    def forward_backward_many(
        self, batches: Sequence[BatchArrays], weights: Sequence[float], *, wants_cut_gradient: bool
    ) -> list[Any]:
        """As TailTrainer's."""

        def order(shares: tuple[tuple[words.Part, ...], ...], passes: int) -> words.Train:
            return words.Train(tail=self._tail, shares=shares, passes=passes, wants_cut_gradient=wants_cut_gradient)

        return self._spread(batches, weights, order)

    def evaluate_many(self, batches: Sequence[BatchArrays]) -> list[Any]:
        """As TailTrainer's."""

        def order(shares: tuple[tuple[words.Part, ...], ...], passes: int) -> words.Evaluate:
            return words.Evaluate(tail=self._tail, shares=shares, passes=passes)

        return self._spread(batches, [1.0] * len(batches), order)

    def _spread(self, batches: Sequence[BatchArrays], weights: Sequence[float], make_order: Any) -> list[Any]:
        """What came of each batch, on whichever rank."""
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
        self, order: words.Train | words.Evaluate, batches: Sequence[BatchArrays], shares: list[list[int]]
    ) -> Iterator[list[Any]]:
        """What came of each rank's share, rank by rank."""
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
            outcomes = self._group.reply_of(rank).outcomes
            yield [
                self._result(order, outcome, batches[place], rank)
                for place, outcome in zip(shares[rank], outcomes, strict=True)
            ]

    def _result(
        self, order: words.Train | words.Evaluate, outcome: words.Outcome, batch: BatchArrays, rank: int
    ) -> Result:
        value = float(outcome.value)
        if outcome.error:
            return (RoundSpoiltError if outcome.error == "spoilt" else NotFiniteError)(outcome.what, value)
        if isinstance(order, words.Evaluate):
            return EvalScore(value, outcome.correct, outcome.scored)
        lambda_TD = self._group.receive_array(batch[0].shape, rank) if order.wants_cut_gradient else None
        return StepResult(value, lambda_TD, outcome.correct, outcome.scored)

    def step(self, round_: int, total_weight: float) -> StepStatistics:
        """As TailTrainer's, on all ranks."""
        with self._group.command(words.Step(tail=self._tail, round=round_, total_weight=total_weight)):
            return self._own.step(round_, total_weight)

    def discard(self) -> None:
        """Drop the round's gradients on all ranks."""
        with self._group.command(words.Discard(tail=self._tail)):
            self._own.discard()

    def state(self) -> dict[str, Tensor]:
        """What training changes, with the shapes of the whole; `gather` has the values."""
        return self._own.state()

    def gather(self) -> Generator[Tensor, None, None]:
        """The tensors of `state`, in its order, whole and on the CPU, one at a time."""
        with self._group.command(words.Gather(tail=self._tail)):
            tensors = self._own.gather()
            try:
                while (tensor := next(tensors, None)) is not None:
                    yield tensor
            finally:
                for _ in tensors:  # where the disk is full, the others still go on to the end
                    pass

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """As TailTrainer's. Only rank 0 needs the tensors, and each rank keeps its part of one at a time."""
        entries = tuple(words.Entry(name=name, shape=tuple(tensor.shape)) for name, tensor in state.items())
        with self._group.command(words.Restore(tail=self._tail, entries=entries)):
            self._own.load_state(Passing(entries, state))

    def close(self) -> None:
        """Let the other ranks free their parts."""
        self._group.forget(self._tail)


def spread(tokens: Sequence[int], ranks: int, *, is_in_step: bool) -> list[list[int]]:
    """Places of batches by rank: the longest first, each to the rank with the fewest tokens.

    Where ranks run in step a pass takes as long as its longest batch: so those of like length meet, one on each rank.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for place in sorted(range(len(tokens)), key=lambda place: -tokens[place]):
        rank = min(range(ranks), key=lambda rank: (len(shares[rank]) if is_in_step else 0, loads[rank]))
        shares[rank].append(place)
        loads[rank] += tokens[place]
    return shares


def _describe(batch: BatchArrays, weight: float) -> words.Part:
    return words.Part(tokens=len(batch[0]), examples=len(batch[1]), labels=len(batch[2]), weight=weight)
