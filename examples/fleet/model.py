"""A small ResNet for CIFAR-10, random weights, as a Hugging Face folder.

python examples/fleet/model.py --data DIR --out FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SIZE = 64
"""Images are enlarged to this: the architecture's stem halves them twice."""


def make_model(images: np.ndarray, seed: int = 0) -> ResNetForImageClassification:
    """Three stages of three basic blocks, 16, 32 and 64 channels wide (0.28 million parameters), like ResNet-20.

    Batch-norms stay as they are in training, so they are given the statistics of `images` [N, H, W, C], uint8.
    """
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[3, 3, 3],
        layer_type="basic",
        num_labels=10,
        downsample_in_first_stage=False,
    )
    model = ResNetForImageClassification(config)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    pixels = torch.nn.functional.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean over batches
    with torch.no_grad():
        model.train()
        for batch in pixels.split(128):
            model(batch)
    return model.eval()


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    images = np.load(options.data / "train.npz")["images"][:1024]
    make_model(images, options.seed).save_pretrained(options.out)
    ConvNextImageProcessor(
        size={"shortest_edge": SIZE}, crop_pct=1.0, resample=2, image_mean=MEAN, image_std=STD
    ).save_pretrained(options.out)


if __name__ == "__main__":
    main()
