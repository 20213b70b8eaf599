"""Read a bundle as torch modules: the tail, the device's half, and the config of the uncut model.

The exporter's own check reads bundles so, and then the cloud: the tail for training, the device's half for baselines
that backpropagate through it, and the config for a merge. A model is built whole without memory ("meta"), cut, and only
then filled, so that the other half's weights never take any.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from hosl_export.model.families import find_family
from hosl_export.model.halves import ClientHalf, Tail, base_prefix, client_half, drop_device_part
from hosl_export.model.heads import auto_class, draw_head, has_class_head, is_head, keeps_head
from hosl_export.model.lora import inject_lora, plain_name
from hosl_export.model.prompt import add_prompt
from hosl_export.tensor_files import read_tensors
from hosl_protocol.run.manifest import TAIL_WEIGHTS, BundleError, Manifest


def load_client(bundle: Path, manifest: Manifest, state: dict[str, Tensor]) -> ClientHalf:
    """Load the device's half as a torch module in eval mode, with a prompt or adapters where the manifest has them.

    `state` holds its weights and buffers under plain names. Raises BundleError.
    """
    family = find_family(manifest.family)
    model = _build_without_memory(load_model_config(bundle), manifest, None)
    # As the export did it: a prompt before the cut, adapters after it.
    if manifest.prompt_tokens:
        add_prompt(model, manifest.prompt_tokens)
    half = client_half(model, manifest.split, manifest.image)
    if manifest.lora is not None:
        inject_lora(half, manifest.lora, family, seed=0)

    fill(half.model, {name: state[plain_name(name)] for name in half.model.state_dict()})
    return half.eval()


def load_tail(bundle: Path, manifest: Manifest, *, num_labels: int | None = None, seed: int = 0) -> Tail:
    """Load the cloud's half, float32 on the CPU, in eval mode.

    With `num_labels` it is the architecture's classifier, its head drawn from `seed`; a bundle of a classifier keeps
    the head that it has for as many labels. Weights are private memory maps of the bundle's file: untouched pages cost
    nothing, and writing to them leaves the file as it is. Raises BundleError.
    """
    family = find_family(manifest.family)
    config = load_model_config(bundle)
    # Asked first: to build a classifier writes its number of labels into the config.
    keeps = num_labels is None or keeps_head(manifest, config, num_labels)
    model = _build_without_memory(config, manifest, num_labels)
    drop_device_part(model, family, manifest.split)

    state = _read_tail(bundle)
    if not keeps:
        # Some classifiers have no use for the encoder's pooler.
        has_pooler = any("pooler" in name.split(".") for name, _ in model.named_parameters())
        kept = {name: value for name, value in state.items() if has_pooler or not name.startswith("pooler.")}
        state = {name: tensor for name, tensor in kept.items() if not is_head(name)} | draw_head(model, seed)
    # The file has the uncut model's names; those of an encoder with a task head have a prefix.
    prefix = base_prefix(model, family)
    fill(model, {name if is_head(name) else prefix + name: tensor for name, tensor in state.items()})

    grid = None if manifest.image is None else manifest.image.grid
    return Tail(model, family, grid, manifest.prompt_tokens).eval()


def load_model_config(bundle: Path) -> Any:
    """Load the uncut model's config, a new one at each call."""
    return AutoConfig.from_pretrained(bundle / "tail")


def full_config(bundle: Path, manifest: Manifest, *, num_labels: int | None = None) -> Any:
    """Make the config of the joined model, its embeddings untied; that of its classifier with `num_labels`."""
    config = load_model_config(bundle)
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


def _build_without_memory(config: Any, manifest: Manifest, num_labels: int | None) -> Any:
    """Build the uncut model, or its classifier, whose tensors have shapes but no values."""
    if num_labels is not None:
        config.num_labels, config.problem_type = num_labels, "single_label_classification"
    auto = auto_class(find_family(manifest.family), is_classifier=num_labels is not None or has_class_head(manifest))
    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.float32)


def _read_tail(bundle: Path) -> dict[str, Tensor]:
    """Read the tail's weights. Raises BundleError, whatever is wrong with the file."""
    path = bundle / TAIL_WEIGHTS
    try:
        return read_tensors(path)
    except Exception as error:
        raise BundleError(f"cannot read {path}: {error}") from error


def fill(model: Any, state: dict[str, Tensor]) -> None:
    """Give a model without memory its weights and buffers. Raises BundleError where the names do not match."""
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise BundleError(f"the bundle's weights do not fit its config: {error}") from error

    _compute_buffers(model)


def _compute_buffers(model: Any) -> None:
    """Give the model the buffers that a checkpoint does not hold, because they follow from the config."""
    missing = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_meta
    ]
    if not missing:
        return

    # transformers computes them as it loads a model. What has its values is marked as it marks it.
    for tensor in chain(model.parameters(), model.buffers()):
        tensor._is_hf_initialized = not tensor.is_meta
    for module, name, buffer in missing:
        setattr(module, name, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()
