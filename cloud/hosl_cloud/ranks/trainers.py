"""One rank's part of a tail that several processes compute: sharded by FSDP2, or a whole replica.

FSDP is `ShardedTrainer`; `tail.ranks` in run.toml chooses. Gradients are weighted where they arise and summed, never
averaged: the step is that of one process. Rank 0 leads (ranks/leader.py), the others follow (ranks/follower.py).

A sharded forward or backward is a collective call (ranks/group.py): every rank must run as many of them in the same
order. So a rank with fewer micro-batches runs empty ones, and whether a loss is finite all ranks decide together.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hosl_cloud.exceptions import BatchError, NotFiniteError
from hosl_cloud.ranks import commands
from hosl_cloud.ranks.group import Group
from hosl_cloud.rounds.exchange import BatchArrays
from hosl_cloud.settings import RunConfig
from hosl_cloud.tail import objectives
from hosl_cloud.tail.building import block_list
from hosl_cloud.tail.trainer import (
    EvalScore,
    MicroBatch,
    StepResult,
    StepStatistics,
    TailTrainer,
    choose_device,
    require_finite,
)
from hosl_edge.model.memory import keep_heap_small
from hosl_export.model.halves import Tail
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import Manifest, encode_manifest

LARGE_BYTES = 4 * 1024 * 1024
"""Memory from which a shard that is made whole for a moment goes back to the kernel."""

Result = StepResult | EvalScore | BatchError | NotFiniteError
"""Of one batch, as the trainers' `*_many` methods return it."""


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

    def work(self, batches: Sequence[BatchArrays], order: commands.Train | commands.Evaluate) -> list[Any]:
        """Train or score this rank's batches, as the command says."""
        return (
            self.train_share(batches, order)
            if isinstance(order, commands.Train)
            else self.evaluate_share(batches, order)
        )

    def train_share(self, batches: Sequence[BatchArrays], order: commands.Train) -> list[Any]:
        """Do forward and backward through this rank's batches."""
        weights = [part.weight for part in order.shares[self.group.rank]]
        return self.forward_backward_many(batches, weights, wants_cut_gradient=order.wants_cut_gradient)

    def evaluate_share(self, batches: Sequence[BatchArrays], order: commands.Evaluate) -> list[Any]:
        """Do the forward alone through this rank's batches."""
        return self.evaluate_many(batches)


class ReplicatedTrainer(RankTrainer):
    """The whole tail on each rank. The round's gradients are summed once, before the step, which all ranks make."""

    def step(self, round_: int, total_weight: float) -> StepStatistics:
        """Make the step of one process, on the sum of all ranks' gradients."""
        values = self.parameters.values()
        # A rank without a batch has no gradient yet, and takes part in the sum with zeros.
        for value in values:
            if value.grad is None:
                value.grad = torch.zeros_like(value)
        for work in [dist.all_reduce(value.grad, async_op=True) for value in values]:
            work.wait()
        return super().step(round_, total_weight)


