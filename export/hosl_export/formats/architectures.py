"""What llama.cpp calls an architecture and its facts, and in which form it wants the tensors.

llama.cpp's own converter does the same for more models (conversion/ in its repository). The names of tensors come from
the package `gguf`, which llama.cpp publishes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hosl_export.exceptions import ModelError

Array = npt.NDArray[np.float32]

FIELD = "gguf"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of llama.cpp that computes what a family of Hugging Face's does."""

    name: str
    """As `general.architecture` says it."""
    activation: str
    """What `hidden_act` must be: llama.cpp has it built in."""
    has_rotated_halves: bool = False
    """Whether queries and keys are stored so that rotary embeddings turn neighbours instead of halves."""
    has_centred_norms: bool = False
    """Whether Hugging Face stores the norms' weights less one."""
    has_window: bool = False
    """Whether llama.cpp knows its sliding window."""


_ARCHITECTURES = {
    "llama": Architecture(name="llama", activation="silu", has_rotated_halves=True),
    "mistral": Architecture(name="llama", activation="silu", has_rotated_halves=True),
    "qwen2": Architecture(name="qwen2", activation="silu"),
    "qwen3": Architecture(name="qwen3", activation="silu"),
    "gemma3_text": Architecture(name="gemma3", activation="gelu_pytorch_tanh", has_centred_norms=True, has_window=True),
    "gpt2": Architecture(name="gpt2", activation="gelu_new"),
}
"""By `model_type`. Every entry is compared with llama.cpp itself in tests/export/formats."""

_REMEDY = "use the folder that merge --out writes, or --onnx"


def find_architecture(config: Any) -> Architecture:
    """Find what llama.cpp calls this model. Raises ModelError where it does not compute the same."""
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ModelError(FIELD, kind, f"llama.cpp, or hosl's writer for it, knows {known}; {_REMEDY}")
    found = _ARCHITECTURES[kind]
    for field, wanted in _needed(config, found).items():
        value = getattr(config, field, wanted)
        if value != wanted:
            raise ModelError(FIELD, kind, f"llama.cpp needs {field} = {wanted!r}, this model has {value!r}; {_REMEDY}")
    _check_rope(config)
    return found


def _needed(config: Any, architecture: Architecture) -> dict[str, Any]:
    """Fields of the config that llama.cpp has no key for, and the values that it has built in."""
    if architecture.name == "gpt2":
        return {
            "activation_function": architecture.activation,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
        }
    needed: dict[str, Any] = {"hidden_act": architecture.activation}
    if architecture.name == "gemma3":
        # The 27B model alone, which llama.cpp knows by its blocks, divides by something else.
        heads = config.num_attention_heads
        scale = config.hidden_size // heads if config.num_hidden_layers == 62 else config.head_dim
        needed |= {"attn_logit_softcapping": None, "query_pre_attn_scalar": scale, "use_bidirectional_attention": False}
        needed["layer_types"] = [
            "full_attention" if (block + 1) % 6 == 0 else "sliding_attention"
            for block in range(config.num_hidden_layers)
        ]
    return needed


def _rope(config: Any) -> dict[str, Any]:
    """What the config says of rotary embeddings; of Gemma 3's two kinds, those of full attention."""
    facts: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    full: dict[str, Any] = facts.get("full_attention", facts)
    return full


_ROPE = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"},
}
"""Kinds of rotary embeddings that llama.cpp scales as transformers does, and what they may say."""


def _check_rope(config: Any) -> None:
    rope = {key: value for key, value in _rope(config).items() if value is not None}
    kind = rope.get("rope_type", "default")
    said = rope.keys() - {"rope_type", "type", "rope_theta"}
    if rope.get("partial_rotary_factor") == 1.0:
        said -= {"partial_rotary_factor"}
    if kind not in _ROPE or said - _ROPE[kind]:
        shown = kind if kind not in _ROPE else f"{kind} with {', '.join(sorted(said - _ROPE[kind]))}"
        raise ModelError(
            FIELD, config.model_type, f"llama.cpp does not scale its rotary embeddings ({shown}); {_REMEDY}"
        )


def context_length(config: Any, architecture: Architecture) -> int:
    """Tokens that llama.cpp may be given: no more than a sliding window that it does not know."""
    positions: int = config.max_position_embeddings
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None) if windowed else None
    return positions if window is None or architecture.has_window else min(positions, window)


def add_facts(writer: Any, config: Any, architecture: Architecture) -> None:
    """Add the model's facts to a GGUFWriter."""
    writer.add_context_length(context_length(config, architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if architecture.name == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return

    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = _head_dim(config)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    _add_rope(writer, config)
    if architecture.name == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_rope(writer: Any, config: Any) -> None:
    import gguf

    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    local = (config.rope_parameters or {}).get("sliding_attention")
    if local is not None:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{key}")(rope[key])


def extra_tensors(config: Any) -> dict[str, Array]:
    """Tensors of the file that the folder does not have: by how much Llama 3 slows each rotary frequency down."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return {}
    width = _head_dim(config)
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float64) / width)
    old, low, high = (
        rope[f"{key}"] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = np.clip((old / wavelengths - low) / (high - low), 0.0, 1.0)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)}


def tensor_form(name: str, config: Any, architecture: Architecture) -> Callable[[Array], Array]:
    """What llama.cpp wants done to the tensor that Hugging Face calls `name`."""
    if architecture.has_rotated_halves and ".q_proj." in name:
        return lambda values: _rotate_halves(values, config.num_attention_heads)
    if architecture.has_rotated_halves and ".k_proj." in name:
        return lambda values: _rotate_halves(values, config.num_key_value_heads)
    if architecture.has_centred_norms and name.endswith("norm.weight"):
        return lambda values: values + np.float32(1)
    # GPT-2's Conv1D has its weights [in, out].
    if architecture.name == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return lambda values: values.T
    return lambda values: values


def _rotate_halves(values: Array, heads: int) -> Array:
    """Put the rows of each head that rotary embeddings turn together beside each other. [heads * width, ...]."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    turned: Array = halves.swapaxes(1, 2).reshape(values.shape)
    return turned
