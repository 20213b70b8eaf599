"""What a hostile cloud may send, with the right digests: whatever is in it, it is refused by an error of our own."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hosl_edge.data.datasets import TextBatch
from hosl_edge.device import Device
from hosl_edge.exceptions import SnapshotError
from hosl_edge.history.snapshot import read_snapshot
from hosl_edge.model.shard import Shard
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import HoslError
from hosl_protocol.run.manifest import (
    MANIFEST,
    SHARD_GRAPH,
    SHARD_TOKENIZER,
    SHARD_WEIGHTS,
    BundleError,
    Manifest,
    TensorEntry,
    decode_manifest,
    encode_manifest,
    load_manifest,
)
from hosl_protocol.run.settings import RunSettings, convert
from hosl_protocol.run.tasks import Task, load_preset
from hosl_protocol.run.updates import update_shape
from hosl_protocol.weights.client_weights import make_client_weights
from hosl_protocol.wire.messages import Welcome
from support import mirror_of, write_reviews, write_snapshot

SETTINGS = RunSettings(task=convert(load_preset("reviews"), Task, "task"), max_length=16, batch_size=4)
NASTY: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    2**31,
    2**63,
    2**64,
    1.5,
    1e308,
    "",
    "x",
    "\x00",
    [],
    [-1],
    [2**32, 2**32],
    {},
    {"a": 1},
)
SEEDS = range(60)


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle("norm", 2)


@pytest.fixture
def folder(bundle: Path, tmp_path: Path) -> Path:
    """A shard of its own."""
    shutil.copytree(bundle / "shard", tmp_path / "shard")
    return tmp_path


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def twisted(value: Any, seed: int) -> Any:
    """The document with one place replaced, or left out."""
    chance, value = random.Random(seed), json.loads(json.dumps(value))
    path = chance.choice([path for path in places(value) if path])
    at = value
    for key in path[:-1]:
        at = at[key]
    if chance.random() < 0.2:
        del at[path[-1]]
    else:
        at[path[-1]] = chance.choice(NASTY)
    return value


def use(folder: Path, manifest: Manifest) -> None:
    """All that opens a shard's files, and one forward."""
    shard = Shard(folder, manifest, 1)
    shard.open()
    make_client_weights(manifest, shard.weights, SETTINGS).close()
    lengths = np.full(2, 4, np.int32)
    for _ in shard.forward(TextBatch(np.zeros((2, 4), np.int64), lengths, np.zeros(2, np.int32))):
        pass


def is_refused(work: Callable[[], object]) -> bool:
    """Whether it ends in an error of ours, in one line; any other is the test's."""
    sentence = ""
    try:
        work()
    except HoslError as error:
        sentence = str(error)
    assert "\n" not in sentence
    return sentence != ""


def replace_header(path: Path, header: Any) -> None:
    """Of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def header_of(path: Path) -> Any:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])


def test_a_manifest_with_anything_in_it(folder: Path, bundle: Path) -> None:
    document = json.loads((bundle / MANIFEST).read_bytes())
    document["versions"], document["model"] = {}, "m"
    refused = [
        is_refused(lambda seed=seed: use(folder, decode_manifest(json.dumps(twisted(document, seed)).encode())))  # type: ignore[misc]
        for seed in SEEDS
    ]
    assert sum(refused) > len(SEEDS) / 3


@pytest.mark.parametrize(
    "changed",
    [
        {"max_length": -5},
        {"max_length": 2**62},
        {"width": 0},
        {"pad_token_id": -1},
        {"split": 99},
        *({"tensors": shape} for shape in ((2**32, 2**32), (-1,), (0,), (2**63,), (2**40, 2))),
    ],
)
def test_numbers_that_no_model_has_are_refused(bundle: Path, changed: dict[str, Any]) -> None:
    manifest = load_manifest(bundle)
    if shape := changed.get("tensors"):
        changed = {"tensors": (*manifest.tensors, TensorEntry(name="evil", shape=shape))}
    with pytest.raises(BundleError, match="expected"):
        decode_manifest(encode_manifest(msgspec.structs.replace(manifest, **changed)))


def test_a_weights_file_with_any_header(folder: Path, bundle: Path) -> None:
    path, manifest = folder / SHARD_WEIGHTS, load_manifest(bundle)
    good, header = path.read_bytes(), header_of(path)
    odd = [b'"abc"', b"1", b"[" * 200_000, b"\xff", b"", b"{}", b'{"a": {"dtype": "F32"}}']
    for text in [*odd, *(twisted(header, seed) for seed in SEEDS)]:
        path.write_bytes(good)
        replace_header(path, text)
        is_refused(lambda: use(folder, manifest))
    for text in odd:
        path.write_bytes(good)
        replace_header(path, text)
        with pytest.raises(BundleError, match=r"shard\.safetensors cannot be used"):
            use(folder, manifest)


def test_a_graph_with_any_byte_changed(folder: Path, bundle: Path) -> None:
    path, manifest = folder / SHARD_GRAPH, load_manifest(bundle)
    good = path.read_bytes()
    assert not is_refused(lambda: use(folder, manifest))
    refused = []
    for seed in SEEDS:
        changed, chance = bytearray(good), random.Random(seed)
        changed[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(changed if seed % 3 else changed[: chance.randrange(len(good))]))
        refused.append(is_refused(lambda: use(folder, manifest)))
    assert sum(refused) > len(SEEDS) / 3


def test_a_snapshot_with_any_header(tmp_path: Path, bundle: Path) -> None:
    manifest, path = load_manifest(bundle), tmp_path / "snapshot"
    weights = mirror_of(bundle, manifest, SETTINGS)
    write_snapshot(path, "r", 0, weights.state(), manifest)
    good, header = path.read_bytes(), header_of(path)
    deep = [b'"abc"', b"1", b"[" * 200_000, b"null", b"{}", b'{"__metadata__": 1}', b'{"__metadata__": {"hosl": 1}}']
    for text in [*deep, *(twisted(header, seed) for seed in SEEDS)]:
        path.write_bytes(good)
        replace_header(path, text)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        is_refused(lambda: weights.load_state(read_snapshot(path, sha256, manifest)[1]))  # noqa: B023
        if text in deep:
            with pytest.raises(SnapshotError, match="it is no snapshot of this shard"):
                read_snapshot(path, sha256, manifest)


def test_a_tokenizer_with_anything_in_it(folder: Path, bundle: Path) -> None:
    path, manifest = folder / SHARD_TOKENIZER, load_manifest(bundle)
    document = json.loads(path.read_bytes())
    data = write_reviews(folder / "train.jsonl", 4)
    settings = EdgeSettings(
        server="", token_file="", data=str(data), name="pi", threads=1, state_dir=str(folder / "state"), cache_dir=""
    )
    welcome = Welcome(
        run="r",
        epoch=0,
        round=0,
        width=manifest.width,
        update=update_shape(SETTINGS, manifest),
        settings=SETTINGS,
        plan="continue",
    )
    texts = [b"", b"[]", b"{}", b"\xff", b"[" * 200_000]
    texts += [json.dumps(twisted(document, seed)).encode() for seed in SEEDS[:25]]
    for text in texts:
        path.write_bytes(text)
        shutil.rmtree(folder / "state", ignore_errors=True)
        device = Device(settings, folder, manifest)
        refused = is_refused(lambda: device.join(welcome, lambda snapshot, path: None))  # noqa: B023
        assert refused or text not in texts[:5]
        device.close()
