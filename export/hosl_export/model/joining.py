"""Put the halves together again: names and config of the uncut Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForSequenceClassification

from hosl_export.model.families import find_family, renumber
from hosl_export.model.halves import load_config
from hosl_export.model.prompt import is_prompt
from hosl_protocol.run.manifest import Manifest


def join_state(manifest: Manifest, client: dict[str, Tensor], tail: dict[str, Tensor]) -> dict[str, Tensor]:
    """One state under the uncut model's names: the tail's block j becomes block split + j.

    Folds nothing: adapters keep their plain names. A soft prompt, which is no part of the uncut model, is left out. A
    tail built as a classifier gives the classifier's names to both.
    The state loads strictly where the config is `full_config`, which unties the embeddings.
    """
    family = find_family(manifest.family)
    has_task_head = bool(family.base_prefix) and any(name.startswith(family.base_prefix) for name in tail)
    prefix = family.base_prefix if has_task_head else ""
    joined = {prefix + name: tensor for name, tensor in client.items() if not is_prompt(name)}
    for name, tensor in tail.items():
        whole = renumber(name, prefix + family.blocks, manifest.split)
        if whole in joined:
            raise ValueError(f"both halves hold {whole}")
        joined[whole] = tensor
    return joined


def full_config(bundle: Path, manifest: Manifest, *, num_labels: int | None = None) -> Any:
    """The config of the joined model, embeddings untied; of its classifier with `num_labels`."""
    config = load_config(bundle)
    config.tie_word_embeddings = False
    config.architectures = [manifest.architecture]
    if manifest.image is not None:
        config.num_labels = config.num_labels if num_labels is None else num_labels
        config.problem_type = "single_label_classification"
    elif num_labels is not None:
        classifier = AutoModelForSequenceClassification._model_mapping[type(config)]
        config.architectures = [classifier.__name__]
        config.num_labels, config.problem_type = num_labels, "single_label_classification"
        # The classifier finds a text's last token by the padding after it.
        config.pad_token_id = manifest.pad_token_id
    return config
