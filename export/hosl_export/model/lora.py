"""LoRA as PEFT does it: put adapters in, name them as a checkpoint does, fold them, write a PEFT adapter.

A module inside a model that PEFT changed is `q_proj.base_layer.weight` and `q_proj.lora_A.default.weight`; in shards,
checkpoints and everywhere outside this module it is `q_proj.weight` and `q_proj.lora_A.weight`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from hosl_export.model.families import Family, find_family
from hosl_export.model.joining import join_state
from hosl_protocol.run.manifest import LoraEntry, Manifest

_A, _B = ".lora_A.weight", ".lora_B.weight"


def inject_lora(model: nn.Module, lora: LoraEntry, family: Family, seed: int) -> None:
    """Adapt the target modules in place: A drawn from `seed`, B zero, so that the model still computes the same.

    Every other parameter stops training. The global generator is left as it was.
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
    """PEFT's name of a parameter inside a model, as shards and checkpoints have it."""
    return re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name.replace(".base_layer.", "."))


def is_lora(name: str) -> bool:
    """Whether this is the plain name of an adapter's matrix."""
    return name.endswith((_A, _B))


def is_lora_b(name: str) -> bool:
    """Whether this is the plain name of an adapter's B, which starts from zero."""
    return name.endswith(_B)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state under plain names, with or without adapters; tensors are shared, not copied."""
    return {plain_name(name): tensor for name, tensor in model.state_dict().items()}


def load_plain_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a state under plain names into a model with or without adapters. Raises KeyError on a missing name."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(state[plain_name(name)])


def fold_lora(state: dict[str, Tensor], lora: LoraEntry, family: Family) -> dict[str, Tensor]:
    """A state without adapters that computes the same: W + (alpha / r) B A, summed in float64; other tensors shared."""
    folded = {name: tensor for name, tensor in state.items() if not is_lora(name)}
    for name in state:
        if name.endswith(_A):
            module = name.removesuffix(_A)
            a, b = state[name].double(), state[module + _B].double()
            change = (lora.alpha / lora.r) * (b @ a)  # [out, in]
            weight = folded[f"{module}.weight"]
            change = change.T if family.has_transposed_weights else change
            folded[f"{module}.weight"] = (weight.double() + change).to(weight.dtype)
    return folded


def peft_adapter(
    manifest: Manifest, client: dict[str, Tensor], tail: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `adapter_model.safetensors` and `adapter_config.json` hold, so that `peft` loads both halves' adapters.

    `client` and `tail` are the halves' states under plain names, both with adapters of `manifest.lora`. A
    classification head trained on the tail goes along as PEFT's `modules_to_save`.
    """
    from peft import LoraConfig

    if manifest.lora is None:
        raise ValueError("the bundle's client half has no adapters")
    whole = join_state(manifest, client, tail)
    heads = sorted({name.partition(".")[0] for name in whole} & {"score", "classifier"})
    kept = {name: tensor for name, tensor in whole.items() if is_lora(name) or name.partition(".")[0] in heads}
    if not any(is_lora(name) for name in tail):
        raise ValueError("the tail has no adapters: only a tail trained as `lora` makes an adapter that loads alone")
    family = find_family(manifest.family)
    config = LoraConfig(
        r=manifest.lora.r,
        lora_alpha=manifest.lora.alpha,
        target_modules=list(manifest.lora.targets),
        fan_in_fan_out=family.has_transposed_weights,
        task_type=_task_type(family, has_head=bool(heads)),
        modules_to_save=heads or None,
        base_model_name_or_path=manifest.model,
        revision=manifest.revision,
        inference_mode=True,
    )
    return {f"base_model.model.{name}": tensor for name, tensor in kept.items()}, _as_json(config.to_dict())


def _task_type(family: Family, *, has_head: bool) -> str | None:
    """PEFT's name for what the whole model does; it has none for classifying images."""
    if family.takes_images:
        return None
    return "SEQ_CLS" if has_head else "FEATURE_EXTRACTION" if family.is_encoder else "CAUSAL_LM"


def _as_json(value: Any) -> Any:
    """Sets as sorted lists, enumerations as their values."""
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
