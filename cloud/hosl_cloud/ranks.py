"""A tail that several processes compute: sharded by FSDP2, or replicated, and a round's devices spread over them.

Rank 0 holds a GroupTrainer, which rounds and checkpoints use as they use the trainer of one process; the other ranks
run `follow`. Gradients are weighted where they arise and summed, never averaged: the step is that of one process.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hosl_cloud import group as words
from hosl_cloud import objectives
from hosl_cloud.exceptions import BatchError, NotFiniteError, RankLoadError, RankLostError, RoundSpoiltError
from hosl_cloud.exchange import BatchArrays
from hosl_cloud.group import Group
from hosl_cloud.settings import RunConfig
from hosl_cloud.tail import block_list
from hosl_cloud.trainer import (
    BATCHES_AT_ONCE,
    EvalScore,
    MicroBatch,
    StepResult,
    StepStatistics,
    TailTrainer,
    choose_device,
    require_finite,
    split_rows,
)
from hosl_edge.memory import keep_heap_small
from hosl_export.halves import Tail
from hosl_protocol import (
    BundleError,
    ExitCode,
    HoslError,
    Manifest,
    SettingsError,
    check_files,
    encode_manifest,
    load_manifest,
)

LARGE_BYTES = 4 * 1024 * 1024
"""Memory from which a shard that is made whole for a moment goes back to the kernel."""

Result = StepResult | EvalScore | BatchError | NotFiniteError


class RankTrainer(TailTrainer):
    """One rank's part of the tail and of the work."""

    is_in_step = False
    """Whether all ranks must run as many passes."""

    def __init__(self, group: Group, bundle: Path, manifest: Manifest, config: RunConfig) -> None:
        self.group, self.width = group, manifest.width
        super().__init__(bundle, manifest, config)

    def _choose_device(self) -> torch.device:
        name = self.config.tail.device
        device = choose_device(name)
        if device.type == "cpu":
            return device
        if ":" in name or self.group.local_rank >= torch.cuda.device_count():
            raise SettingsError("tail.device", name, "each rank takes the GPU of its own number: use auto")
        device = torch.device("cuda", self.group.local_rank)
        torch.cuda.set_device(device)  # of this thread
        return device

    def train(self, batches: Sequence[BatchArrays], order: words.Train) -> list[Any]:
        """Forward and backward through this rank's batches, in step with the others."""
        weights = [part.weight for part in order.shares[self.group.rank]]
        return self.forward_backward_many(batches, weights, wants_cut_gradient=order.wants_cut_gradient)

    def look(self, batches: Sequence[BatchArrays], order: words.Evaluate) -> list[Any]:
        """Forward alone, in step with the others."""
        return self.evaluate_many(batches)


class Replica(RankTrainer):
    """The whole tail on each rank. The round's gradients are summed once, before the step, which all ranks make."""

    def step(self, round_: int, total_weight: float) -> StepStatistics:
        """As that of one process, on the sum of all ranks' gradients."""
        values = self.parameters.values()
        for value in values:
            if value.grad is None:
                value.grad = torch.zeros_like(value)
        for work in [dist.all_reduce(value.grad, async_op=True) for value in values]:
            work.wait()
        return super().step(round_, total_weight)


