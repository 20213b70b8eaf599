"""Where the parts of an architecture are. `families.py` has the entries, and `general.py` reads others off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of an architecture are. Paths are module names inside the uncut Hugging Face model."""

    blocks: str
    """The list of blocks that the cut divides."""
    embeddings: tuple[str, ...]
    """Modules before the blocks, which only the client half runs, and the tail drops; absent ones are skipped. For
    images they run one after the other."""
    final: tuple[str, ...]
    """Modules after the blocks, which only the tail runs, and the client half drops; absent ones are skipped."""
    final_norm: str | None = None
    """Images: which of `final` is the norm between the last block and the head."""
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
    skips_padding: bool = False
    """Whether positions are numbered from behind the padding's id on, so that there are fewer (RoBERTa)."""
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
