"""A ResNet of ResNet-20's depth and widths for CIFAR-10, as a Hugging Face folder: trained here, or random.

python examples/study/resnet.py --data cifar10_jpeg/train.npz --out FOLDER [--rows 0:8000] [--epochs 60]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SIZE = 64
"""Images are enlarged to this: the architecture's stem halves them twice."""
BATCH = 128


def make_model(seed: int) -> ResNetForImageClassification:
    """Three stages of three basic blocks, 16, 32 and 64 channels wide (0.28 million parameters), random weights."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[3, 3, 3],
        layer_type="basic",
        num_labels=10,
        downsample_in_first_stage=False,
    )
    return ResNetForImageClassification(config)


def as_pixels(images: np.ndarray) -> Tensor:
    """What the model takes of `images` [N, H, W, C], uint8: enlarged as the device does it, and normalized."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    pixels = torch.nn.functional.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def measure_statistics(model: ResNetForImageClassification, images: np.ndarray) -> None:
    """Give the batch-norms the statistics of `images`: they stay as they are in training over a cut."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over batches
    with torch.no_grad():
        model.train()
        for batch in as_pixels(images).split(BATCH):
            model(batch)


def train(model: ResNetForImageClassification, images: np.ndarray, labels: np.ndarray, epochs: int) -> None:
    """SGD with momentum, a one-cycle rate, crops and flips."""
    targets = torch.from_numpy(labels.astype(np.int64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=epochs * batches)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    generator = np.random.default_rng(0)
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for places in np.array_split(generator.permutation(len(images))[: batches * BATCH], batches):
            pixels = as_pixels(np.stack([vary(padded[place], generator) for place in places]))
            loss = torch.nn.functional.cross_entropy(model(pixels).logits, targets[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / batches:.3f}", flush=True)


def vary(padded: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A crop of the image's own size, mirrored half of the time."""
    top, left = generator.integers(0, 9, 2)
    crop = padded[top : top + 32, left : left + 32]
    return crop[:, ::-1] if generator.random() < 0.5 else crop


def accuracy(model: ResNetForImageClassification, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that it names."""
    model.eval()
    with torch.no_grad():
        chosen = torch.cat([model(batch).logits.argmax(-1) for batch in as_pixels(images).split(BATCH)])
    return float((chosen.numpy() == labels).mean())


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="train.npz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--rows", default="0:1024", help="images to learn from (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=0, help="0: random weights (default: %(default)s)")
    parser.add_argument("--validation", type=Path, help="validation.npz, to say what came of it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    first, _, last = options.rows.partition(":")
    with np.load(options.data) as data:
        images, labels = data["images"][int(first) : int(last)], data["labels"][int(first) : int(last)]
    model = make_model(options.seed)
    if options.epochs:
        train(model, images, labels, options.epochs)
    measure_statistics(model, images)
    if options.validation is not None:
        with np.load(options.validation) as data:
            print(f"accuracy on {options.validation}: {100 * accuracy(model, data['images'], data['labels']):.1f} %")
    model.eval().save_pretrained(options.out)
    ConvNextImageProcessor(
        size={"shortest_edge": SIZE}, crop_pct=1.0, resample=2, image_mean=MEAN, image_std=STD
    ).save_pretrained(options.out)


if __name__ == "__main__":
    main()
