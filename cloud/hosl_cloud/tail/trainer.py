"""First-order training of the tail: one forward and backward per device and round, one optimizer step per round.

A round's generator calls it (rounds/algorithms.py), on the run's compute thread, which alone may touch it. Between two
steps each parameter's `grad` is the round's Σ w_m grad_m so far: `forward_backward` adds to it, `step` divides it by
the sum of the weights, and `discard` drops it. A batch that is left out must have added nothing, or the sum is spoilt.

The learning rate follows `schedule_factor` (hosl_protocol/run/schedule.py), which `step` applies; its settings are in
`[tail]` (settings.py). For several processes ranks/trainers.py overrides the methods that say so.

Shapes: B examples, T tokens of the batch without padding, D width, N labels.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hosl_cloud.exceptions import BatchError, NotFiniteError, RoundSpoiltError
from hosl_cloud.rounds.exchange import BatchArrays
from hosl_cloud.settings import RunConfig, TailSettings
from hosl_cloud.tail import objectives
from hosl_cloud.tail.building import block_list, build_tail, recompute, trainable_parameters
from hosl_cloud.tail.prefetch import Prefetcher
from hosl_export.model.halves import Tail
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.schedule import schedule_factor

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.integer]

BATCHES_AT_ONCE = 2
"""Devices' batches that a process takes together, where it takes more than one."""

_WEIGHT, _OPTIMIZER = "weights/", "optimizer/"


@dataclass(frozen=True)
class StepResult:
    """The result of one device's forward and backward."""

    loss: float
    """Mean loss of this device's batch."""
    cut_gradient_TD: Floats | None
    """λ, the gradient of that loss with respect to the packed activations; None where it was not asked for."""
    correct: int
    scored: int


@dataclass(frozen=True)
class EvalScore:
    """The score of one batch that is only evaluated."""

    loss: float
    correct: int
    scored: int
    predicted_B: Integers | None = field(default=None, compare=False)
    """The class that each example was given; None where the task has no classes."""


@dataclass(frozen=True)
class StepStatistics:
    """The figures of one optimizer step."""

    gradient_norm: float
    """L2 norm of the averaged gradient before clipping."""
    learning_rate: float


@dataclass(frozen=True)
class MicroBatch:
    """Some examples of a device's batch, on the tail's device."""

    h_TD: Tensor
    """Their activations, a leaf."""
    lengths_B: Tensor
    labels_N: Tensor
    share: float
    """Their part in the mean loss of the batch."""


