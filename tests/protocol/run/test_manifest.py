"""The manifest: what it refuses, and digests that stay."""

from __future__ import annotations

import hashlib
import struct

import msgspec
import pytest

from hosl_protocol.run.manifest import (
    BlockGradient,
    BundleError,
    FileEntry,
    ImageEntry,
    LoraEntry,
    Manifest,
    TensorEntry,
    decode_manifest,
    describe_file,
    encode_manifest,
    load_manifest,
    sha256_of_file,
)

FILES = (
    FileEntry(path="shard/shard.onnx", size_bytes=10, sha256="a" * 64),
    FileEntry(path="shard/shard.safetensors", size_bytes=20, sha256="b" * 64),
    FileEntry(path="tail/tail.safetensors", size_bytes=30, sha256="c" * 64),
)
GOLDEN_SHARD_DIGEST = (
    "73f809eabdef55ba6f738bcae8806fa01b8b6027cd24f98a4bd6c7b32957518a"  # the same stands in protocol/README.md
)


def make_manifest(**changes):
    fields = {
        "model": "m", "family": "llama", "architecture": "LlamaForCausalLM", "split": 6, "blocks": 30, "width": 576,
        "max_length": 128, "pad_token_id": 2, "train": "lora", "lora": LoraEntry(targets=("q_proj", "v_proj")),
        "tensors": (
            TensorEntry(name="embed.weight", shape=(10, 576)),
            TensorEntry(name="q.lora_A.weight", shape=(8, 576), trainable=True, exponent=-24),
            TensorEntry(name="q.lora_B.weight", shape=(576, 8), trainable=True, exponent=-24),
        ),
        "files": FILES,
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def changed_json(**changes):
    return msgspec.json.encode({**msgspec.json.decode(encode_manifest(make_manifest())), **changes})


def test_a_manifest_is_read_back_as_it_was_written():
    assert decode_manifest(encode_manifest(make_manifest())) == make_manifest()


def test_place_among_the_trainable_tensors_is_the_direction_index():
    assert [entry.name for entry in make_manifest().trainable] == ["q.lora_A.weight", "q.lora_B.weight"]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff", b"null"])
def test_bytes_that_are_no_manifest_are_refused(data):
    with pytest.raises(BundleError, match=r"somewhere/manifest\.json is not a manifest"):
        decode_manifest(data, "somewhere/manifest.json")


@pytest.mark.parametrize("field", ["format_version", "rng_version"])
def test_another_version_is_refused_with_both_numbers(field):
    with pytest.raises(BundleError, match=f"has {field} 2, this hosl reads 1: export the bundle again"):
        decode_manifest(changed_json(**{field: 2}))


def tensor(**changes):
    return {"name": "w", "shape": [2], "trainable": True, "exponent": -24, **changes}


WITH_PREFIX = {"files": [{"path": "shard/prefix.onnx", "size_bytes": 1, "sha256": "0"}]}


def test_a_prefix_is_read() -> None:
    manifest = decode_manifest(changed_json(prefix={"blocks": 1, "width": 4}, **WITH_PREFIX))
    assert manifest.prefix is not None
    assert manifest.prefix.set_bytes(rows=3, length=5) == 4 * 3 * 5 * 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tensors": [tensor(exponent=None)]}, "trainable tensor w has no lattice exponent"),
        ({"tensors": [tensor(exponent=-25)]}, "lattice exponent of w is -25, expected -24 to 103"),
        ({"tensors": [tensor(exponent=104)]}, "lattice exponent of w is 104, expected -24 to 103"),
        ({"tensors": [tensor(), tensor()]}, "lists tensor w twice"),
        ({"tensors": [tensor(dtype="float16")]}, "is not a manifest"),
        ({"train": "everything"}, "is not a manifest"),
        ({"split": "6"}, "is not a manifest"),
        ({"files": [msgspec.to_builtins(FILES[0])] * 2}, "lists file shard/shard.onnx twice"),
        ({"files": [{"path": "shard/../../x", "size_bytes": 1, "sha256": "0"}]}, "names a file outside the bundle"),
        ({"files": [{"path": "/etc/x", "size_bytes": 1, "sha256": "0"}]}, "names a file outside the bundle"),
        ({"prefix": {"blocks": 6, "width": 4}}, "the prefix entry contradicts the rest"),
        ({"prefix": {"blocks": 1, "width": 0}, **WITH_PREFIX}, "the prefix entry contradicts the rest"),
        ({"prefix": {"blocks": 1, "width": 4, "positions": 9}, **WITH_PREFIX}, "the prefix entry contradicts the rest"),
        ({"train": "prompt", "tensors": [tensor()]}, "prompt_tokens 0 contradicts the rest"),
        ({"train": "prompt", "tensors": [tensor()], "prompt_tokens": 3}, "prompt_tokens 3 contradicts the rest"),
        ({"train": "norm", "tensors": [tensor()], "prompt_tokens": 2}, "prompt_tokens 2 contradicts the rest"),
        ({"prefix": {"blocks": 1, "width": 4}}, "the prefix entry contradicts the rest"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changes, sentence):
    with pytest.raises(BundleError, match=sentence):
        decode_manifest(changed_json(**changes))


def gradient(block, tensor="q.lora_A.weight", **changes):
    fields = {"graph": "shard/shard.onnx", "parameters": {"a": "embed.weight"}, "gradients": {"gradient.a": tensor}}
    return {"block": block, **fields, **changes}


def test_gradients_of_blocks_are_read() -> None:
    manifest = decode_manifest(changed_json(gradients=[gradient(4), gradient(5, "q.lora_B.weight")]))
    assert [entry.block for entry in manifest.gradients] == [4, 5]
    assert manifest.gradients[1] == BlockGradient(
        block=5,
        graph="shard/shard.onnx",
        parameters={"a": "embed.weight"},
        gradients={"gradient.a": "q.lora_B.weight"},
    )


def passing(*blocks):
    return [gradient(block, gradients={}) for block in blocks]


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        (passing(5, 4), r"the blocks \[5, 4\], expected all from one, -1 or later, to 5"),
        (passing(5, 5), r"of the blocks \[5, 5\], expected all"),
        (passing(3, 5), r"of the blocks \[3, 5\], expected all"),
        (passing(4), r"of the blocks \[4\], expected all"),
        (passing(6), r"of the blocks \[6\], expected all"),
        (passing(*range(-2, 6)), "expected all from one, -1 or later"),
        ([gradient(5, graph="shard/x.onnx")], "block 5 has the graph 'shard/x.onnx', which is none of the shard's"),
        ([gradient(5, graph="tail/tail.safetensors")], "which is none of the shard's files"),
        ([gradient(5, parameters={"a": "b"})], "block 5 names 'b', which is not a tensor of the shard"),
        ([gradient(5, "embed.weight")], "block 5 names 'embed.weight', which is not trainable of the shard"),
        ([gradient(5, parameters={"cotangent": "embed.weight"})], "or its gradient 'cotangent', which is another's"),
        ([gradient(4), gradient(5)], r"the gradient of q\.lora_A\.weight has two places"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(entries, sentence) -> None:
    with pytest.raises(BundleError, match=sentence):
        decode_manifest(changed_json(gradients=entries))


def test_no_gradient_is_of_a_block_of_the_prefix() -> None:
    files = [*map(msgspec.to_builtins, FILES), *WITH_PREFIX["files"]]
    changes = {"prefix": {"blocks": 4, "width": 4}, "files": files}
    assert len(decode_manifest(changed_json(**changes, gradients=passing(4, 5))).gradients) == 2
    with pytest.raises(BundleError, match="expected all from one, 4 or later, to 5"):
        decode_manifest(changed_json(**changes, gradients=passing(3, 4, 5)))


def test_shard_digest_is_that_of_the_shards_files_by_path_and_of_what_trains():
    text = (
        f"shard/shard.onnx 10 {'a' * 64}\nshard/shard.safetensors 20 {'b' * 64}\n"
        "q.lora_A.weight -24\nq.lora_B.weight -24\n"
    )
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert make_manifest().shard_digest == expected == GOLDEN_SHARD_DIGEST
    assert make_manifest(files=FILES[::-1]).shard_digest == expected
    assert make_manifest(files=FILES[:2]).shard_digest == expected


def test_shard_digest_notices_every_change_of_a_file():
    changed = [
        FileEntry(path="shard/other.onnx", size_bytes=10, sha256="a" * 64),
        FileEntry(path="shard/shard.onnx", size_bytes=11, sha256="a" * 64),
        FileEntry(path="shard/shard.onnx", size_bytes=10, sha256="d" * 64),
    ]
    digests = {make_manifest(files=(one, *FILES[1:])).shard_digest for one in (FILES[0], *changed)}
    assert len(digests) == 4


def test_shard_digest_notices_a_change_of_what_trains_and_how():
    first, second, third = make_manifest().tensors
    others = [(first, third, second), (first, second), (first, second, msgspec.structs.replace(third, exponent=-23))]
    digests = {make_manifest(tensors=tensors).shard_digest for tensors in ((first, second, third), *others)}
    assert len(digests) == 4


def test_shard_digest_covers_what_graphs_of_the_gradient_are_bound_to():
    first = BlockGradient(block=0, graph="shard/g.onnx", parameters={"b": "x", "a": "y"}, gradients={"ga": "y"})
    changes = [{}, {"block": 1}, {"graph": "shard/h.onnx"}, {"parameters": {"b": "y", "a": "x"}}, {"gradients": {}}]
    entries = [(msgspec.structs.replace(first, **changed),) for changed in changes]
    digests = [make_manifest(tensors=(), files=FILES[:1], gradients=each).shard_digest for each in ((), *entries)]
    text = f"shard/shard.onnx 10 {'a' * 64}\ngradient 0 shard/g.onnx a=y b=x ga=y\n"
    assert digests[1] == hashlib.sha256(text.encode()).hexdigest() == GOLDEN_GRADIENT_DIGEST
    assert len(set(digests)) == 6


IMAGE = ImageEntry(channels=3, height=32, width=32, mean=(0.5,) * 3, std=(0.25,) * 3, grid=(16, 8))
GOLDEN_GRADIENT_DIGEST = "83e383ad781eac33d0abb2fc117215b04faf84b07454adbc05f17c00def88500"  # likewise
GOLDEN_IMAGE_DIGEST = "a9286aeec39623d9327b0d656f8a472f563eb3b4097f5f34e3980d3d8f541302"  # and in protocol/README.md


def test_shard_digest_covers_what_an_image_becomes():
    entry = msgspec.structs.replace(IMAGE, grid=None)
    changes = [{}, {"std": (0.25, 0.25, 0.5)}, {"mean": (0.5, 0.5, 0.0)}, {"rescale": 1.0}, {"resample": "box"}]
    images = [msgspec.structs.replace(entry, **changed) for changed in changes]
    digests = [make_manifest(tensors=(), files=FILES[:1], image=image).shard_digest for image in (*images, None)]
    half = struct.pack(">d", 0.5).hex()
    line = f"image 3 32 32 bilinear {struct.pack('>d', 1 / 255).hex()} {half} {half} {half}" + " 3fd0000000000000" * 3
    text = f"shard/shard.onnx 10 {'a' * 64}\n{line}\n"
    assert digests[0] == hashlib.sha256(text.encode()).hexdigest() == GOLDEN_IMAGE_DIGEST
    assert len(set(digests)) == 6


@pytest.mark.parametrize(
    "changed",
    [
        {"channels": 5, "mean": (0.5,) * 5, "std": (0.5,) * 5},
        {"height": 0},
        {"width": 2**20},
        {"mean": (0.5,)},
        {"std": (0.5, 0.5, 0.0)},
        {"grid": (16, 9)},
    ],
)
def test_an_image_entry_that_contradicts_itself_is_refused(changed):
    good = make_manifest(image=IMAGE)
    assert decode_manifest(encode_manifest(good)) == good
    spoilt = make_manifest(image=msgspec.structs.replace(IMAGE, **changed))
    with pytest.raises(BundleError, match="the image entry contradicts itself"):
        decode_manifest(encode_manifest(spoilt))


def test_a_constant_that_trains_is_refused():
    tensor = TensorEntry(name="w", shape=(2,), trainable=True, exponent=-24, constant=True)
    with pytest.raises(BundleError, match="w trains and is a constant of the graph"):
        decode_manifest(encode_manifest(make_manifest(tensors=(tensor,))))


def test_files_are_described_by_size_and_digest(tmp_path):
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "x").write_bytes(b"abc" * 1_000_000)
    expected = hashlib.sha256(b"abc" * 1_000_000).hexdigest()
    assert describe_file(tmp_path, "shard/x") == FileEntry(path="shard/x", size_bytes=3_000_000, sha256=expected)
    assert sha256_of_file(tmp_path / "shard" / "x") == expected


def test_a_manifest_is_loaded_from_its_folder_or_the_folder_is_named(tmp_path):
    with pytest.raises(BundleError, match=f"no bundle at {tmp_path}: No such file or directory"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(encode_manifest(make_manifest()))
    assert load_manifest(tmp_path) == make_manifest()
