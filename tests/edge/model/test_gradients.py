"""The gradient that a shard computes: that of ⟨λ, f(θ)⟩ by the shard's own forward, however much memory a round has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from hosl_edge.data.datasets import TextBatch
from hosl_edge.model.shard import Shard
from hosl_protocol.run.manifest import SHARD_GRAPH, BundleError, load_manifest

MakeBundle = Callable[[str, int], Path]
Floats = npt.NDArray[np.float32]

PAD = 3
LENGTHS = (4, 5, 5, 9, 16)
CASES = ["norm", "lora", "blocks", "all", "norm:-1", "norm:1"]
"""What trains: in every block, before all blocks, after a prefix, and with blocks behind in which nothing does."""


def open_shard(bundle: Path, rows: int = 2) -> Shard:
    shard = Shard(bundle, load_manifest(bundle), threads=1)
    shard.open(with_gradients=True)
    shard.rows, shard.max_length = rows, max(LENGTHS)
    # Trained adapters: at first B is zero, and nothing would reach A.
    generator = np.random.default_rng(5)
    for entry in shard.manifest.trainable:
        if entry.name.endswith("lora_B.weight"):
            shard.weights[entry.name][...] = generator.normal(0.0, 0.1, entry.shape)
    return shard


def make_batch() -> TextBatch:
    """Random tokens, padded on the right."""
    ids_BL = np.random.default_rng(0).integers(4, 41, (len(LENGTHS), max(LENGTHS)))
    ids_BL[np.arange(max(LENGTHS)) >= np.array(LENGTHS)[:, None]] = PAD
    return TextBatch(ids_BL.astype(np.int64), np.array(LENGTHS, np.int32), np.zeros(len(LENGTHS), np.int32))


def make_lambda(shard: Shard, batch: TextBatch) -> Floats:
    return np.random.default_rng(1).standard_normal((batch.tokens, shard.manifest.width)).astype(np.float32)


def forward(shard: Shard, batch: TextBatch) -> Floats:
    return shard.activations(batch, np.empty((batch.tokens, shard.manifest.width), np.float32))


def compute(shard: Shard, batch: TextBatch, sets: int = 99) -> dict[str, Floats]:
    """The gradient by name, as a round computes it with memory for so many blocks' inputs."""
    with shard.holding(batch):
        kept = shard.last_inputs(sets)
        shard.activations(batch, np.empty((batch.tokens, shard.manifest.width), np.float32), kept)
        return dict(shard.gradients(batch, make_lambda(shard, batch), kept))


@pytest.mark.parametrize("train", CASES)
def test_each_tensors_gradient_is_the_slope_of_the_forward(make_bundle: MakeBundle, train: str) -> None:
    shard, batch = open_shard(make_bundle(train, 2)), make_batch()
    gradients, lambda_TD = compute(shard, batch), make_lambda(shard, batch).astype(np.float64)
    assert gradients.keys() <= {entry.name for entry in shard.manifest.trainable}
    whole = np.sqrt(sum(np.vdot(gradient, gradient) for gradient in gradients.values()))
    generator = np.random.default_rng(2)

    for entry in shard.manifest.trainable:
        weight = shard.weights[entry.name]
        gradient = gradients.get(entry.name, np.zeros(entry.shape, np.float32)).astype(np.float64)
        norm = float(np.linalg.norm(gradient))
        random_z = generator.choice([-1.0, 1.0], entry.shape)
        # Where a gradient points another is seen least, and along random signs as much as anywhere.
        for z in (random_z, gradient / np.abs(gradient).max()) if norm > 1e-4 * whole else (random_z,):
            base, step = weight.copy(), 2e-3
            slopes = []
            for sign in (1, -1):
                weight[...] = base + sign * step * z
                slopes.append(float(np.vdot(lambda_TD, forward(shard, batch))))
            weight[...] = base
            slope = (slopes[0] - slopes[1]) / (2 * step)
            tolerance = 0.02 * norm * np.linalg.norm(z) / np.sqrt(z.size) + 5e-3 * abs(slope) + 1e-4 * whole
            assert float(np.vdot(gradient, z)) == pytest.approx(slope, abs=tolerance), entry.name


