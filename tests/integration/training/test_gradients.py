"""The gradient that a device computes is torch's: texts with padding and images, whatever trains, in any memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hosl_edge.data.datasets import Batch, TextBatch
from hosl_edge.data.images import ImageBatch
from hosl_edge.model.shard import Shard
from hosl_export.bundle.reading import load_client
from hosl_export.model.lora import plain_name
from hosl_protocol.run.manifest import SHARD_WEIGHTS, Manifest, load_manifest
from pictures import make_pictures

LENGTHS = (3, 7, 8, 16)
TOLERANCE = 1e-4
"""Largest error of a tensor's gradient, as a share of its norm."""

CASES = ["tiny_model-norm:-2-3", "tiny_model-prompt-1", "tiny_encoder-norm-2", "resnet-norm-1", "vit-lora-1"]
"""Model, what trains and where the cut is: after a prefix, through blocks in which nothing trains, with a mask and a
frozen token table, feature maps, and positions of images."""


@pytest.fixture
def bundle(request: pytest.FixtureRequest) -> Path:
    model, train, split = request.param.replace(":-", ":~").split("-")
    train = train.replace("~", "-")
    if model.startswith("tiny"):
        export = request.getfixturevalue("export_bundle")
        return export(request.getfixturevalue(model), train, int(split))  # type: ignore[no-any-return]
    return request.getfixturevalue("make_image_bundle")(model, train, int(split))  # type: ignore[no-any-return]


def make_batch(manifest: Manifest) -> Batch:
    if manifest.image is not None:
        pixels, labels = make_pictures(4, (manifest.image.height, manifest.image.width))
        lengths = np.full(4, manifest.max_length, np.int32)
        return ImageBatch(pixels, lengths, labels.astype(np.int32), manifest.image)
    ids_BL = np.random.default_rng(0).integers(4, 41, (len(LENGTHS), max(LENGTHS)))
    ids_BL[:, : manifest.prompt_tokens] = manifest.pad_token_id
    lengths = np.array(LENGTHS, np.int32) + manifest.prompt_tokens
    lengths = np.minimum(lengths, max(LENGTHS))
    ids_BL[np.arange(max(LENGTHS)) >= lengths[:, None]] = manifest.pad_token_id
    return TextBatch(ids_BL.astype(np.int64), lengths, np.zeros(len(lengths), np.int32))


def by_torch(half: Any, batch: Batch, lambda_TD: np.ndarray) -> dict[str, torch.Tensor]:
    """What autograd gives of the whole batch, where λ is zero at padding."""
    inputs = {name: torch.from_numpy(values) for name, values in batch.inputs(slice(None)).items()}
    h_BLD = half(**inputs)
    lambda_BLD = torch.zeros_like(h_BLD)
    place = 0
    for row, length in enumerate(batch.lengths_B.tolist()):
        lambda_BLD[row, :length] = torch.from_numpy(lambda_TD[place : place + length])
        place += length
    h_BLD.backward(lambda_BLD)
    return {plain_name(name): value.grad for name, value in half.model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("bundle", CASES, indirect=True)
def test_a_devices_gradient_is_that_of_autograd(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    shard = Shard(bundle, manifest, threads=1)
    shard.open(with_gradients=True)
    shard.rows, shard.max_length = 2, manifest.max_length if manifest.image is not None else max(LENGTHS)
    state = load_file(bundle / SHARD_WEIGHTS)
    for name, weight in shard.weights.items():
        if name.endswith("lora_B.weight"):  # zero at first, so that nothing would reach A
            state[name] = 0.1 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(3))
            weight[...] = state[name].numpy()

    batch = make_batch(manifest)
    lambda_TD = np.random.default_rng(1).standard_normal((batch.tokens, manifest.width)).astype(np.float32)
    expected = by_torch(load_client(bundle, manifest, state), batch, lambda_TD)
    whole = torch.stack([expected[entry.name].norm() for entry in manifest.trainable]).norm()

    for sets in (1, 99):
        with shard.holding(batch):
            kept = shard.last_inputs(sets)
            shard.activations(batch, np.empty_like(lambda_TD), kept)
            gradients = dict(shard.gradients(batch, lambda_TD, kept))
        for entry in manifest.trainable:
            want = expected[entry.name]
            norm = want.norm() if want.norm() > 1e-5 * whole else whole  # a key's bias has none in theory
            got = torch.from_numpy(gradients.get(entry.name, np.zeros(entry.shape, np.float32)))
            assert (got - want).norm() <= TOLERANCE * norm, entry.name
