"""How to cut each architecture: one declarative entry per family, keyed by Hugging Face's `model_type`.

A new family is a new entry of FAMILIES, and nothing else here: whether the entry is right is checked at each export,
which compares the halves with the uncut model. CONTRIBUTING.md says what puts it through the tests.
"""

from __future__ import annotations

import re

from hosl_export.model.family import Family

_LLAMA = Family(
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final=("lm_head", "score", "model.norm"),
    head="lm_head",
    lora_targets=("q_proj", "v_proj"),
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _LLAMA,
    "opt": Family(
        blocks="model.decoder.layers",
        # project_in and project_out: OPT-350m embeds tokens in a narrower space than its blocks'.
        embeddings=("model.decoder.embed_tokens", "model.decoder.project_in", "model.decoder.embed_positions"),
        final=("lm_head", "score", "model.decoder.project_out", "model.decoder.final_layer_norm"),
        head="lm_head",
        lora_targets=("q_proj", "v_proj"),
    ),
    "gpt2": Family(
        blocks="transformer.h",
        embeddings=("transformer.wte", "transformer.wpe"),
        final=("lm_head", "score", "transformer.ln_f"),
        head="lm_head",
        lora_targets=("c_attn",),
        has_transposed_weights=True,
    ),
    "bert": Family(
        blocks="encoder.layer",
        embeddings=("embeddings",),
        final=("pooler",),
        lora_targets=("query", "value"),
        base_prefix="bert.",
    ),
    "vit": Family(
        blocks="vit.layers",
        embeddings=("vit.embeddings",),
        final=("classifier", "vit.layernorm"),
        final_norm="vit.layernorm",
        lora_targets=("q_proj", "v_proj"),
        takes_images=True,
        has_fixed_size=True,
    ),
    "resnet": Family(
        blocks="resnet.encoder.stages",
        embeddings=("resnet.embedder",),
        final=("classifier", "resnet.pooler"),
        counted_by="depths",
        takes_images=True,
        pool="resnet.pooler",
        keeps_constants=True,
    ),
}


def find_family(model_type: str) -> Family:
    """Find the entry for `model_type`, or read one off the architecture. Raises UnknownFamily."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    from hosl_export.model.general import derive_family

    return derive_family(model_type)


def renumber(name: str, blocks: str, shift: int) -> str:
    """Rename a parameter for a list of blocks, at the path `blocks`, with `shift` more of them in front."""
    match = re.fullmatch(rf"({re.escape(blocks)}\.)(\d+)(\..*)", name)
    return f"{match[1]}{int(match[2]) + shift}{match[3]}" if match else name
