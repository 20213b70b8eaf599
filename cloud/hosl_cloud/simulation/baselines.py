"""What the papers compare with, in a simulation only: first-order training of both halves, zeroth-order of both.

The course of the run, the data, the tail and the wire are those of the real algorithms; only the named part differs.
Shapes: B examples, L padded length, T tokens without padding, D width of the cut layer, P directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hosl_cloud import metrics
from hosl_cloud.rounds.anchors import RoundResult, make_update
from hosl_cloud.rounds.evaluation import evaluate_batches
from hosl_cloud.rounds.exchange import Ask, CloudRound, Doubles, Exchange, Tally, Tell, batch_of, first
from hosl_cloud.settings import RunConfig
from hosl_cloud.tail.trainer import TailTrainer
from hosl_edge import rounds
from hosl_edge.data.datasets import Batch
from hosl_export.model.halves import ClientHalf
from hosl_export.model.lora import plain_name
from hosl_protocol.arithmetic.directions import Stream, philox
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.schedule import schedule_factor, scheduled_rate
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.messages import Anchor, CutGradient, Probe, ProbeLoss, Projections

Floats = npt.NDArray[np.float32]


def prepare_config(config: RunConfig) -> RunConfig:
    """Make the settings under which a baseline goes through the real code: it borrows a round. Raises SettingsError."""
    if config.baseline == "first-order":
        return msgspec.structs.replace(config, algorithm="ho-sfl", directions=1, anchor="clean")
    if config.baseline == "zeroth-order":
        if config.wire_dtype != "float32":
            raise SettingsError("wire_dtype", config.wire_dtype, "this baseline subtracts losses, which needs float32")
        # No clean activations are needed: the tail makes no first-order step.
        return msgspec.structs.replace(config, algorithm="hosl", anchor="midpoint")
    return config


class FirstOrderClient:
    """A client half that backpropagates λ: what HO-SFL estimates, computed.

    Its trainable weights are the shard's own memory, so that ONNX Runtime's forwards see every step.
    """

    def __init__(self, half: ClientHalf, config: RunConfig) -> None:
        self.half, self.config = half, config
        self.parameters = [value for value in half.model.parameters() if value.requires_grad]
        self.optimizer = _make_optimizer(self.parameters, config)
        self._total = 0.0
        self.tally = Tally()

    def round(self, context: rounds.DeviceRound, batch: Batch) -> rounds.Step:
        """Do a round of HO-SFL with the true gradient: activations up, λ down, and numbers that move nothing up."""
        set_TD = context.shard.activations(batch, context.empty_set(batch))
        tensors = {"activations": set_TD, "lengths": batch.lengths_B, "labels": batch.labels_N}
        yield rounds.Send(Anchor(**context.name(0)), tensors)
        reply = yield rounds.Receive(CutGradient)
        assert reply is not None
        assert isinstance(reply.message, CutGradient)
        self.backward(batch, np.ldexp(reply.tensors["lambda"], reply.message.exponent))
        self._count_aggregation()
        yield rounds.Send(Projections(**context.name(1)), {"projections": np.zeros(1, np.float32)})

    def backward(self, batch: Batch, lambda_TD: Floats) -> None:
        """Add this batch's gradient, by λ [T, D], to what `apply` averages."""
        weight = float(len(batch.lengths_B)) if self.config.devices.weighting == "examples" else 1.0
        inputs = {name: torch.from_numpy(array) for name, array in batch.inputs(slice(None)).items()}
        names = ("pixel_values",) if self.half.image is not None else ("input_ids", "attention_mask")
        h_BLD: Tensor = self.half(**{name: inputs[name] for name in names})
        rows = [h_BLD[row, :length] for row, length in enumerate(batch.lengths_B.tolist())]
        torch.autograd.backward(torch.cat(rows), torch.from_numpy(lambda_TD) * weight)
        self._total += weight

    def _count_aggregation(self) -> None:
        """Count what a device would send, its gradient, and get, the average: as many bytes as what trains."""
        size = sum(4 * parameter.numel() for parameter in self.parameters)
        metrics.wire_bytes.labels("received", "client-gradient").inc(size)
        metrics.wire_bytes.labels("sent", "client-gradient").inc(size)
        self.tally.wire_bytes += 2 * size

    def apply(self, update: UpdateRecord) -> None:
        """Make one optimizer step on the average over the round's devices."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= max(self._total, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled_rate(self.config.client, update.round, self.config.rounds)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._total = 0.0


def _make_optimizer(parameters: list[nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    client = config.client
    if client.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=client.learning_rate)
    return torch.optim.AdamW(
        parameters,
        lr=client.learning_rate,
        betas=(client.beta1, client.beta2),
        eps=client.epsilon,
        weight_decay=client.weight_decay,
    )


def share_weights(half: ClientHalf, weights: dict[str, Floats], trainable: set[str]) -> None:
    """Let what trains live in `weights`, and stop gradients of the rest."""
    for name, parameter in half.model.named_parameters():
        is_trained = plain_name(name) in trainable
        parameter.requires_grad_(is_trained)
        if is_trained:
            parameter.data = torch.from_numpy(weights[plain_name(name)])


def zeroth_order_round(context: CloudRound) -> Exchange[RoundResult | None]:
    """Train both halves by two-sided estimates along a direction that runs through both, as MeZO (arXiv 2305.17333)."""
    assert isinstance(context.trainer, TailTrainer)
    yield from context.start()
    config, trainer = context.config, context.trainer
    losses: dict[str, Doubles] = {device: np.full((config.directions, 2), np.nan) for device in context.devices}
    weights: dict[str, float] = {}

    # Direction by direction: the tail can be at one perturbed point at a time, and all devices are scored there.
    for direction in range(config.directions):
        for side, sign in enumerate((+1, -1)):
            asks = [Ask(device, Probe, context.round, direction, sign) for device in context.devices]
            with _perturbed(trainer, context, direction, sign * config.probe_step):
                while asks:
                    ask, frame = yield from first(asks)
                    if frame is None:
                        continue
                    weights[ask.device] = context.weight(batch_of(frame))
                    for _, _, score in (yield from evaluate_batches(context, [(ask, frame)])):
                        losses[ask.device][direction, side] = score.loss
                        reply = ProbeLoss(**context.name(0), direction=direction, sign=+1 if sign > 0 else -1)
                        yield Tell(ask.device, reply, {"loss": np.float32(score.loss).reshape(())})
    if not weights:
        return None

    differences = {device: losses[device][:, 0] - losses[device][:, 1] for device in weights}
    estimates = context.combine(differences, weights) / (2.0 * config.probe_step * config.directions)
    _step_tail(trainer, context, estimates)

    update = make_update(context, estimates)
    loss = float(np.mean([np.mean(losses[device]) for device in weights]))
    return RoundResult(update, loss, tuple(device for device in context.devices if device in weights))


@contextmanager
def _perturbed(trainer: TailTrainer, context: CloudRound, direction: int, scale: float) -> Iterator[None]:
    """Hold the tail at θ_s + scale · z; afterwards it is at θ_s, bit for bit."""
    # Copied, not subtracted again: floats do not come back to the same bits.
    kept = [parameter.detach().clone() for parameter in trainer.parameters.values()]
    for parameter, z in _directions(trainer, context, direction):
        parameter.data.add_(z, alpha=scale)
    try:
        yield
    finally:
        for parameter, value in zip(trainer.parameters.values(), kept, strict=True):
            parameter.data.copy_(value)


def _directions(trainer: TailTrainer, context: CloudRound, direction: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each trainable tensor of the tail and its part of the direction: signs, or normals as the run says."""
    # The devices' seed and directions; an index beyond their tensors gives the tail a stream of its own.
    words = philox(context.config.seed, context.round, direction, Stream.SIGNS, index=2**32).random_raw()
    generator = torch.Generator(device=trainer.device).manual_seed(int(words) >> 1)
    for parameter in trainer.parameters.values():
        if context.config.distribution == "gaussian":
            z = torch.randn(parameter.shape, generator=generator, device=trainer.device)
        else:
            z = torch.randint(0, 2, parameter.shape, generator=generator, device=trainer.device).float() * 2 - 1
        yield parameter, z


def _step_tail(trainer: TailTrainer, context: CloudRound, estimates: Doubles) -> None:
    """Step the tail's optimizer on Σ_p estimate_p · z_p as the gradient; nothing is clipped."""
    for direction, estimate in enumerate(estimates.tolist()):
        for parameter, z in _directions(trainer, context, direction):
            parameter.grad = estimate * z if parameter.grad is None else parameter.grad.add_(z, alpha=estimate)
    tail = context.config.tail
    factor = schedule_factor(tail.schedule, tail.warmup_rounds, context.round, context.config.rounds)
    for group in trainer.optimizer.param_groups:
        group["lr"] = tail.learning_rate * factor
    trainer.optimizer.step()
    trainer.discard()
