"""What the files of an adapter hold that PEFT loads: of LoRA on both halves, or of a soft prompt.

The cloud calls these at a merge and writes what they return, tensors and config.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hosl_export.model.families import find_family
from hosl_export.model.family import Family
from hosl_export.model.joining import join_state
from hosl_export.model.lora import is_lora
from hosl_protocol.run.manifest import Manifest


def peft_adapter(
    manifest: Manifest, client: dict[str, Tensor], tail: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Make `adapter_model.safetensors` and `adapter_config.json` of both halves' adapters.

    `client` and `tail` are the halves' states under plain names, both with adapters of `manifest.lora`. A
    classification head trained on the tail goes along as PEFT's `modules_to_save`. Raises ValueError where a half has
    no adapters.
    """
    from peft import LoraConfig

    if manifest.lora is None:
        raise ValueError("the bundle's client half has no adapters")
    if not any(is_lora(name) for name in tail):
        raise ValueError("the tail has no adapters: only a tail trained as `lora` makes an adapter that loads alone")

    whole = join_state(manifest, client, tail)
    heads = sorted({name.partition(".")[0] for name in whole} & {"score", "classifier"})
    kept = {name: tensor for name, tensor in whole.items() if is_lora(name) or name.partition(".")[0] in heads}

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


def peft_prompt(prompt: Tensor, merged: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Make `adapter_model.safetensors` and `adapter_config.json` of a prompt [N, D] for the model with state `merged`.

    PEFT takes a classification head for its own, so that goes along.
    """
    from peft import PromptTuningConfig, TaskType

    head = {name: tensor for name, tensor in merged.items() if name.partition(".")[0] in ("score", "classifier")}
    config = PromptTuningConfig(
        task_type=TaskType.SEQ_CLS if head else TaskType.CAUSAL_LM,
        num_virtual_tokens=len(prompt),
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        inference_mode=True,
    )
    return {"prompt_embeddings": prompt, **{f"base_model.{name}": head[name] for name in head}}, config.to_dict()


def _task_type(family: Family, *, has_head: bool) -> str | None:
    """Choose PEFT's name for what the whole model does; it has none for classifying images."""
    if family.takes_images:
        return None
    return "SEQ_CLS" if has_head else "FEATURE_EXTRACTION" if family.is_encoder else "CAUSAL_LM"


def _as_json(value: Any) -> Any:
    """Turn sets into sorted lists and enumerations into their values, at any depth."""
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
