"""The entry of an architecture that has none of its own, read off a model of transformers' that has no memory.

The rule: a list of blocks, of the length that the config names; embeddings before it; a norm, a head or a pooler after
it. Whether the entry is right is checked at each export, which compares the halves with the uncut model and the
gradients with autograd. So what is decided here by names and order needs no exceptions: where it is wrong, no bundle
is written, and the architecture wants an entry in `families.py`.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from hosl_export.exceptions import UnknownFamily, first_line
from hosl_export.model.family import Family

_ADAPTED = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
    ("qkv",),
    ("q", "v"),
)
"""Modules that LoRA adapts where PEFT has no choice of its own: what makes the queries and the values."""


@lru_cache
def derive_family(model_type: str) -> Family:
    """Read the entry off the architecture that transformers has for `model_type`. Raises UnknownFamily."""
    auto, is_encoder = _kind_of(model_type)
    model = _build(model_type, auto)
    blocks, block_list = _blocks_of(model_type, model)
    if any(type(part).__name__.endswith("Experts") for part in block_list.modules()):
        raise _refused(model_type, "its blocks choose experts for each token, which no graph of ONNX does")
    before, after = _around(model_type, model, blocks)

    head = None if is_encoder else _path_of(model, model.get_output_embeddings())
    if head is None and not is_encoder:
        raise _refused(model_type, "its language model has no head that is a module")
    return Family(
        blocks=blocks,
        embeddings=tuple(before),
        # Absent ones are skipped: a classifier has `score` where the language model has its head.
        final=(*after, *(() if is_encoder else ("score",))),
        head=head,
        lora_targets=_lora_targets(model_type, block_list),
        has_transposed_weights=any(isinstance(part, Conv1D) for part in block_list.modules()),
        base_prefix=f"{model.base_model_prefix}." if is_encoder else "",
        skips_padding=any(
            "position" in name and isinstance(part, nn.Embedding) and part.padding_idx is not None
            for name, part in model.named_modules()
        ),
    )


def _refused(model_type: str, reason: str) -> UnknownFamily:
    return UnknownFamily(model_type, reason)


def _kind_of(model_type: str) -> tuple[Any, bool]:
    """The class of transformers that loads the uncut model, and whether it is an encoder."""
    if model_type not in CONFIG_MAPPING:
        raise _refused(model_type, f"transformers {transformers.__version__} has no such architecture")
    if model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        if model_type not in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            raise _refused(model_type, "it is an encoder that transformers has no classifier for")
        return transformers.AutoModel, True
    if model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM, False
    raise _refused(model_type, "it is neither a causal language model nor an encoder of text")


def _build(model_type: str, auto: Any) -> Any:
    """Build a model with few blocks, or with as many as its config has by itself; its tensors have no values."""
    kind, error = CONFIG_MAPPING[model_type], None
    if getattr(kind(), "is_encoder_decoder", False):
        raise _refused(model_type, "it is an encoder with a decoder")
    for few in ({"num_hidden_layers": 3}, {}):
        # The two libraries may say much, and raise what they like.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            try:
                return auto.from_config(kind(**few))
            except Exception as caught:
                error = caught
    assert error is not None
    raise _refused(model_type, f"transformers cannot build it by its default configuration ({first_line(error)})")


def _blocks_of(model_type: str, model: Any) -> tuple[str, nn.ModuleList]:
    """Find the list of blocks: of those as long as the config says the outermost."""
    count = getattr(model.config, "num_hidden_layers", None)
    found = [
        (path, part)
        for path, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == count and next(part.parameters(), None) is not None
    ]
    if not found:
        raise _refused(model_type, "it has no list of blocks that is as long as its config says")
    depth = min(path.count(".") for path, _ in found)
    outermost = [(path, part) for path, part in found if path.count(".") == depth]
    if len(outermost) > 1:
        raise _refused(model_type, f"it has several lists of blocks: {', '.join(path for path, _ in outermost)}")
    return outermost[0]


def _around(model_type: str, model: Any, blocks: str) -> tuple[list[str], list[str]]:
    """Sort what has weights beside the blocks into what runs before them and what runs after them."""
    before: list[str] = []
    after: list[str] = []
    for owner_path, owner, inside in _owners(model, blocks):
        if own := [name for name, _ in owner.named_parameters(recurse=False)]:
            where = f"{owner_path}.{own[0]}".lstrip(".")
            raise _refused(model_type, f"{where} is a weight beside its blocks that belongs to no module")

        is_before = True
        for name, part in owner.named_children():
            path = f"{owner_path}.{name}".lstrip(".")
            if name == inside:
                is_before = False
            elif next(part.parameters(), None) is not None:
                (before if _is_embedding(name, part, is_before=is_before) else after).append(path)
    return before, after


def _owners(model: Any, blocks: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Go from the model in to the list of blocks: path, module, and the name of what leads on."""
    path, owner = "", model
    for name in blocks.split("."):
        yield path, owner, name
        path, owner = f"{path}.{name}".lstrip("."), getattr(owner, name)


def _is_embedding(name: str, part: nn.Module, *, is_before: bool) -> bool:
    """Tell what runs before the blocks: embeddings, and what is defined before them."""
    is_named = "embed" in name or "Embed" in type(part).__name__
    if "Norm" in type(part).__name__ or name == "embed_out":  # the head of a GPT-NeoX
        return is_before and is_named
    return is_before or is_named


def _path_of(model: Any, module: nn.Module | None) -> str | None:
    return next((path for path, part in model.named_modules() if part is module), None)


def _lora_targets(model_type: str, blocks: nn.ModuleList) -> tuple[str, ...]:
    """Take PEFT's choice, or what makes the queries and the values; none where the blocks have no such matrices."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICES

    names = {path.rpartition(".")[2] for path, part in blocks.named_modules() if isinstance(part, nn.Linear | Conv1D)}
    choices = [tuple(CHOICES[model_type])] if isinstance(CHOICES.get(model_type), list) else []
    return next((each for each in (*choices, *_ADAPTED) if set(each) <= names), ())
