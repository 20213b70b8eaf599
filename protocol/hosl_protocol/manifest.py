"""The bundle's manifest: what was cut, where, what trains, and the digests of every file."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from hosl_protocol import lattice
from hosl_protocol.directions import RNG_VERSION
from hosl_protocol.exceptions import ExitCode, HoslError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_GRAPH = "shard/shard.onnx"
SHARD_WEIGHTS = "shard/shard.safetensors"
SHARD_TOKENIZER = "shard/tokenizer.json"
TAIL_CONFIG = "tail/config.json"
TAIL_WEIGHTS = "tail/tail.safetensors"

TrainMode = Literal["none", "lora", "norm", "blocks", "all"]


class BundleError(HoslError):
    """A bundle or one of its files is missing, damaged, or of another version."""

    exit_code = ExitCode.BUNDLE


class TensorEntry(msgspec.Struct, kw_only=True, frozen=True):
    """One parameter of the shard."""

    name: str
    """Hugging Face name; LoRA adapters as `<module>.lora_A.weight` and `<module>.lora_B.weight`."""
    shape: tuple[int, ...]
    dtype: Literal["float32"] = "float32"
    trainable: bool = False
    exponent: int | None = None
    """Lattice exponent e (values are multiples of 2^e); only where trainable."""
    lookup: bool = False
    """Whether it is the token embedding: the graph only gathers rows of it by `input_ids`, and leaves its first
    dimension free, so that a client may bind just the rows of a batch and number its tokens anew."""


class LoraEntry(msgspec.Struct, kw_only=True, frozen=True):
    """LoRA as PEFT defines it: y = Wx + (alpha / r) B(Ax)."""

    r: int = 8
    alpha: int = 16
    targets: tuple[str, ...]
    """Names of the adapted modules inside a block, as in PEFT's `target_modules`."""


class FileEntry(msgspec.Struct, kw_only=True, frozen=True):
    """One file of the bundle."""

    path: str
    """Relative to the bundle, with forward slashes."""
    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, kw_only=True, frozen=True):
    """`manifest.json`: everything that a device or a trainer must know about the bundle."""

    format_version: int = FORMAT_VERSION
    rng_version: int = RNG_VERSION
    model: str
    """Hub id, or the name of the local folder or file."""
    revision: str | None = None
    family: str
    """Key of the family table of hosl_export, for example `llama`."""
    architecture: str
    """Hugging Face class of the uncut model."""
    split: int
    """Blocks on the device."""
    blocks: int
    """Blocks of the uncut model."""
    width: int
    """Width of the activations at the cut layer."""
    max_length: int
    """Longest input, in tokens, that the bundle was checked for and that a run may use."""
    pad_token_id: int
    train: TrainMode
    lora: LoraEntry | None = None
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    """Graph inputs that are not weights, both int64 [batch, token]; the mask is absent where the family needs none."""
    output: str = "activations"
    """Graph output, float32 [batch, token, width]."""
    tensors: tuple[TensorEntry, ...]
    """The shard's parameters; the place of a trainable one among the trainable ones is its direction index."""
    lattice_max_change: float = 0.0
    """Largest absolute change of a weight when it was put on the lattice."""
    files: tuple[FileEntry, ...]
    versions: dict[str, str] = {}
    """Versions of the tools that wrote the bundle."""

    @property
    def trainable(self) -> tuple[TensorEntry, ...]:
        """The trainable tensors; position = direction index."""
        return tuple(entry for entry in self.tensors if entry.trainable)

    @property
    def shard_files(self) -> tuple[FileEntry, ...]:
        """The files that a device fetches."""
        return tuple(entry for entry in self.files if entry.path.startswith("shard/"))

    @property
    def shard_digest(self) -> str:
        """SHA-256 over `path size sha256` lines of the shard's files, sorted, then `name exponent` of what trains.

        Two shards of one digest compute the same, and take the same steps.
        """
        lines = sorted(f"{entry.path} {entry.size_bytes} {entry.sha256}\n" for entry in self.shard_files)
        lines += [f"{entry.name} {entry.exponent}\n" for entry in self.trainable]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode_manifest(data: bytes, where: str = MANIFEST) -> Manifest:
    """Parse and check a manifest. Raises BundleError."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise BundleError(f"{where} is not a manifest: {error}") from error
    for field, expected in (("format_version", FORMAT_VERSION), ("rng_version", RNG_VERSION)):
        got = getattr(manifest, field)
        if got != expected:
            raise BundleError(f"{where} has {field} {got}, this hosl reads {expected}: export the bundle again")
    for entry in manifest.trainable:
        if entry.exponent is None:
            raise BundleError(f"{where}: trainable tensor {entry.name} has no lattice exponent")
        if not lattice.MIN_EXPONENT <= entry.exponent <= lattice.MAX_EXPONENT:
            limits = f"expected {lattice.MIN_EXPONENT} to {lattice.MAX_EXPONENT}"
            raise BundleError(f"{where}: lattice exponent of {entry.name} is {entry.exponent}, {limits}")
    for what, names in (("tensor", [t.name for t in manifest.tensors]), ("file", [f.path for f in manifest.files])):
        repeated = next((name for name, times in Counter(names).items() if times > 1), None)
        if repeated is not None:
            raise BundleError(f"{where} lists {what} {repeated} twice")
    for file in manifest.files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts:
            raise BundleError(f"{where} names a file outside the bundle: {file.path!r}")
    return manifest


def load_manifest(bundle: Path) -> Manifest:
    """Read `bundle`/manifest.json. Raises BundleError."""
    path = bundle / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"no bundle at {bundle}: {error.strerror or error} ({MANIFEST})") from error
    return decode_manifest(data, str(path))


def describe_file(bundle: Path, relative: str) -> FileEntry:
    """Size and digest of one file of a bundle."""
    path = bundle / relative
    return FileEntry(path=relative, size_bytes=path.stat().st_size, sha256=sha256_of_file(path))


def sha256_of_file(path: Path) -> str:
    """Digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
