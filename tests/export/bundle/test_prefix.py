"""A bundle whose last blocks alone train: what comes before them is a graph of its own, and runs once a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hosl_edge.data.datasets import TextBatch
from hosl_edge.data.images import blank_images
from hosl_edge.model.shard import Shard
from hosl_export import ExportSettings, export_bundle
from hosl_export.bundle.parity import TOLERANCE
from hosl_protocol.run.manifest import SHARD_PREFIX, load_manifest
from pictures import save_image_model
from tiny import make_batch

IMAGE_KINDS = ("resnet-bottleneck",)
KINDS = ("gemma3_text", "gpt2", "bert", *IMAGE_KINDS)
"""One of each way to cut."""

SPLIT = 2
"""A block before those that train, and one that does: a trace takes as long as it has blocks."""


def make_rows(shard: Shard, seed: int) -> Any:
    """A batch of five rows of different lengths, or of five images."""
    image = shard.manifest.image
    if image is None:
        ids, mask = make_batch(5, 24, seed)
        lengths = mask.sum(dim=1).numpy().astype(np.int32)
        order = np.argsort(lengths)
        return TextBatch(ids.numpy()[order], lengths[order], np.zeros(5, np.int32))
    batch = blank_images(5, image, shard.manifest.max_length)
    batch.pixels_BHWC[...] = np.random.default_rng(seed).integers(0, 256, batch.pixels_BHWC.shape)
    return batch


def run(shard: Shard, batch: Any) -> np.ndarray:
    return shard.activations(batch, np.empty((batch.tokens, shard.manifest.width), np.float32)).copy()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_runs_the_prefix_once_and_sees_the_trained_weights_move(
    tmp_path: Path, model_folder, monkeypatch, kind: str
) -> None:
    is_image, bundle = kind in IMAGE_KINDS, tmp_path / "bundle"
    source = save_image_model(kind, tmp_path / "model") if is_image else model_folder(kind)
    settings = ExportSettings(
        model=str(source), split=SPLIT, out=bundle, train="norm", train_blocks=-1, gradients=False
    )
    summary = export_bundle(settings)
    assert summary.parity_error < TOLERANCE, "both graphs compute what the model computes"
    assert summary.prefix_blocks == SPLIT - 1
    shard = Shard(bundle, load_manifest(bundle), threads=1)
    assert {f".{SPLIT - 1}." in entry.name for entry in shard.manifest.trainable} == {True}
    shard.open()
    shard.rows = 2
    shard.max_length = shard.manifest.max_length if is_image else 24
    batches = [make_rows(shard, seed) for seed in (1, 2)]
    micro_batches = [len(list(shard._micro_batches(batch))) for batch in batches]
    assert min(micro_batches) > 1
    runs: list[str] = []
    assert shard._prefix is not None
    compute = shard._prefix.compute
    monkeypatch.setattr(shard._prefix, "compute", lambda *given: (runs.append("prefix"), compute(*given)))

    # For two batches at once, as a simulation's devices hold theirs.
    with shard.holding(batches[0]), shard.holding(batches[1]):
        before = [run(shard, batch) for batch in batches]
        for entry in shard.manifest.trainable:
            shard.weights[entry.name][...] += np.float32(0.25)
        after = [run(shard, batch) for batch in batches]
        assert len(runs) == sum(micro_batches)
    fresh = [run(shard, batch) for batch in batches]
    assert len(runs) == 2 * sum(micro_batches), "nothing is held outside"
    for old, held, expected in zip(before, after, fresh, strict=True):
        np.testing.assert_array_equal(held, expected)
        assert np.abs(held - old).max() > 1e-2 * np.abs(old).max()


def test_as_many_last_blocks_as_there_are_need_no_prefix(tmp_path: Path, model_folder) -> None:
    settings = ExportSettings(
        model=str(model_folder("opt")), split=2, out=tmp_path / "b", train="norm", train_blocks=-2, gradients=False
    )
    assert export_bundle(settings).prefix_blocks == 0
    assert not (tmp_path / "b" / SHARD_PREFIX).exists()
    manifest = load_manifest(tmp_path / "b")
    assert manifest.prefix is None
    assert {".layers." in entry.name for entry in manifest.trainable} == {True}
