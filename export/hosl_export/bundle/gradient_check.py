"""The graphs of the gradient against torch's autograd, and what a round with them costs.

From the bundle's files alone, as the forward's check: the graphs run as on a device, from the last block to the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hosl_export.bundle.graph import graph_inputs
from hosl_export.bundle.parity import Case
from hosl_export.bundle.reading import load_client
from hosl_export.bundle.runtime import ShardRuntime
from hosl_export.exceptions import GradientError
from hosl_export.model.halves import ClientHalf, replace_module
from hosl_export.model.lora import is_lora_b
from hosl_export.model.trainable import plain_parameters
from hosl_export.sources.loading import quiet_transformers
from hosl_export.tensor_files import read_tensors
from hosl_protocol.run.manifest import SHARD_WEIGHTS, Manifest

GRADIENT_TOLERANCE = 1e-4
"""Largest difference of a tensor's gradient, as a share of its norm. Float32 gives 1e-7 to 1e-5 here."""

ROUNDING = 1e-3
"""Of the whole gradient's norm, which a tensor's is at least taken for: where others are so much larger, torch and ONNX
Runtime both miss its exact gradient by more than the tolerance."""

NEGLIGIBLE = 1e-5
"""Of the whole gradient's norm: what is smaller is zero in theory, as that of a key's bias, and rounding in practice.
It is compared with the whole."""

KINK = 1e-5
"""Of the root mean square of a ReLU's inputs: what is nearer to 0 may be on its other side in another runtime, and then
has another derivative. Of some millions of inputs a few are."""

LONGEST_GRADIENT = 128
"""Longest text compared, in tokens: autograd holds the scores of all blocks."""


@dataclass(frozen=True)
class GradientCheck:
    """What the check found."""

    error: float
    """Largest difference of a tensor's gradient."""
    forwards: float
    """What the blocks' gradients cost, in forwards of the device's half: operations counted on the last batch."""
    probed: float
    """What a forward costs that starts behind the prefix, likewise."""


def check_gradients(bundle: Path, manifest: Manifest, cases: Iterable[Case]) -> GradientCheck:
    """Compare the gradients of the bundle's graphs with torch's on each batch. Raises GradientError."""
    weights = _with_random_adapters(read_tensors(bundle / SHARD_WEIGHTS))
    client = load_client(bundle, manifest, weights)
    # The graphs' attention, whose operations are counted.
    client.model.set_attn_implementation("eager")
    parameters = {name: parameter.requires_grad_(False) for name, parameter in plain_parameters(client).items()}
    trained = {entry.name: parameters[entry.name].requires_grad_() for entry in manifest.trainable}

    shard, error = ShardRuntime(bundle, manifest, weights), 0.0
    for case in cases:
        case = case.cut(LONGEST_GRADIENT)
        with FlopCounterMode(display=False) as backward:
            cotangent_BTD, expected = _differentiate(client, case, trained)
        scales = _scales(expected)
        # What no graph gives is zero.
        differences = {name: float(gradient.norm()) for name, gradient in expected.items()}
        for name, gradient in shard.gradients(case.graph_feed(), cotangent_BTD):
            differences[name] = float((gradient - expected[name]).norm())
        del expected

        errors = {name: difference / scales[name] for name, difference in differences.items()}
        if max(errors.values()) > GRADIENT_TOLERANCE:
            doubts = _doubts(client, case, trained)
            errors = {name: max(error - doubts[name] / scales[name], 0.0) for name, error in errors.items()}
        for name, relative in errors.items():
            if not relative <= GRADIENT_TOLERANCE:  # a difference that is not a number fails too
                raise GradientError(name, case.name, relative, GRADIENT_TOLERANCE)
        error = max(error, *errors.values())

    total, of_blocks = _count_forward(client, case)
    # Each graph runs its own part of the forward again.
    first = manifest.gradients[0].block
    again = total if first < 0 else sum(of_blocks[first:])
    behind = total if manifest.prefix is None else sum(of_blocks[manifest.prefix.blocks :])
    return GradientCheck(error, (again + backward.get_total_flops() - total) / total, behind / total)


def _forward(client: ClientHalf, case: Case) -> Tensor:
    taken = graph_inputs(client)
    with quiet_transformers():
        h_BTD: Tensor = client(**{name: tensor for name, tensor in case.graph_feed().items() if name in taken})
    return h_BTD


@torch.enable_grad()
def _differentiate(client: ClientHalf, case: Case, trained: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw the gradient of the batch's activations [B, T, D], zero at padding. Returns it, and that of what trains."""
    h_BTD = _forward(client, case)
    noise = torch.randn(h_BTD.shape, generator=torch.Generator().manual_seed(0))
    cotangent_BTD = case.without_padding(noise)
    found = torch.autograd.grad(h_BTD, list(trained.values()), cotangent_BTD, materialize_grads=True)
    return cotangent_BTD, dict(zip(trained, found, strict=True))


def _with_random_adapters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give adapters a B other than zero, through which no gradient would reach their A."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.02 * torch.randn(tensor.shape, generator=generator) if is_lora_b(name) else tensor
        for name, tensor in weights.items()
    }


def _scales(gradients: dict[str, Tensor]) -> dict[str, float]:
    """What a difference of each tensor's gradient is a share of."""
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    whole = math.hypot(*norms.values())
    return {
        name: (max(norm, ROUNDING * whole) if norm > NEGLIGIBLE * whole else whole) or 1.0
        for name, norm in norms.items()
    }


class _Relu(nn.Module):
    """A ReLU whose derivative begins beside 0, at a `margin`: a share of its inputs' root mean square."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        """Return the ReLU of x."""
        values = x.detach()
        return values.clamp(min=0.0) + (x - values) * (values > self.margin * values.square().mean().sqrt())


def _doubts(client: ClientHalf, case: Case, trained: dict[str, Tensor]) -> dict[str, float]:
    """How much of each tensor's gradient hangs on inputs of a ReLU that rounding may put on either side of 0."""
    relus = {path: module for path, module in client.model.named_modules() if isinstance(module, nn.ReLU)}
    if not relus:
        return dict.fromkeys(trained, 0.0)

    sides = []
    for margin in (KINK, -KINK):
        for path in relus:
            replace_module(client.model, path, _Relu(margin))
        sides.append(_differentiate(client, case, trained)[1])
    for path, module in relus.items():
        replace_module(client.model, path, module)
    return {name: float((gradient - sides[1][name]).norm()) for name, gradient in sides[0].items()}


@torch.no_grad()
def _count_forward(client: ClientHalf, case: Case) -> tuple[int, list[int]]:
    """Floating-point operations of the half's forward, and of each of its blocks."""
    with FlopCounterMode(display=False) as counter:
        _forward(client, case)
    counts = counter.get_flop_counts()
    path = f"{type(client).__name__}.model.{client.family.blocks}"
    blocks = range(len(client.model.get_submodule(client.family.blocks)))
    return counter.get_total_flops(), [sum(counts.get(f"{path}.{block}", {}).values()) for block in blocks]