class ShardedTrainer(RankTrainer):
    """A part of every tensor, of its gradient and of its optimizer state. A block is whole while it is computed.

    Every forward and backward is one of all ranks together: a rank that has nothing to do runs an empty batch.
    """

    is_in_step = True

    def _place_tail(self, tail: Tail) -> Tail:
        if self.device.type == "cpu":
            keep_heap_small(LARGE_BYTES)
        # A CPU's norms refuse weights of a smaller type than what they work on; a GPU's autocast casts them back, but
        # what is to be computed in float32 needs them whole.
        is_half = self.config.tail.precision == "bfloat16" and self.device.type != "cpu"
        is_half &= not self.config.subtracts_losses
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
        """Yield what is whole at one time, from the inside out: a block, and on CPUs also a large part of one.

        Several times as much is needed while it travels and its gradients are summed. On CPUs to send much at once
        gains nothing.
        """
        for block in block_list(tail):
            if self.device.type == "cpu":
                yield from (part for part in block.children() if 8 * _size(part) >= _size(block))
            yield block
        yield tail

    def train_share(self, batches: Sequence[BatchArrays], order: commands.Train) -> list[Any]:
        """Do forward and backward through this rank's batches, and through empty ones until all ranks are done."""
        self._passes = 0  # counted by `_train_part`
        results = super().train_share(batches, order)
        while self._passes < order.passes:
            with contextlib.suppress(NotFiniteError):
                self._train_part(self._empty(order.wants_cut_gradient), 0.0)
        return results

    def evaluate_share(self, batches: Sequence[BatchArrays], order: commands.Evaluate) -> list[Any]:
        """Do the forward alone, and through empty batches until all ranks are done."""
        self._passes = 0  # counted as they are made
        results = super().evaluate_share(batches, order)
        while self._passes < order.passes:
            self._evaluate_part(self._empty())
        return results

    def _train_part(self, part: MicroBatch, weight: float) -> objectives.Score:
        """Do one forward and backward. All ranks run the backward, or none does.

        Where some rank's loss is no number, that rank scores an empty batch instead, and all go on from this second
        forward; where its loss is no number either, the tail has diverged, and nobody goes backward.
        """
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

    def _evaluate_part(self, part: MicroBatch) -> objectives.Score:
        self._passes += 1
        score = super()._evaluate_part(part)
        # The outermost part stays whole after a forward, for a backward that does not come.
        self._unwrap().reshard()
        return score

    def _unwrap(self) -> FSDPModule:
        assert isinstance(self.tail, FSDPModule)
        return self.tail

    def _empty(self, wants_cut_gradient: bool = False) -> MicroBatch:
        """Make an example of zeros: what it computes is finite wherever the tail is, and counts for nothing.

        Its gradient takes the way of the others', so that the ranks reduce in the same order.
        """
        tokens = self.config.max_length if self.config.task.is_image else self.tail.prompt_tokens + 2
        labels = torch.zeros(tokens if self.config.task.scores_tokens else 1, dtype=torch.int64, device=self.device)
        h_TD = torch.zeros(tokens, self.width, device=self.device, requires_grad=wants_cut_gradient)
        return MicroBatch(h_TD, torch.tensor([tokens]), labels, share=1.0)

    def _total_norm(self, gradients: list[Tensor]) -> float:
        return math.sqrt(self.group.sum(super()._total_norm([_local(each) for each in gradients]) ** 2))

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _put(self, target: Tensor, whole: Tensor) -> None:
        if isinstance(target, DTensor):
            # As FSDP2 shards: along the first dimension, in as many chunks, of which the last may be missing.
            chunks = torch.chunk(whole, self.group.size)
            whole = chunks[self.group.rank] if self.group.rank < len(chunks) else whole[:0]
        _local(target).copy_(whole)


def _size(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


_TRAINERS: dict[str, type[RankTrainer]] = {"shard": ShardedTrainer, "replicate": ReplicatedTrainer}


def load_part(group: Group, bundle: Path, manifest: Manifest, config: RunConfig) -> RankTrainer:
    """Load this rank's part of a tail, as `tail.ranks` has it. Raises what TailTrainer raises."""
    return _TRAINERS[config.tail.ranks](group, bundle, manifest, config)


class BroadcastTensors(Mapping[str, Tensor]):
    """Tensors that rank 0 has and all others get, each when it is asked for; all ask in the same order."""

    def __init__(self, entries: Sequence[commands.Entry], tensors: Mapping[str, Tensor] | None) -> None:
        self._shapes, self._tensors = {entry.name: entry.shape for entry in entries}, tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self._shapes[name]) if self._tensors is None else self._tensors[name].contiguous()
        dist.broadcast(tensor, 0)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def digest_of(manifest: Manifest) -> str:
    """Make the SHA-256 of a manifest: all ranks must have the same bundle."""
    return hashlib.sha256(encode_manifest(manifest)).hexdigest()
