"""The head on a model: a language model's, a classifier's that a checkpoint brings, or a new one for a task.

The exporter chooses by it how a model is loaded; the cloud, whether a task goes on with the head of the bundle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from hosl_export.model.families import find_family
from hosl_export.model.family import Family
from hosl_protocol.run.manifest import Manifest

HEADS = ("lm_head", "score", "classifier")
"""Names of heads in Hugging Face models, of which a classifier has another."""
_HEAD_PARTS = (*HEADS, "pre_classifier", "head")
"""With what stands before the last layer of a classifier's head (DistilBERT, ModernBERT)."""

_CLASSIFIER = "ForSequenceClassification"


def auto_class(family: Family, *, is_classifier: bool) -> Any:
    """Choose the class of transformers for the uncut model, or for the classifier of texts that it is or becomes."""
    if family.takes_images:
        return AutoModelForImageClassification
    if is_classifier:
        return AutoModelForSequenceClassification
    return AutoModel if family.is_encoder else AutoModelForCausalLM


def is_classifier(config: Any) -> bool:
    """Whether a checkpoint with this config has a head that classifies texts."""
    return any(name.endswith(_CLASSIFIER) for name in config.architectures or ())


def has_class_head(manifest: Manifest) -> bool:
    """Whether a bundle's tail has a classification head."""
    return find_family(manifest.family).takes_images or manifest.architecture.endswith(_CLASSIFIER)


def keeps_head(manifest: Manifest, config: Any, num_labels: int) -> bool:
    """Whether a task of `num_labels` goes on with the head of a bundle whose uncut model had `config`."""
    return has_class_head(manifest) and bool(config.num_labels == num_labels)


def draw_head(model: Any, seed: int) -> dict[str, Tensor]:
    """Draw a classification head for `model`, as Hugging Face initialises it, from a generator of its own.

    Returns its weight [L, D] and, where it has one, its bias [L], under their names in the model; and the same of the
    layers that some architectures put before it.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name, part in model.named_modules():
        if is_head(name) and next(part.parameters(recurse=False), None) is not None:
            drawn |= _draw(name, part, model, generator)
    return drawn


def _draw(name: str, part: nn.Module, model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    if not isinstance(part, nn.Linear):  # a norm
        ones, zeros = torch.ones, torch.zeros
        own = part.named_parameters(recurse=False)
        return {f"{name}.{key}": (zeros if key == "bias" else ones)(value.shape) for key, value in own}

    head = part
    weight, bias = torch.empty(head.weight.shape), torch.zeros(head.out_features)
    # OPT has its own name for it, and a ResNet, which has none, leaves it to torch's linear layer.
    spread = getattr(model.config, "initializer_range", None) or getattr(model.config, "init_std", None)
    if spread is None:
        bound = head.in_features**-0.5
        weight.uniform_(-bound, bound, generator=generator)
        bias.uniform_(-bound, bound, generator=generator)
    else:
        weight.normal_(0.0, spread, generator=generator)

    return {f"{name}.weight": weight} | ({} if head.bias is None else {f"{name}.bias": bias})


def class_head(model: Any) -> nn.Module | None:
    """The head of a classifier; None for a language model or a bare encoder."""
    head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return head if isinstance(head, nn.Module) else None


def linear_of(head: nn.Module) -> tuple[str, nn.Linear]:
    """The last linear layer of a head, after its name within the head."""
    return [(name, part) for name, part in head.named_modules() if isinstance(part, nn.Linear)][-1]


def own_labels(config: Any) -> tuple[str, ...]:
    """Names of a head's labels, in the order of its rows; empty where a config has only numbers for them."""
    names = tuple(str(config.id2label.get(place, "")) for place in range(config.num_labels))
    is_numbered = all(name in ("", str(place), f"LABEL_{place}") for place, name in enumerate(names))
    return () if is_numbered else names


def is_head(name: str) -> bool:
    """Whether this is the plain name of a head's tensor, before which an encoder's prefix never stands."""
    return name.partition(".")[0] in _HEAD_PARTS
