"""Put the halves' states together again, under the uncut model's names: at a merge on the cloud."""

from __future__ import annotations

from torch import Tensor

from hosl_export.model.families import find_family, renumber
from hosl_export.model.prompt import is_prompt
from hosl_protocol.run.manifest import Manifest


def join_state(manifest: Manifest, client: dict[str, Tensor], tail: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join both states under the uncut model's names: the tail's block j becomes block split + j.

    Adapters are not folded and keep their plain names. A soft prompt, which is no part of the uncut model, is left out.
    A tail built as a classifier gives the classifier's names to both. The state loads strictly with the config that
    `bundle.reading.full_config` makes, which unties the embeddings. Raises ValueError where both halves hold a name.
    """
    family = find_family(manifest.family)
    # A classifier on an encoder has a prefix before the encoder's names, which the device's half never has.
    has_task_head = bool(family.base_prefix) and any(name.startswith(family.base_prefix) for name in tail)
    prefix = family.base_prefix if has_task_head else ""

    joined = {prefix + name: tensor for name, tensor in client.items() if not is_prompt(name)}
    for name, tensor in tail.items():
        whole = renumber(name, prefix + family.blocks, manifest.split)
        if whole in joined:
            raise ValueError(f"both halves hold {whole}")
        joined[whole] = tensor
    return joined
