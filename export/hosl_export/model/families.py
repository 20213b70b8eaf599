"""How to cut each architecture: one declarative entry per family, keyed by Hugging Face's `model_type`.

A new family is a new entry of FAMILIES, and nothing else here: whether the entry is right is checked at each export,
which compares the halves with the uncut model. CONTRIBUTING.md says what puts it through the tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hosl_export.exceptions import UnknownFamily


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of an architecture are. Paths are module names inside the uncut Hugging Face model."""

    blocks: str
    """The list of blocks that the cut divides."""
    embeddings: tuple[str, ...]
    """Modules that only the client half runs, and that the tail drops; absent ones are skipped. For images they run one
    after the other, before the blocks."""
    final: tuple[str, ...]
    """Modules that only the tail runs after the last block, and that the client half drops; absent ones are skipped."""
    final_norm: str | None = None
    """The norm after the last block, identity on the client half; None where each block ends with its own."""
    positions: str | None = None
    """An embedding that the model adds to `inputs_embeds`: zero on the tail, where the activations already hold it."""
    bypass: str | None = None
    """An embedding block that the model runs on `inputs_embeds` too: passed by on the tail."""
    head: str | None = None
    """The language-model head; None for an encoder."""
    lora_targets: tuple[str, ...] = ()
    """Modules of a block that LoRA adapts: PEFT's own choice for the architecture; none where it has none."""
    has_transposed_weights: bool = False
    """Whether blocks store their weights [in, out] (GPT-2's Conv1D) instead of [out, in]."""
    base_prefix: str = ""
    """Prefix that classes with a task head add to the names of the uncut model's parameters."""
    counted_by: str = "num_hidden_layers"
    """What the config says of the blocks: their number, or a list with one entry each."""
    takes_images: bool = False
    """Whether the uncut model classifies images instead of reading text."""
    has_fixed_size: bool = False
    """Whether images have one size for ever, the config's `image_size`, because positions are embedded."""
    pool: str | None = None
    """Images: the module that pools a feature map; None where the classifier reads the first token."""
    keeps_constants: bool = False
    """Whether frozen weights stay inside the client's graph: ONNX Runtime then folds batch-norms into convolutions and
    lays those out for the machine, which for a ResNet is worth more than to share a file's pages."""

    @property
    def is_encoder(self) -> bool:
        """Whether tokens see those on their right, so that texts need the attention mask; so it is with images, too."""
        return self.head is None

    def count_blocks(self, config: Any) -> int:
        """Blocks of the model with this config."""
        counted = getattr(config, self.counted_by)
        return counted if isinstance(counted, int) else len(counted)


_LLAMA = Family(
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final=("lm_head", "score"),
    final_norm="model.norm",
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
        embeddings=("model.decoder.embed_tokens", "model.decoder.project_in"),
        final=("lm_head", "score", "model.decoder.project_out"),
        final_norm="model.decoder.final_layer_norm",
        positions="model.decoder.embed_positions",
        head="lm_head",
        lora_targets=("q_proj", "v_proj"),
    ),
    "gpt2": Family(
        blocks="transformer.h",
        embeddings=("transformer.wte",),
        final=("lm_head", "score"),
        final_norm="transformer.ln_f",
        positions="transformer.wpe",
        head="lm_head",
        lora_targets=("c_attn",),
        has_transposed_weights=True,
    ),
    "bert": Family(
        blocks="encoder.layer",
        # No embeddings to drop: the model runs that block on activations, too, which is why it has a bypass.
        embeddings=(),
        final=("pooler",),
        bypass="embeddings",
        lora_targets=("query", "value"),
        base_prefix="bert.",
    ),
    "vit": Family(
        blocks="vit.layers",
        embeddings=("vit.embeddings",),
        final=("classifier",),
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
    """Find the entry for `model_type`. Raises UnknownFamily."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise UnknownFamily(model_type, sorted(FAMILIES)) from None


def renumber(name: str, blocks: str, shift: int) -> str:
    """Rename a parameter for a list of blocks, at the path `blocks`, with `shift` more of them in front."""
    match = re.fullmatch(rf"({re.escape(blocks)}\.)(\d+)(\..*)", name)
    return f"{match[1]}{int(match[2]) + shift}{match[3]}" if match else name