class Shard(RankTrainer):
    """A part of every tensor, of its gradient and of its optimizer state. A block is whole while it is computed.

    Every forward and backward is one of all ranks together: a rank that has nothing to do runs an empty batch.
    """

    is_in_step = True

    def _place(self, tail: Tail) -> Tail:
        if self.device.type == "cpu":
            keep_heap_small(LARGE_BYTES)
        # A CPU's norms refuse weights of a smaller type than what they work on; a GPU's autocast casts them back.
        is_half = self.config.tail.precision == "bfloat16" and self.device.type != "cpu"
        half = torch.bfloat16 if is_half else None
        # OPT's blocks return a view, of which FSDP warns; nothing works on it in place.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")
        # Autocast decides what is computed in which type; the policy has the weights travel in the smaller one.
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in self._units(tail):
            shard = fully_shard(module, mesh=self.group.meshes[self.device.type], mp_policy=policy)
            # A sum instead of an average, which gloo does not have.
            shard.set_gradient_divide_factor(1.0)
            shard.set_force_sum_reduction_for_comms(True)
        return tail

    def _units(self, tail: Tail) -> Iterator[nn.Module]:
        """What is whole at one time, from the inside out: a block; on CPUs, where to send much at once gains nothing,
        a large part of one. Several times as much is needed while it travels and its gradients are summed."""
        for block in block_list(tail):
            if self.device.type == "cpu":
                yield from (part for part in block.children() if 8 * _size(part) >= _size(block))
            yield block
        yield tail

    def train(self, batches: Sequence[BatchArrays], order: words.Train) -> list[Any]:
        """Forward and backward through this rank's batches, and through empty ones until all ranks are done."""
        self._passes = 0
        results = super().train(batches, order)
        while self._passes < order.passes:
            with contextlib.suppress(NotFiniteError):
                self._pass(self._empty(order.wants_cut_gradient), 0.0)
        return results

    def look(self, batches: Sequence[BatchArrays], order: words.Evaluate) -> list[Any]:
        """Forward alone, and through empty batches until all ranks are done."""
        self._passes = 0
        results = super().look(batches, order)
        while self._passes < order.passes:
            self._look(self._empty())
        return results

    def _pass(self, part: MicroBatch, weight: float) -> objectives.Score:
        """One forward and backward. All ranks run the backward, or none does."""
        self._passes += 1
        score = self._score(part)
        is_finite = math.isfinite(score.loss.item())
        if self.group.is_true_everywhere(is_finite):
            torch.autograd.backward(score.loss * (weight * part.share))
            return score
        again = self._score(part if is_finite else self._empty(part.h_TD.requires_grad))
        if not self.group.is_true_everywhere(math.isfinite(again.loss.item())):
            self._unwrap().reshard()
            raise NotFiniteError("the tail's loss", math.nan)
        torch.autograd.backward(again.loss * (weight * part.share if is_finite else 0.0))
        return require_finite(score)

    def _look(self, part: MicroBatch) -> objectives.Score:
        self._passes += 1
        score = super()._look(part)
        # The outermost part stays whole after a forward, for a backward that does not come.
        self._unwrap().reshard()
        return score

    def _unwrap(self) -> FSDPModule:
        assert isinstance(self.tail, FSDPModule)
        return self.tail

    def _empty(self, wants_cut_gradient: bool = False) -> MicroBatch:
        """An example of zeros: what it computes is finite wherever the tail is, and counts for nothing.

        Its gradient takes the way of the others', so that the ranks reduce in the same order.
        """
        tokens = self.config.max_length if self.config.task.is_image else 2
        labels = torch.zeros(tokens if self.kind == "lm" else 1, dtype=torch.int64, device=self.device)
        h_TD = torch.zeros(tokens, self.width, device=self.device, requires_grad=wants_cut_gradient)
        return MicroBatch(h_TD, torch.tensor([tokens]), labels, share=1.0)

    def _total_norm(self, gradients: list[Tensor]) -> float:
        return math.sqrt(self.group.sum(super()._total_norm([_local(each) for each in gradients]) ** 2))

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _put(self, target: Tensor, whole: Tensor) -> None:
        if isinstance(target, DTensor):
            chunks = torch.chunk(whole, self.group.size)
            whole = chunks[self.group.rank] if self.group.rank < len(chunks) else whole[:0]
        _local(target).copy_(whole)


