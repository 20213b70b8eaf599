"""Tiny models of images with random weights, and small made-up images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CLASSES = ("red", "green", "blue")
TASK: dict[str, Any] = {"name": "colours", "kind": "image-classification", "labels": list(CLASSES)}

_VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 3}
_RESNET = {"embedding_size": 8, "num_labels": 3}

SIZES = {
    "vit": (16, 16),
    "vit-wide": (8, 16),
    "resnet": (32, 32),
    "resnet-bottleneck": (40, 24),
    "resnet-grey": (28, 28),
}
"""Height and width of each model's images."""

BLOCKS = {"vit": 4, "vit-wide": 4, "resnet": 3, "resnet-bottleneck": 4, "resnet-grey": 3}


def make_config(kind: str) -> Any:
    """One configuration for every family, and one for each trap of a family."""
    import transformers as hf

    if kind == "vit":
        return hf.ViTConfig(**_VIT, image_size=16, patch_size=4)
    if kind == "vit-wide":
        return hf.ViTConfig(**_VIT, image_size=(8, 16), patch_size=4, qkv_bias=False)
    if kind == "resnet":
        return hf.ResNetConfig(**_RESNET, hidden_sizes=[8, 16, 24], depths=[1, 2, 1], layer_type="basic")
    if kind == "resnet-grey":
        changed = {"num_channels": 1, "downsample_in_first_stage": True, "hidden_act": "gelu"}
        return hf.ResNetConfig(**_RESNET, **changed, hidden_sizes=[16, 16, 32], depths=[2, 1, 1], layer_type="basic")
    sizes = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 2, 1, 1]}
    return hf.ResNetConfig(**_RESNET, **sizes, layer_type="bottleneck", downsample_in_bottleneck=True)


def make_image_model(kind: str, seed: int = 0) -> Any:
    """A tiny uncut classifier whose every weight and statistic is random."""
    import torch
    from transformers import AutoModelForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageClassification.from_config(make_config(kind)).eval()
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(1000)
            elif tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
            elif kind.startswith("vit"):
                tensor.normal_(0.0, 0.3)
    return model


def save_image_model(kind: str, folder: Path, *, preprocessor: bool = True, seed: int = 0) -> Path:
    """The model's folder, with what `from_pretrained` finds of its images."""
    import json

    make_image_model(kind, seed).save_pretrained(folder)
    if preprocessor:
        height, width = SIZES[kind]
        channels = 1 if kind == "resnet-grey" else 3
        facts = {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": height, "width": width},
            "resample": 3,
            "image_mean": [0.4, 0.5, 0.6][:channels],
            "image_std": [0.2, 0.25, 0.3][:channels],
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def make_pictures(
    count: int, size: tuple[int, int] = (32, 32), seed: int = 0
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Noise [count, H, W, 3] whose brightest colour is its class, and the classes."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    pixels = generator.integers(0, 120, (count, *size, 3))
    pixels[np.arange(count), ..., labels] += 100
    return pixels.astype(np.uint8), labels


def write_pictures(path: Path, count: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    """Pictures as a `.npz` file that can be mapped."""
    images, labels = make_pictures(count, size, seed)
    np.savez(path, images=images, labels=labels)
    return path
