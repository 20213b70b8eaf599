"""The graphs of the gradient against torch's autograd, and what a round with them costs.

From the bundle's files alone, as the forward's check: the graphs run as on a device, from the last block to the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hosl_export.bundle.graph import graph_inputs
from hosl_export.bundle.parity import Case
from hosl_export.bundle.reading import load_client
from hosl_export.bundle.runtime import ShardRuntime
from hosl_export.exceptions import GradientError
from hosl_export.model.halves import ClientHalf
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
        with quiet_transformers():
            h_BTD = _forward(client, case)
        noise = torch.randn(h_BTD.shape, generator=torch.Generator().manual_seed(0))
        cotangent_BTD = case.without_padding(noise)
        with FlopCounterMode(display=False) as backward:
            found = torch.autograd.grad(h_BTD, list(trained.values()), cotangent_BTD, materialize_grads=True)
        given = shard.gradients(case.graph_feed(), cotangent_BTD)
        error = max(error, _compare(case.name, given, dict(zip(trained, found, strict=True))))

    total, of_blocks = _count_forward(client, case)
    # Each graph runs its own part of the forward again.
    first = manifest.gradients[0].block
    again = total if first < 0 else sum(of_blocks[first:])
    behind = total if manifest.prefix is None else sum(of_blocks[manifest.prefix.blocks :])
    return GradientCheck(error, (again + backward.get_total_flops()) / total, behind / total)


def _forward(client: ClientHalf, case: Case) -> Tensor:
    taken = graph_inputs(client)
    h_BTD: Tensor = client(**{name: tensor for name, tensor in case.graph_feed().items() if name in taken})
    return h_BTD


def _with_random_adapters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give adapters a B other than zero, through which no gradient would reach their A."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.02 * torch.randn(tensor.shape, generator=generator) if is_lora_b(name) else tensor
        for name, tensor in weights.items()
    }


def _compare(batch: str, given: Iterable[tuple[str, Tensor]], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of a tensor's gradient, relative to its norm; what is not given is zero."""
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    whole = math.hypot(*norms.values())
    errors = dict(norms)
    for name, gradient in given:
        errors[name] = float((gradient - expected[name]).norm())

    largest = 0.0
    for name, error in errors.items():
        scale = max(norms[name], ROUNDING * whole) if norms[name] > NEGLIGIBLE * whole else whole
        relative = error / scale if scale else error
        if not relative <= GRADIENT_TOLERANCE:  # a difference that is not a number fails too
            raise GradientError(name, batch, relative, GRADIENT_TOLERANCE)
        largest = max(largest, relative)
    return largest


@torch.no_grad()
def _count_forward(client: ClientHalf, case: Case) -> tuple[int, list[int]]:
    """Floating-point operations of the half's forward, and of each of its blocks."""
    with FlopCounterMode(display=False) as counter:
        _forward(client, case)
    counts = counter.get_flop_counts()
    path = f"{type(client).__name__}.model.{client.family.blocks}"
    blocks = range(len(client.model.get_submodule(client.family.blocks)))
    return counter.get_total_flops(), [sum(counts.get(f"{path}.{block}", {}).values()) for block in blocks]
