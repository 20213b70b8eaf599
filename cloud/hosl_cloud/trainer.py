"""First-order training of the tail: one forward and backward per device and round, one optimizer step per round.

Shapes: B examples, T tokens of the batch without padding, D width, N labels.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hosl_cloud import objectives
from hosl_cloud.exceptions import BatchError, NotFiniteError, RoundSpoiltError
from hosl_cloud.settings import RunConfig, TailSettings
from hosl_cloud.tail import build_tail, trainable_parameters
from hosl_protocol import Manifest, SettingsError, schedule_factor

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.integer]

_WEIGHT, _OPTIMIZER = "weights/", "optimizer/"


@dataclass(frozen=True)
class StepResult:
    """One device's forward and backward."""

    loss: float
    """Mean loss of this device's batch."""
    cut_gradient_TD: Floats | None
    """λ, the gradient of that loss with respect to the packed activations; None where it was not asked for."""
    correct: int
    scored: int


@dataclass(frozen=True)
class EvalScore:
    """One batch, only evaluated."""

    loss: float
    correct: int
    scored: int


@dataclass(frozen=True)
class StepStatistics:
    """One optimizer step."""

    gradient_norm: float
    """L2 norm of the averaged gradient before clipping."""
    learning_rate: float


class TailTrainer:
    """Holds the tail, the gradients of the round and the optimizer. Not for use by two threads at once.

    Dropout is always off: the device's clean activations have none, and both halves must compute the same function
    for HOSL's loss differences and HO-SFL's projections to mean anything. It also leaves no randomness in a step.
    """

    def __init__(self, bundle: Path, manifest: Manifest, config: RunConfig) -> None:
        """Load the tail. Raises SettingsError, VerbalizerError and BundleError."""
        self.config, self.kind = config, config.task.kind
        self.device = choose_device(config.tail.device)
        if config.tail.threads:
            torch.set_num_threads(config.tail.threads)
        tail, self.head_rows = build_tail(bundle, manifest, config)
        self.tail = tail.to(self.device)
        self.parameters = trainable_parameters(self.tail)
        self.optimizer = make_optimizer(list(self.parameters.values()), config.tail)

    def forward_backward(
        self,
        activations_TD: Floats,
        lengths_B: Integers,
        labels_N: Integers,
        weight: float = 1.0,
        *,
        wants_cut_gradient: bool = True,
    ) -> StepResult:
        """Add `weight` times the gradient of this device's own mean loss to the round's; return its λ.

        λ is neither scaled by `weight` or by the number of devices, nor clipped (HO-SFL step 2). Raises BatchError,
        NotFiniteError where the loss is not finite (other devices' gradients stay), and RoundSpoiltError where only λ
        is not (the round's gradients are dropped).
        """
        h_TD = self._tensor(activations_TD, torch.float32).requires_grad_(wants_cut_gradient)
        score = self._score(h_TD, lengths_B, labels_N)
        torch.autograd.backward(score.loss * weight)
        return StepResult(
            score.loss.item(), self._cut_gradient(h_TD.grad, weight), correct=score.correct, scored=score.scored
        )

    def _cut_gradient(self, gradient_TD: Tensor | None, weight: float) -> Floats | None:
        if gradient_TD is None:
            return None
        lambda_TD = gradient_TD if weight == 1.0 else gradient_TD / weight
        if not torch.isfinite(lambda_TD).all():
            self.discard()
            raise RoundSpoiltError("the gradient at the cut layer", float(lambda_TD.abs().max()))
        return np.asarray(lambda_TD.cpu().numpy())

    def evaluate(self, activations_TD: Floats, lengths_B: Integers, labels_N: Integers) -> EvalScore:
        """Loss and score without gradients. Raises BatchError and NotFiniteError."""
        with torch.no_grad():
            score = self._score(self._tensor(activations_TD, torch.float32), lengths_B, labels_N)
        return EvalScore(score.loss.item(), score.correct, score.scored)

    def _score(self, h_TD: Tensor, lengths_B: Integers, labels_N: Integers) -> objectives.Score:
        if lengths_B.size and int(lengths_B.max()) > self.config.max_length:
            raise BatchError("tokens of an example", f"at most {self.config.max_length}", int(lengths_B.max()))
        if self.config.task.is_image and lengths_B.size and int(lengths_B.min()) != self.config.max_length:
            raise BatchError("positions of an image", self.config.max_length, int(lengths_B.min()))
        lengths, labels = torch.from_numpy(lengths_B.astype(np.int64)), self._tensor(labels_N, torch.int64)
        with self._autocast():
            score = objectives.score(self.kind, self.tail, h_TD, lengths, labels)
        if not math.isfinite(score.loss.item()):
            raise NotFiniteError("the tail's loss", score.loss.item())
        return score

    def _autocast(self) -> AbstractContextManager[None]:
        is_half = self.config.tail.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_half)

    def _tensor(self, array: npt.NDArray[np.generic], dtype: torch.dtype) -> Tensor:
        # A copy: frames arrive in read-only memory, and a gradient is asked for by the tensor's own flag.
        return torch.tensor(array, dtype=dtype, device=self.device)

    def step(self, round_: int, total_weight: float) -> StepStatistics:
        """Average the round's gradients over `total_weight`, clip, and step at the rate of round `round_` (from 1).

        Raises RoundSpoiltError, with the gradients dropped and no weight changed.
        """
        settings = self.config.tail
        gradients = [value.grad for value in self.parameters.values() if value.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / total_weight
        if not math.isfinite(norm):
            self.discard()
            raise RoundSpoiltError("the norm of the tail's gradient", norm)
        clipping = settings.clip_norm / norm if 0.0 < settings.clip_norm < norm else 1.0
        for gradient in gradients:
            gradient.mul_(clipping / total_weight)
        factor = schedule_factor(settings.schedule, settings.warmup_rounds, round_, self.config.rounds)
        self._set_rate(settings.learning_rate * factor)
        self.optimizer.step()
        self.discard()
        return StepStatistics(norm, settings.learning_rate * factor)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def discard(self) -> None:
        """Drop the round's gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """What training changes, at the end of a round: `weights/<name>` and `optimizer/<name>/<key>`, shared."""
        state = {_WEIGHT + name: value.detach() for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            for key, tensor in self.optimizer.state.get(value, {}).items():
                if isinstance(tensor, Tensor):
                    state[f"{_OPTIMIZER}{name}/{key}"] = tensor
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` gave. Raises KeyError where a name is unknown or a weight is missing."""
        moments: dict[int, dict[str, Tensor]] = {}
        places = {name: place for place, name in enumerate(self.parameters)}
        missing = places.keys() - {name.removeprefix(_WEIGHT) for name in state}
        if missing:
            raise KeyError(min(missing))
        with torch.no_grad():
            for entry, tensor in state.items():
                if entry.startswith(_WEIGHT):
                    self.parameters[entry.removeprefix(_WEIGHT)].copy_(tensor)
                else:
                    name, _, key = entry.removeprefix(_OPTIMIZER).rpartition("/")
                    moments.setdefault(places[name], {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.discard()


def choose_device(name: str) -> torch.device:
    """The torch device of `tail.device`. Raises SettingsError where this machine has none of that name."""
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


def make_optimizer(parameters: list[nn.Parameter], settings: TailSettings) -> torch.optim.Optimizer:
    """AdamW or SGD over what trains. Fused: one pass over the weights instead of one per operation."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay, fused=True)