class TailTrainer:
    """Holds the tail, the gradients of the round and the optimizer. Not for use by two threads at once.

    Dropout is always off: the device's clean activations have none, and both halves must compute the same function
    for HOSL's loss differences and HO-SFL's projections to mean anything. It also leaves no randomness in a step.
    """

    def __init__(self, bundle: Path, manifest: Manifest, config: RunConfig) -> None:
        """Load the tail. Raises SettingsError, VerbalizerError and BundleError."""
        self.config, self.kind = config, config.task.kind
        self.device = self._choose_device()
        forbid_tf32()
        self._prefetcher = Prefetcher(self.device)
        if config.tail.threads:
            torch.set_num_threads(config.tail.threads)

        tail, self.head_rows = build_tail(bundle, manifest, config)
        for place, block in enumerate(block_list(tail)):
            if config.tail.activation_checkpointing:
                recompute(block)
            # Not the first, which a hook gives its activations at each run: torch compiles hooks once.
            if config.tail.compile and place:
                block.compile(dynamic=True)

        # The optimizer last: where ranks share a tensor, placing it makes its parameters anew.
        self.tail = self._place_tail(tail)
        self.parameters = trainable_parameters(self.tail)
        self.optimizer = make_optimizer(list(self.parameters.values()), config.tail)

    def _choose_device(self) -> torch.device:
        """Choose where the tail is computed. A rank takes the GPU of its own number."""
        return choose_device(self.config.tail.device)

    def _place_tail(self, tail: Tail) -> Tail:
        """Put the tail on its device. FSDP shares it out over the ranks instead."""
        return tail.to(self.device)

    @property
    def at_once(self) -> int:
        """Batches that are worth handing over together: on a GPU the next ones travel while one is computed."""
        return 1 if self.device.type == "cpu" else BATCHES_AT_ONCE

    def forward_backward_many(
        self, batches: Sequence[BatchArrays], weights: Sequence[float], *, wants_cut_gradient: bool
    ) -> list[StepResult | BatchError | NotFiniteError]:
        """Do `forward_backward` of each: its result, or the error that left it out."""
        self._prefetcher.start(batches)

        # An error leaves one batch out; the others are still good, and their devices wait for λ.
        results: list[StepResult | BatchError | NotFiniteError] = []
        for batch, weight in zip(batches, weights, strict=True):
            try:
                results.append(self.forward_backward(*batch, weight, wants_cut_gradient=wants_cut_gradient))
            except (BatchError, NotFiniteError) as error:
                results.append(error)
        return results

    def evaluate_many(self, batches: Sequence[BatchArrays]) -> list[EvalScore | BatchError | NotFiniteError]:
        """Do `evaluate` of each: its score, or the error."""
        self._prefetcher.start(batches)
        scores: list[EvalScore | BatchError | NotFiniteError] = []
        for batch in batches:
            try:
                scores.append(self.evaluate(*batch))
            except (BatchError, NotFiniteError) as error:
                scores.append(error)
        return scores

    def forward_backward(
        self,
        activations_TD: Floats,
        lengths_B: Integers,
        labels_N: Integers,
        weight: float = 1.0,
        *,
        wants_cut_gradient: bool = True,
    ) -> StepResult:
        """Add `weight` times the gradient of this device's own mean loss to the round's; return its λ [T, D].

        λ is neither scaled by `weight` or by the number of devices, nor clipped, as HO-SFL has it. Raises BatchError,
        NotFiniteError where the loss is not finite (other devices' gradients stay), and RoundSpoiltError where only λ
        is not, or the loss of a later micro-batch (the round's gradients are dropped).
        """
        parts = self._micro_batches(activations_TD, lengths_B, labels_N)
        scores: list[objectives.Score] = []
        for part in parts:
            part.h_TD.requires_grad_(wants_cut_gradient)  # without, the backward ends at the tail's first weights
            try:
                scores.append(self._train_part(part, weight))
            except NotFiniteError as error:
                if not scores:
                    raise
                # Parts before this one are in the sum already, among other devices' gradients.
                self.discard()
                raise RoundSpoiltError(error.what, error.value) from error

        score = _join(parts, scores)
        gradients = [part.h_TD.grad for part in parts if part.h_TD.grad is not None]
        return StepResult(score.loss, self._join_cut_gradient(gradients, weight), score.correct, score.scored)

    def _train_part(self, part: MicroBatch, weight: float) -> objectives.Score:
        """Do one forward and backward. Raises NotFiniteError, with no gradient added."""
        score = self._score(part)
        torch.autograd.backward(require_finite(score).loss * (weight * part.share))
        return score

    def _join_cut_gradient(self, gradients: list[Tensor], weight: float) -> Floats | None:
        """Put λ [T, D] together from its parts, without the weight; None where none was asked for."""
        if not gradients:
            return None
        gradient_TD = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
        # The backward was of the weighted loss; λ is the gradient of the device's own mean loss.
        lambda_TD = gradient_TD if weight == 1.0 else gradient_TD / weight
        if not torch.isfinite(lambda_TD).all():
            self.discard()
            raise RoundSpoiltError("the gradient at the cut layer", float(lambda_TD.abs().max()))
        return np.asarray(lambda_TD.cpu().numpy())

    def evaluate(self, activations_TD: Floats, lengths_B: Integers, labels_N: Integers) -> EvalScore:
        """Score a batch without gradients. Raises BatchError and NotFiniteError."""
        parts = self._micro_batches(activations_TD, lengths_B, labels_N)
        scores = [require_finite(self._evaluate_part(part)) for part in parts]
        predicted = [score.predicted_B.cpu().numpy() for score in scores if score.predicted_B is not None]
        return _join(parts, scores, np.concatenate(predicted) if predicted else None)

    def _evaluate_part(self, part: MicroBatch) -> objectives.Score:
        """Do one forward. HOSL subtracts losses of weights that hardly differ: of those bfloat16 leaves only noise."""
        with torch.no_grad():
            return self._score(part, is_exact=self.config.subtracts_losses)

    def check(self, activations_TD: Floats, lengths_B: Integers, labels_N: Integers) -> None:
        """Raise BatchError for a batch that a well-behaved device would not send."""
        if lengths_B.size and int(lengths_B.max()) > self.config.max_length:
            raise BatchError("tokens of an example", f"at most {self.config.max_length}", int(lengths_B.max()))
        if self.config.task.is_image and lengths_B.size and int(lengths_B.min()) != self.config.max_length:
            raise BatchError("positions of an image", self.config.max_length, int(lengths_B.min()))
        lengths, labels = torch.from_numpy(lengths_B.astype(np.int64)), torch.from_numpy(labels_N.astype(np.int64))
        objectives.check_batch(self.kind, self.tail, len(activations_TD), lengths, labels)

    def _micro_batches(self, activations_TD: Floats, lengths_B: Integers, labels_N: Integers) -> list[MicroBatch]:
        """Check a batch, put it on the tail's device, and split it into parts of `tail.micro_batch_tokens`.

        Raises BatchError, and NotFiniteError where part of it might be added up before another is found not to be
        finite.
        """
        self.check(activations_TD, lengths_B, labels_N)
        rows = split_rows(lengths_B, self.config.tail.micro_batch_tokens)
        if len(rows) > 1 and not np.isfinite(activations_TD).all():
            raise NotFiniteError("an activation", math.nan)

        h_TD, labels = (
            self._prefetcher.take(activations_TD, torch.float32),
            self._prefetcher.take(labels_N, torch.int64),
        )
        lengths, ends = torch.from_numpy(lengths_B.astype(np.int64)), np.concatenate([[0], np.cumsum(lengths_B)])
        parts, counts = [], []
        for row in rows:
            tokens = slice(int(ends[row.start]), int(ends[row.stop]))
            own = tokens if self.config.task.scores_tokens else row
            counts.append(objectives.targets(self.kind, self.tail, lengths[row], torch.from_numpy(labels_N[own])))
            parts.append(MicroBatch(h_TD[tokens].detach(), lengths[row], labels[own], share=1.0))

        # By predictions, not by examples: the parts' mean losses then add up to the batch's.
        whole = max(sum(counts), 1)
        if len(rows) > 1:
            parts = [replace(part, share=count / whole) for part, count in zip(parts, counts, strict=True)]
        return parts

    def _score(self, part: MicroBatch, *, is_exact: bool = False) -> objectives.Score:
        """Do the forward to the loss, in the run's precision, or in float32 where it is to be exact."""
        is_half = self.config.tail.precision == "bfloat16" and not is_exact
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_half):
            return objectives.score(self.kind, self.tail, part.h_TD, part.lengths_B, part.labels_N)

    def step(self, round_: int, total_weight: float) -> StepStatistics:
        """Average the round's gradients over `total_weight`, clip, and step at the rate of round `round_` (from 1).

        Raises RoundSpoiltError, with the gradients dropped and no weight changed.
        """
        # The norm is of the average, so that clipping does not depend on how many devices there are.
        settings = self.config.tail
        gradients = [value.grad for value in self.parameters.values() if value.grad is not None]
        norm = self._total_norm(gradients) / total_weight
        if not math.isfinite(norm):
            self.discard()
            raise RoundSpoiltError("the norm of the tail's gradient", norm)

        clipping = settings.clip_norm / norm if 0.0 < settings.clip_norm < norm else 1.0
        for gradient in gradients:
            gradient.mul_(clipping / total_weight)

        factor = schedule_factor(settings.schedule, settings.warmup_rounds, round_, self.config.rounds)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        self.optimizer.step()
        self.discard()
        return StepStatistics(norm, settings.learning_rate * factor)

    def _total_norm(self, gradients: list[Tensor]) -> float:
        return float(torch.nn.utils.get_total_norm(gradients))

    def discard(self) -> None:
        """Drop the round's gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Name what training changes, at the end of a round: `weights/<name>` and `optimizer/<name>/<key>`.

        The tensors are the trainer's own, not copies, and of a rank its part; `gather` gives them whole.
        """
        state = {_WEIGHT + name: value.detach() for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            # In one order, whether the optimizer made its state or was given it: a checkpoint's bytes follow it.
            for key, tensor in sorted(self.optimizer.state.get(value, {}).items()):
                if isinstance(tensor, Tensor):
                    state[f"{_OPTIMIZER}{name}/{key}"] = tensor
        return state

    def gather(self) -> Generator[Tensor, None, None]:
        """Yield the tensors of `state`, in its order, whole and on the CPU, one at a time."""
        for tensor in self.state().values():
            yield self._whole(tensor).cpu()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave, taken one at a time. Raises KeyError where a name is unknown or a weight is
        missing."""
        moments: dict[int, dict[str, Tensor]] = {}
        places = {name: place for place, name in enumerate(self.parameters)}
        missing = places.keys() - {name.removeprefix(_WEIGHT) for name in state}
        if missing:
            raise KeyError(min(missing))

        with torch.no_grad():
            for entry, tensor in state.items():
                if entry.startswith(_WEIGHT):
                    self._put(self.parameters[entry.removeprefix(_WEIGHT)], tensor)
                else:
                    # A scalar is the count of steps; all else has the shape, and on ranks the parts, of its weight.
                    name, _, key = entry.removeprefix(_OPTIMIZER).rpartition("/")
                    value = torch.zeros_like(self.parameters[name]) if tensor.ndim else torch.zeros(())
                    self._put(value, tensor)
                    moments.setdefault(places[name], {})[key] = value

        # The groups hold the settings, which are this run's; the state alone is the checkpoint's.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.discard()

    def _whole(self, tensor: Tensor) -> Tensor:
        """Give a tensor of the state whole; a rank of FSDP gathers it from the others."""
        return tensor

    def _put(self, target: Tensor, whole: Tensor) -> None:
        """Give a tensor its value; a rank of FSDP takes its part of it."""
        target.copy_(whole)

    def close(self) -> None:
        """End the trainer's use; ranks then free their parts."""


def require_finite(score: objectives.Score) -> objectives.Score:
    """Pass a score on. Raises NotFiniteError where its loss is no number."""
    if not math.isfinite(score.loss.item()):
        raise NotFiniteError("the tail's loss", score.loss.item())
    return score


def split_rows(lengths_B: Integers, most_tokens: int) -> list[slice]:
    """Split a batch into runs of examples of at most `most_tokens` with their padding, or of one; 0 does not split."""
    rows, start, longest = [], 0, 0
    for row, length in enumerate(lengths_B.tolist()):
        longest = max(longest, length)
        if most_tokens and row > start and (row + 1 - start) * longest > most_tokens:
            rows.append(slice(start, row))
            start, longest = row, length
    return [*rows, slice(start, len(lengths_B))]


def _join(
    parts: Sequence[MicroBatch], scores: Sequence[objectives.Score], predicted_B: Integers | None = None
) -> EvalScore:
    """Put the score of a whole batch together."""
    loss = sum(part.share * score.loss.item() for part, score in zip(parts, scores, strict=True))
    correct, scored = sum(score.correct for score in scores), sum(score.scored for score in scores)
    return EvalScore(loss, correct, scored, predicted_B)


def choose_device(name: str) -> torch.device:
    """Choose the torch device of `tail.device`. Raises SettingsError where this machine has none of that name."""
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError("tail.device", name, "use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not (has_cuda and (device.index or 0) < torch.cuda.device_count()):
        raise SettingsError("tail.device", name, "this machine has no such device; use auto or cpu")
    return device


def forbid_tf32() -> None:
    """Let float32 on a GPU be float32: by itself torch gives convolutions TF32 there, of fewer digits than float16."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def make_optimizer(parameters: list[nn.Parameter], settings: TailSettings) -> torch.optim.Optimizer:
    """Make AdamW or SGD over what trains. Fused: one pass over the weights instead of one per operation.

    For tensors of which each rank holds a part torch has no fused SGD.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    is_whole = not any(isinstance(value, DTensor) for value in parameters)
    return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay, fused=is_whole)