@pytest.mark.parametrize(("train", "split", "blocks"), [("blocks", 3, 3), ("all", 2, 2), ("norm:-1", 2, 0)])
def test_what_is_computed_again_gives_the_same_bits(
    make_bundle: MakeBundle, train: str, split: int, blocks: int
) -> None:
    shard, batch = open_shard(make_bundle(train, split)), make_batch()
    assert len(shard.kept_bytes(1, 1)) == blocks
    expected = compute(shard, batch)
    for sets in range(1, blocks + 2):
        found = compute(shard, batch, sets)
        assert {name: values.tobytes() for name, values in found.items()} == {
            name: values.tobytes() for name, values in expected.items()
        }


def test_a_shard_that_is_opened_again_gives_the_same_bits(make_bundle: MakeBundle) -> None:
    shard, batch = open_shard(make_bundle("norm", 2)), make_batch()
    expected = compute(shard, batch)
    shard.open()  # a run of another algorithm
    forward(shard, batch)
    shard.open(with_gradients=True)
    assert all(values.tobytes() == expected[name].tobytes() for name, values in compute(shard, batch).items())


def test_micro_batches_change_no_more_than_last_bits(make_bundle: MakeBundle) -> None:
    batch = make_batch()
    one, other = (compute(open_shard(make_bundle("blocks", 2), rows), batch) for rows in (1, 64))
    whole = np.sqrt(sum(np.vdot(gradient, gradient) for gradient in one.values()))
    for name, values in one.items():
        assert np.abs(values - other[name]).max() <= 1e-5 * whole, name


def test_what_stands_in_the_padding_does_not_matter(make_bundle: MakeBundle) -> None:
    shard, batch = open_shard(make_bundle("norm", 2)), make_batch()
    expected = compute(shard, batch)
    batch.ids_BL[batch.ids_BL == PAD] = 17
    assert all(values.tobytes() == expected[name].tobytes() for name, values in compute(shard, batch).items())


def test_weights_and_inputs_are_not_changed(make_bundle: MakeBundle) -> None:
    shard, batch = open_shard(make_bundle("all", 2)), make_batch()
    before = {name: values.tobytes() for name, values in shard.weights.items()}, batch.ids_BL.tobytes()
    lambda_TD = make_lambda(shard, batch)
    kept = shard.last_inputs(1)
    forward(shard, batch)
    shard.activations(batch, np.empty_like(lambda_TD), kept)
    lambda_bits = lambda_TD.tobytes()
    for _ in shard.gradients(batch, lambda_TD, kept):
        pass
    assert lambda_TD.tobytes() == lambda_bits
    assert ({name: values.tobytes() for name, values in shard.weights.items()}, batch.ids_BL.tobytes()) == before


def test_no_more_blocks_are_kept_than_there_is_memory_for(make_bundle: MakeBundle) -> None:
    shard, batch = open_shard(make_bundle("blocks", 2)), make_batch()
    kept = shard.last_inputs(1)
    assert list(kept) == [1]
    shard.activations(batch, np.empty((batch.tokens, shard.manifest.width), np.float32), kept)
    sizes = {block: sum(values.nbytes for values in inputs) for block, inputs in kept.items()}
    assert all(size <= shard.kept_bytes(len(LENGTHS), max(LENGTHS))[block] for block, size in sizes.items())
    for _ in shard.gradients(batch, make_lambda(shard, batch), kept):
        pass
    assert kept == {}, "what a block was given goes with its gradient"


def test_a_forward_that_lacks_what_a_block_is_given_is_an_error(make_bundle: MakeBundle) -> None:
    bundle = make_bundle("blocks", 2)
    manifest = load_manifest(bundle)
    entries = [msgspec.structs.replace(entry, block=entry.block + 7) for entry in manifest.gradients]
    shard = Shard(bundle, msgspec.structs.replace(manifest, gradients=tuple(entries)), threads=1)
    with pytest.raises(BundleError, match=rf"{SHARD_GRAPH} has no output input\.7: export the bundle again"):
        shard.open(with_gradients=True)
