"""The client half on the device: it computes what torch does, and only what trains is ever written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from hosl_edge.data.datasets import TextBatch
from hosl_edge.model.shard import Shard
from hosl_protocol.run.manifest import SHARD_WEIGHTS, BundleError, Manifest, TensorEntry, load_manifest, sha256_of_file
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import Task
from hosl_protocol.weights.client_weights import make_client_weights
from hosl_protocol.weights.estimates import UpdateRecord

if TYPE_CHECKING:
    from hosl_export.model.halves import ClientHalf

MakeBundle = Callable[[str, int], Path]
SETTINGS = RunSettings(task=Task(name="text", kind="lm", template="{text}"), seed=3, directions=2)
PAD = 3


@pytest.fixture
def bundle(make_bundle: MakeBundle) -> Path:
    return make_bundle("blocks", 2)


@pytest.fixture
def shard(bundle: Path) -> Shard:
    shard = Shard(bundle, load_manifest(bundle), threads=1)
    shard.open()
    shard.max_length = 16
    return shard


def make_batch(lengths: tuple[int, ...], seed: int = 0) -> TextBatch:
    """Random tokens, padded on the right."""
    ids_BL = np.random.default_rng(seed).integers(4, 41, (len(lengths), max(lengths)))
    ids_BL[np.arange(max(lengths)) >= np.array(lengths)[:, None]] = PAD
    return TextBatch(ids_BL.astype(np.int64), np.array(lengths, np.int32), np.zeros(len(lengths), np.int32))


def pack(shard: Shard, batch: TextBatch) -> npt.NDArray[np.float32]:
    return shard.activations(batch, np.full((batch.tokens, shard.manifest.width), np.nan, np.float32))


LENGTHS = [(1, 2, 3, 5, 5, 9, 16), (16,), (1,), (1, 16), (4, 4, 4)]


@pytest.fixture(scope="module")
def expected(make_bundle: MakeBundle, request: pytest.FixtureRequest) -> dict[str, npt.NDArray[np.float32]]:
    """Activations [T, D] by torch for batches of LENGTHS, by `str(lengths)`.

    They lie beside the bundle: a machine without torch compares with what another one computed (tests/aarch64.sh).
    """
    bundle = make_bundle("blocks", 2)
    path = bundle.with_suffix(".npz")
    if "HOSL_TEST_BUNDLES" not in os.environ:
        half = load_half(request.getfixturevalue("tiny_model"), bundle)
        np.savez(path, **{str(lengths): run_half(half, make_batch(lengths)) for lengths in LENGTHS})
    with np.load(path) as found:
        return dict(found)


def load_half(model: Path, bundle: Path) -> ClientHalf:
    """torch's client half with the bundle's weights."""
    import torch

    from hosl_export.model.halves import client_half
    from hosl_export.sources.loading import load_model

    half = client_half(load_model(str(model)), 2)
    parameters = dict(half.model.named_parameters())
    with torch.no_grad():
        for name, values in load_file(bundle / SHARD_WEIGHTS).items():
            parameters[name].copy_(torch.from_numpy(values))
    return half


def run_half(half: ClientHalf, batch: TextBatch) -> npt.NDArray[np.float32]:
    """Its activations [T, D], example by example, so that nothing is padded."""
    import torch

    with torch.no_grad():
        rows = [torch.from_numpy(ids[:n])[None] for ids, n in zip(batch.ids_BL, batch.lengths_B, strict=True)]
        return np.concatenate([half(row)[0].numpy() for row in rows])


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_activations_are_those_of_torch_for_any_micro_batch(
    shard: Shard, expected: dict[str, npt.NDArray[np.float32]], rows: int, lengths: tuple[int, ...]
) -> None:
    shard.rows = rows
    np.testing.assert_allclose(pack(shard, make_batch(lengths)), expected[str(lengths)], rtol=1e-4, atol=1e-5)


def test_opening_again_gives_the_same_bits(shard: Shard) -> None:
    batch = make_batch((3, 9, 16))
    before = pack(shard, batch)
    shard.open()
    np.testing.assert_array_equal(pack(shard, batch), before)


def test_parts_come_in_the_order_of_the_examples_and_never_exceed_a_micro_batch(shard: Shard) -> None:
    batch = make_batch((2, 3, 3, 7, 16))
    whole = pack(shard, batch)
    shard.rows = 1
    places = []
    for place, part_TD in shard.forward(batch):
        places.append((place.start, place.stop))
        np.testing.assert_allclose(part_TD, whole[place], rtol=1e-4, atol=1e-5)
    ends = np.cumsum(batch.lengths_B).tolist()
    assert places == list(zip([0, *ends[:-1]], ends, strict=True))


def test_what_stands_in_the_padding_does_not_matter(shard: Shard) -> None:
    batch = make_batch((3, 9, 12))
    shard.rows = 3
    before = pack(shard, batch)
    batch.ids_BL[batch.ids_BL == PAD] = 17
    np.testing.assert_array_equal(pack(shard, batch), before)


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("token", [41, 4000, -1])
def test_a_token_that_the_table_has_no_row_for_is_an_error_and_no_other_tensors_bytes(
    bundle: Path, is_trained: bool, token: int
) -> None:
    manifest = load_manifest(bundle)
    assert manifest.tokens == 41
    if is_trained:  # the graph then gathers from the whole table
        entries = [
            msgspec.structs.replace(entry, trainable=True, exponent=-20) if entry.lookup else entry
            for entry in manifest.tensors
        ]
        manifest = msgspec.structs.replace(manifest, tensors=tuple(entries))
    shard = Shard(bundle, manifest, threads=1)
    shard.open()
    batch = make_batch((3, 5))
    pack(shard, batch)
    batch.ids_BL[1, 2] = token
    with pytest.raises(BundleError, match=f"a text has token {token}, and the model's token table has 41 rows"):
        pack(shard, batch)


def test_an_update_is_seen_by_the_next_run_and_undone_by_reset(shard: Shard) -> None:
    batch = make_batch((4, 8))
    before = pack(shard, batch)
    base = {name: values.copy() for name, values in shard.weights.items()}
    weights = make_client_weights(shard.manifest, shard.weights, SETTINGS)
    weights.apply([UpdateRecord(1, np.array([0.01, -0.02], np.float32), 0.0)])
    assert np.abs(pack(shard, batch) - before).max() > 1e-4
    shard.reset()
    assert all(values.tobytes() == base[name].tobytes() for name, values in shard.weights.items())
    np.testing.assert_array_equal(pack(shard, batch), before)


def test_the_file_never_changes(shard: Shard, bundle: Path) -> None:
    before = sha256_of_file(bundle / SHARD_WEIGHTS)
    weights = make_client_weights(shard.manifest, shard.weights, SETTINGS)
    weights.apply([UpdateRecord(1, np.array([0.01, -0.02], np.float32), 0.0)])
    shard.reset()
    for entry in shard.manifest.trainable:
        shard.weights[entry.name][...] = 1.0
    assert sha256_of_file(bundle / SHARD_WEIGHTS) == before


def test_frozen_tensors_are_read_only_pages_of_the_file_and_trainable_ones_private(shard: Shard, bundle: Path) -> None:
    frozen = [entry for entry in shard.manifest.tensors if not entry.trainable]
    assert frozen
    assert shard.manifest.trainable
    for entry in shard.manifest.tensors:
        values = shard.weights[entry.name]
        assert values.flags.writeable == entry.trainable
        rights, path = mapping_of(values)
        assert path == str(bundle / SHARD_WEIGHTS)
        assert rights[3] == "p" if entry.trainable else rights[1] == "-"
    with pytest.raises(ValueError, match="read-only"):
        shard.weights[frozen[0].name][...] = 0.0


def mapping_of(values: npt.NDArray[np.float32]) -> tuple[str, str]:
    """Rights and file of the mapping that an array lies in."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, rights, *_, path = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= values.ctypes.data < last:
            return rights, path
    raise AssertionError("the array is mapped nowhere")