def _size(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


_TRAINERS: dict[str, type[RankTrainer]] = {"shard": Shard, "replicate": Replica}


class GroupTrainer:
    """The tail of all ranks, as rank 0 uses it; see hosl_cloud.exchange.Trainer."""

    def __init__(self, group: Group, bundle: Path, manifest: Manifest, config: RunConfig) -> None:
        """Load the tail on all ranks. Raises what TailTrainer raises, and RankLoadError for another rank's error."""
        self._group, self._tail = group, group.next_tail()
        load = words.Load(tail=self._tail, bundle=str(bundle), digest=_digest(manifest), config=config)
        with group.command(load):
            error: Exception | None = None
            try:
                self._own = _TRAINERS[config.tail.ranks](group, bundle, manifest, config)
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
        yield _work(self._own, order, [batches[place] for place in shares[0]])
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
            self._own.load_state(_Passing(entries, state))

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


def _work(trainer: RankTrainer, order: words.Train | words.Evaluate, batches: Sequence[BatchArrays]) -> list[Any]:
    return trainer.train(batches, order) if isinstance(order, words.Train) else trainer.look(batches, order)


class _Passing(Mapping[str, Tensor]):
    """Tensors that rank 0 has and all others get, each when it is asked for; all ask in the same order."""

    def __init__(self, entries: Sequence[words.Entry], tensors: Mapping[str, Tensor] | None) -> None:
        self._shapes, self._tensors = {entry.name: entry.shape for entry in entries}, tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self._shapes[name]) if self._tensors is None else self._tensors[name].contiguous()
        dist.broadcast(tensor, 0)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def follow(group: Group) -> int:
    """Obey rank 0 until it leaves; the exit code. Raises RankLostError.

    The launcher passes signals on to every rank: here they are left to rank 0, which ends the round first.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    tails: dict[int, RankTrainer] = {}
    try:
        while not isinstance(command := group.hear(), words.Leave):
            _obey(group, tails, command)
        dist.destroy_process_group()
    except Exception as error:
        raise RankLostError(group.rank, error) from error
    return int(ExitCode.OK)


def _obey(group: Group, tails: dict[int, RankTrainer], command: words.Command) -> None:
    if isinstance(command, words.Load):
        group.reply(_load(group, tails, command))
    elif isinstance(command, words.Train | words.Evaluate):
        trainer = tails[command.tail]
        batches = [group.receive_batch(part, trainer.width) for part in command.shares[group.rank]]
        _answer(group, _work(trainer, command, batches))
    elif isinstance(command, words.Step):
        with contextlib.suppress(RoundSpoiltError):  # rank 0 has it, too
            tails[command.tail].step(command.round, command.total_weight)
    elif isinstance(command, words.Discard):
        tails[command.tail].discard()
    elif isinstance(command, words.Gather):
        for _ in tails[command.tail].gather():
            pass
    elif isinstance(command, words.Restore):
        tails[command.tail].load_state(_Passing(command.entries, None))
    elif isinstance(command, words.Forget):
        tails.pop(command.tail, None)
    else:
        group.is_true_everywhere(True)


def _load(group: Group, tails: dict[int, RankTrainer], command: words.Load) -> words.Reply:
    bundle = Path(command.bundle)
    try:
        manifest = load_manifest(bundle)
        if _digest(manifest) != command.digest:
            raise BundleError(f"{bundle} is another bundle than rank 0 has at this path: copy that one here")
        if group.local_rank == 0:  # once on each machine; rank 0 has checked its own
            check_files(bundle, manifest)
        tails[command.tail] = _TRAINERS[command.config.tail.ranks](group, bundle, manifest, command.config)
    except HoslError as error:
        return words.Reply(error=str(error), exit_code=int(error.exit_code))
    except Exception as error:
        return words.Reply(error=f"{type(error).__name__}: {error}", exit_code=int(ExitCode.INTERNAL))
    return words.Reply()


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(encode_manifest(manifest)).hexdigest()


def _answer(group: Group, results: Sequence[Result]) -> None:
    """Say what came of each batch, and then send λ of those that have one."""
    group.reply(words.Reply(outcomes=tuple(map(_outcome, results))))
    for result in results:
        if isinstance(result, StepResult) and result.cut_gradient_TD is not None:
            group.send_array(result.cut_gradient_TD)


def _outcome(result: Result) -> words.Outcome:
    if isinstance(result, NotFiniteError):
        error = "spoilt" if isinstance(result, RoundSpoiltError) else "not-finite"
        return words.Outcome(error=error, what=result.what, value=repr(result.value))
    assert not isinstance(result, BatchError)  # rank 0 has checked it
    return words.Outcome(value=repr(result.loss), correct=result.correct, scored=result.scored)
