"""Digits that people wrote, a small ResNet that reads them, and the same digits as a dark camera sees them.

python examples/camera/prepare.py [FOLDER]
"""

from __future__ import annotations

import argparse
import gzip
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification
from transformers.utils.logging import set_verbosity_error

sys.path.append(str(Path(__file__).parents[1]))
from running import download

PACKAGE = ("scikit-learn==1.7.2", "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d")
PLATFORM = ("--only-binary=:all:", "--platform=manylinux2014_x86_64", "--python-version=311", "--implementation=cp")
DIGITS = "sklearn/datasets/data/digits.csv.gz"
SIZE = 32
"""Images are enlarged to this; the package has them as 8 x 8 pixels."""
CLEAN, DEVICE = 1000, 400
"""Digits that the model learns from, and those that the device holds; the rest are held out."""
EPOCHS, BATCH, SEED = 15, 64, 0


def prepare(folder: Path) -> float:
    """Fill `folder` with the model and the device's images. Returns the model's accuracy on clean digits."""
    set_verbosity_error()  # nobody here needs to know which of the image processors is taken
    images, labels = read_digits(folder)
    held_out = slice(CLEAN + DEVICE, None)
    model = train_model(images[:CLEAN], labels[:CLEAN])
    model.save_pretrained(folder / "model")
    ConvNextImageProcessor(
        size={"shortest_edge": SIZE}, crop_pct=1.0, resample=2, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(folder / "model")

    seen = darken(images)
    np.savez(folder / "train.npz", images=seen[CLEAN : CLEAN + DEVICE], labels=labels[CLEAN : CLEAN + DEVICE])
    np.savez(folder / "held-out.npz", images=seen[held_out], labels=labels[held_out])
    np.savez(folder / "clean.npz", images=images[held_out], labels=labels[held_out])
    return accuracy(model, images[held_out], labels[held_out])


def read_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the images [N, 32, 32, 1], uint8, and labels [N], in one random order."""
    table = folder / "digits.csv.gz"
    if not table.exists():
        wheel = download(PACKAGE, folder, *PLATFORM)
        with zipfile.ZipFile(wheel) as archive:
            table.write_bytes(archive.read(DIGITS))
        wheel.unlink()
    with gzip.open(table, "rt") as file:
        rows = np.loadtxt(file, delimiter=",")

    rows = rows[np.random.default_rng(SEED).permutation(len(rows))]
    small = torch.from_numpy(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16))
    large = torch.nn.functional.interpolate(small, size=(SIZE, SIZE), mode="bilinear")
    return large.round().byte().permute(0, 2, 3, 1).numpy(), rows[:, -1].astype(np.int64)


def darken(images: np.ndarray) -> np.ndarray:
    """What a camera in the dark makes of them: a tenth of the light, and noise."""
    noise = np.random.default_rng(SEED).normal(0.0, 2.0, images.shape)
    return np.clip(images / 10 + noise, 0, 255).astype(np.uint8)


def as_pixels(images: np.ndarray) -> torch.Tensor:
    """What the model takes of `images` [N, H, W, 1], uint8."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def train_model(images: np.ndarray, labels: np.ndarray) -> ResNetForImageClassification:
    """Train a ResNet of three stages, 16, 32 and 64 channels wide, on clean digits."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # of so small a model threads would wait for each other more than they compute
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[2, 2, 2],
        layer_type="basic",
        num_labels=10,
        downsample_in_first_stage=False,
    )
    model = ResNetForImageClassification(config)
    targets, pixels = torch.from_numpy(labels), as_pixels(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)

    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            loss = cross_entropy(model(pixels[batch]).logits, targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: ResNetForImageClassification, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that it names."""
    return float((model(as_pixels(images)).logits.argmax(-1).numpy() == labels).mean())


def main() -> None:
    """Prepare, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "work" / "data"
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="where they go (default: %(default)s)")
    folder = parser.parse_args().folder
    print(f"accuracy on clean digits: {100 * prepare(folder):.1f} %")


if __name__ == "__main__":
    main()
