"""LoRA as PEFT does it: put adapters in, name them as a checkpoint does, and fold them. Exporter and cloud share it.

A module inside a model that PEFT changed is `q_proj.base_layer.weight` and `q_proj.lora_A.default.weight`; in shards,
checkpoints and everywhere outside this module it is `q_proj.weight` and `q_proj.lora_A.weight`, the plain names.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hosl_export.model.family import Family
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import LoraEntry

_A, _B = ".lora_A.weight", ".lora_B.weight"

MAX_ALPHA = 2**16
"""Far above any that is used."""


ALL_LINEAR = "all-linear"
"""PEFT's word for every matrix of the blocks."""


def choose_lora(
    model: nn.Module, family: Family, rank: int | None, alpha: int | None, targets: tuple[str, ...]
) -> LoraEntry:
    """Make the entry of adapters that fit the blocks of the uncut `model`, whose weights need no values.

    `targets` are names as in PEFT's `target_modules`, or `all-linear`; none are the family's. Raises SettingsError.
    """
    matrices = {
        path: module.weight
        for block in model.get_submodule(family.blocks).children()
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    names = sorted({path.rpartition(".")[2] for path in matrices})
    chosen = targets or family.lora_targets
    if chosen == (ALL_LINEAR,):
        chosen = tuple(names)

    sizes = []
    for target in chosen:
        found = [min(weight.shape) for path, weight in matrices.items() if f".{path}".endswith(f".{target}")]
        if not found:
            few = ", ".join(names)
            raise SettingsError("lora-targets", target, f"no block has such a matrix: use {few}, or {ALL_LINEAR} alone")
        sizes += found

    default = LoraEntry(targets=chosen)
    r, alpha = default.r if rank is None else rank, default.alpha if alpha is None else alpha
    if not 1 <= r <= min(sizes):
        remedy = f"use 1 to {min(sizes)}, the smallest dimension of a matrix that is adapted"
        raise SettingsError("lora-rank", r, remedy)
    if not 1 <= alpha <= MAX_ALPHA:
        raise SettingsError("lora-alpha", alpha, f"use 1 to {MAX_ALPHA}; adapters are scaled by alpha / rank")
    return LoraEntry(r=r, alpha=alpha, targets=chosen)


def inject_lora(model: nn.Module, lora: LoraEntry, family: Family, seed: int) -> None:
    """Put adapters on the target modules in place: A [r, in] drawn from `seed`, B [out, r] zero.

    So the model still computes the same. Every other parameter stops training. The global generator is left as it was.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        fan_in_fan_out=family.has_transposed_weights,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def plain_name(name: str) -> str:
    """Turn PEFT's name of a parameter inside a model into that of shards and checkpoints."""
    return re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name.replace(".base_layer.", "."))


def is_lora(name: str) -> bool:
    """Whether this is the plain name of an adapter's matrix."""
    return name.endswith((_A, _B))


def is_lora_b(name: str) -> bool:
    """Whether this is the plain name of an adapter's B, which starts from zero."""
    return name.endswith(_B)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Get the model's state under plain names, with or without adapters; tensors are shared, not copied."""
    return {plain_name(name): tensor for name, tensor in model.state_dict().items()}


def load_plain_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a state under plain names into a model with or without adapters. Raises KeyError on a missing name."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(state[plain_name(name)])


def fold_lora(state: dict[str, Tensor], lora: LoraEntry, family: Family) -> dict[str, Tensor]:
    """Add adapters to the weights under them: W + (alpha / r) B A (Hu et al., arXiv 2106.09685), summed in float64.

    Takes plain names. Returns a state without adapters that computes the same and shares all other tensors.
    """
    folded = {name: tensor for name, tensor in state.items() if not is_lora(name)}
    for name in state:
        if not name.endswith(_A):
            continue
        module = name.removesuffix(_A)
        a, b = state[name].double(), state[module + _B].double()
        change = (lora.alpha / lora.r) * (b @ a)  # [out, in]
        change = change.T if family.has_transposed_weights else change

        weight = folded[f"{module}.weight"]
        folded[f"{module}.weight"] = (weight.double() + change).to(weight.dtype)
    return folded
