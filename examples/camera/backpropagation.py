"""The same training of the device's half with torch, for the sake of its memory: prints the process's peak, in bytes.

python examples/camera/backpropagation.py BUNDLE IMAGES.npz [--batch 32]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from prepare import as_pixels

from hosl_edge.model.memory import read_memory
from hosl_export.bundle.reading import load_client
from hosl_export.tensor_files import read_tensors
from hosl_protocol.run.manifest import SHARD_WEIGHTS, load_manifest

STEPS = 3


def main() -> None:
    """Make a few steps of AdamW on the norms, with a λ as a cloud might send it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()

    manifest = load_manifest(options.bundle)
    with np.load(options.images) as data:
        pixels = as_pixels(data["images"])
    half = load_client(options.bundle, manifest, read_tensors(options.bundle / SHARD_WEIGHTS))
    trained = {entry.name for entry in manifest.trainable}
    parameters = [tensor for name, tensor in half.model.named_parameters() if name in trained]
    half.requires_grad_(False)
    optimizer = torch.optim.AdamW([tensor.requires_grad_() for tensor in parameters], lr=1e-2)

    for batch in pixels[: STEPS * options.batch].split(options.batch):
        activations = half(pixel_values=batch)
        optimizer.zero_grad()
        activations.backward(torch.randn_like(activations))
        optimizer.step()
    print(read_memory().peak)


if __name__ == "__main__":
    main()