def with_tensors(manifest: Manifest, tensors: list[TensorEntry]) -> Manifest:
    return msgspec.structs.replace(manifest, tensors=tuple(tensors))


@pytest.mark.parametrize("changed", [{"name": "model.absent"}, {"shape": (7,)}])
def test_a_file_that_does_not_match_the_manifest_is_refused(bundle: Path, changed: dict[str, object]) -> None:
    manifest = load_manifest(bundle)
    entry = msgspec.structs.replace(manifest.trainable[0], **changed)
    with pytest.raises(BundleError, match=f"does not hold {entry.name}"):
        Shard(bundle, with_tensors(manifest, [entry]), threads=1)


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (lambda data: data[:-4], "cut short"),
        (lambda data: data.replace(b'"F32"', b'"I32"'), "as float32"),
    ],
)
def test_a_file_of_another_type_or_cut_short_is_refused(
    bundle: Path, tmp_path: Path, how: Callable[[bytes], bytes], problem: str
) -> None:
    folder = tmp_path / "bundle"
    (folder / SHARD_WEIGHTS).parent.mkdir(parents=True)
    (folder / SHARD_WEIGHTS).write_bytes(how((bundle / SHARD_WEIGHTS).read_bytes()))
    with pytest.raises(BundleError, match=problem):
        Shard(folder, load_manifest(bundle), threads=1)
