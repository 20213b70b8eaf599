"""The bundle's manifest: what was cut, where, what trains, and the digests of every file."""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from hosl_protocol.arithmetic import lattice
from hosl_protocol.arithmetic.directions import RNG_VERSION
from hosl_protocol.exceptions import ExitCode, HoslError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_GRAPH = "shard/shard.onnx"
SHARD_PREFIX = "shard/prefix.onnx"
SHARD_WEIGHTS = "shard/shard.safetensors"
SHARD_TOKENIZER = "shard/tokenizer.json"
SHARD_CHAT = "shard/chat.json"
TAIL_CONFIG = "tail/config.json"
TAIL_WEIGHTS = "tail/tail.safetensors"

BOUNDARY = "boundary"
"""What `shard.onnx` takes of `prefix.onnx`, where there is one: float32 [batch, position, width]. Of a block's gradient
what that block is given, of the same kind, or a feature map [batch, channel, row, column]."""

COTANGENT, INPUT_GRADIENT = "cotangent", "input_gradient"
"""Of a block's gradient: what its graph takes, the gradient of the block's output, and what it gives to the block
before, the gradient of its `boundary`."""

RESERVED = frozenset({BOUNDARY, COTANGENT, INPUT_GRADIENT, "input_ids", "pixel_values", "attention_mask"})
"""Names in a graph of a gradient that no weight has."""

SHORTEST_TEXT = 2
"""Tokens that a soft prompt leaves a text room for, at least."""

MAX_WIDTH, MAX_LENGTH, MAX_ELEMENTS = 2**24, 2**24, 2**40
"""Of what a manifest says of a model: far above any, and small enough to compute with."""

TrainMode = Literal["none", "lora", "lora-b", "norm", "prompt", "blocks", "all"]


def input_output(block: int) -> str:
    """Name of the output of `shard.onnx` that is what a block of the uncut model is given."""
    return f"input.{block}"


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
    constant: bool = False
    """Whether the graph holds it itself, so that it is no input: a frozen weight, or a statistic of a batch-norm."""


class ImageEntry(msgspec.Struct, kw_only=True, frozen=True):
    """What the shard takes of an image: uint8 pixels v become (v · rescale - mean) / std of their channel."""

    channels: int
    """1 to 4; a grey image is repeated to them."""
    height: int
    width: int
    """Pixels; an image of another size is resized to them whole, without keeping its proportions."""
    mean: tuple[float, ...]
    """One a channel."""
    std: tuple[float, ...]
    """One a channel, above 0."""
    rescale: float = 1 / 255
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bilinear"
    """Pillow's filter for resizing."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the positions, in row-major order, where activations are a feature map."""


class LoraEntry(msgspec.Struct, kw_only=True, frozen=True):
    """LoRA as PEFT defines it: y = Wx + (alpha / r) B(Ax)."""

    r: int = 8
    alpha: int = 16
    targets: tuple[str, ...]
    """Names of the adapted modules inside a block, as in PEFT's `target_modules`."""


class PrefixEntry(msgspec.Struct, kw_only=True, frozen=True):
    """The blocks before the first that trains. They are a graph of their own, because a round runs them once."""

    blocks: int
    """1 to `split` less 1."""
    width: int
    """Of the activations after them."""
    positions: int = 0
    """Of an image there; 0 for text, which has as many as tokens."""

    def set_bytes(self, rows: int, length: int) -> int:
        """Bound the bytes that the activations of `rows` examples take, of texts of at most `length` tokens."""
        return 4 * rows * (self.positions or length) * self.width


class BlockGradient(msgspec.Struct, kw_only=True, frozen=True):
    """A graph that computes the gradient of what trains in one block: its vector-Jacobian product with a cotangent."""

    block: int
    """Number in the uncut model; -1: what comes before the first block."""
    graph: str
    """File of the graph below `shard/`; equal blocks share one."""
    parameters: dict[str, str]
    """The graph's inputs that are weights, and for each the name of the tensor bound to it."""
    gradients: dict[str, str]
    """The graph's outputs that are gradients, float32, and for each the name of the trainable tensor whose it is; none
    where the gradient only passes through."""


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
    """Longest input, in tokens, that the bundle was checked for and that a run may use; for images the positions that
    each has at the cut layer."""
    pad_token_id: int
    train: TrainMode
    lora: LoraEntry | None = None
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    """Graph inputs that are not weights, both int64 [batch, token]; the mask is absent where the family needs none.
    For images `pixel_values`, float32 [batch, channel, row, column]."""
    output: str = "activations"
    """Graph output, float32 [batch, token, width]."""
    tensors: tuple[TensorEntry, ...]
    """The shard's parameters; the place of a trainable one among the trainable ones is its direction index."""
    lattice_max_change: float = 0.0
    """Largest absolute change of a weight when it was put on the lattice."""
    files: tuple[FileEntry, ...]
    versions: dict[str, str] = {}
    """Versions of the tools that wrote the bundle."""
    image: ImageEntry | None = None
    """What an image becomes; None where the model takes text."""
    prompt_tokens: int = 0
    """Tokens before every text whose embeddings the graph replaces by vectors that train; `max_length` counts them."""
    prefix: PrefixEntry | None = None
    """What `shard/prefix.onnx` computes; None where `shard.onnx` is the whole of the device's half."""
    gradients: tuple[BlockGradient, ...] = ()
    """One for each block from the first in which something trains to the last of the device, in this order. A trainable
    tensor that none of them names has gradient zero. Empty where the bundle has no such graphs."""

    @property
    def trainable(self) -> tuple[TensorEntry, ...]:
        """The trainable tensors; position = direction index."""
        return tuple(entry for entry in self.tensors if entry.trainable)

    @property
    def tokens(self) -> int | None:
        """Rows of the token table: what a token id stays below; None where the model takes no text."""
        return next((entry.shape[0] for entry in self.tensors if entry.lookup), None)

    @property
    def shard_files(self) -> tuple[FileEntry, ...]:
        """The files that a device fetches."""
        return tuple(entry for entry in self.files if entry.path.startswith("shard/"))

    @property
    def shard_digest(self) -> str:
        """SHA-256 over `path size sha256` lines of the shard's files, sorted, `name exponent` of what trains, the
        image's facts, and which tensors the graphs of the gradient are bound to.

        Two shards of one digest compute the same, and take the same steps.
        """
        # Sorted, so that the order of the files in the manifest does not matter; that of what trains does.
        lines = sorted(f"{entry.path} {entry.size_bytes} {entry.sha256}\n" for entry in self.shard_files)
        lines += [f"{entry.name} {entry.exponent}\n" for entry in self.trainable]
        lines += [] if self.image is None else [_image_line(self.image)]
        lines += [_gradient_line(entry) for entry in self.gradients]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _image_line(image: ImageEntry) -> str:
    """What the image's entry says, numbers that are not whole as the bits of their float64."""
    numbers = [struct.pack(">d", number).hex() for number in (image.rescale, *image.mean, *image.std)]
    return " ".join([f"image {image.channels} {image.height} {image.width} {image.resample}", *numbers]) + "\n"


def _gradient_line(entry: BlockGradient) -> str:
    """Which graph computes a block's gradient, and what is bound to it, in the order of the names."""
    parts = (entry.parameters, entry.gradients)
    names = [f"{name}={tensor}" for part in parts for name, tensor in sorted(part.items())]
    return " ".join([f"gradient {entry.block} {entry.graph}", *names]) + "\n"


# Made here, on import: threads that use a type for the first time at once crash msgspec.
_DECODER = msgspec.json.Decoder(Manifest)


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode_manifest(data: bytes, where: str = MANIFEST) -> Manifest:
    """Parse and check a manifest. Raises BundleError."""
    try:
        manifest = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where} is not a manifest: {error}; export the bundle again, or copy it again") from error
    for field, expected in (("format_version", FORMAT_VERSION), ("rng_version", RNG_VERSION)):
        got = getattr(manifest, field)
        if got != expected:
            raise BundleError(f"{where} has {field} {got}, this hosl reads {expected}: export the bundle again")
    _check_numbers(manifest, where)

    for entry in manifest.trainable:
        if entry.exponent is None:
            raise BundleError(f"{where}: trainable tensor {entry.name} has no lattice exponent")
        if not lattice.MIN_EXPONENT <= entry.exponent <= lattice.MAX_EXPONENT:
            limits = f"expected {lattice.MIN_EXPONENT} to {lattice.MAX_EXPONENT}"
            raise BundleError(f"{where}: lattice exponent of {entry.name} is {entry.exponent}, {limits}")
        if entry.constant:
            raise BundleError(f"{where}: {entry.name} trains and is a constant of the graph")

    if manifest.image is not None:
        _check_image(manifest.image, manifest.max_length, where)
    _check_prompt(manifest, where)
    if manifest.prefix is not None:
        _check_prefix(manifest, manifest.prefix, where)
    _check_gradients(manifest, where)

    for what, names in (("tensor", [t.name for t in manifest.tensors]), ("file", [f.path for f in manifest.files])):
        repeated = next((name for name, times in Counter(names).items() if times > 1), None)
        if repeated is not None:
            raise BundleError(f"{where} lists {what} {repeated} twice")
    # A device writes the files where the manifest says: nothing may lead it out of its cache.
    for file in manifest.files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts or "\0" in file.path:
            raise BundleError(f"{where} names a file outside the bundle: {file.path!r}")
    return manifest


def _check_numbers(manifest: Manifest, where: str) -> None:
    """Raise BundleError for a number below what it can be, or so large that sums of it overflow."""
    limits = {"width": (1, MAX_WIDTH), "max_length": (1, MAX_LENGTH), "pad_token_id": (0, 2**31 - 1)}
    limits |= {"blocks": (1, 2**16), "split": (0, manifest.blocks), "prompt_tokens": (0, manifest.max_length)}
    for field, (least, most) in limits.items():
        if not least <= (value := getattr(manifest, field)) <= most:
            raise BundleError(f"{where}: {field} is {value}, expected {least} to {most}")

    for entry in manifest.tensors:
        if min(entry.shape, default=1) < 1 or math.prod(entry.shape) > MAX_ELEMENTS:
            limit = f"expected dimensions from 1 on, and at most {MAX_ELEMENTS} elements"
            raise BundleError(f"{where}: tensor {entry.name} has shape {list(entry.shape)[:8]}, {limit}")
    for file in manifest.files:
        if not 0 <= file.size_bytes < 2**63:
            raise BundleError(f"{where}: file {file.path} has {file.size_bytes} bytes, expected 0 to 2^63 - 1")


def _check_image(image: ImageEntry, positions: int, where: str) -> None:
    numbers = (image.rescale, *image.mean, *image.std)
    fits = (
        1 <= image.channels <= 4
        and 1 <= min(image.height, image.width) <= max(image.height, image.width) <= 2**15
        and len(image.mean) == len(image.std) == image.channels
        and all(math.isfinite(number) for number in numbers)
        and min(image.std) > 0.0
        and (image.grid is None or math.prod(image.grid) == positions)
    )
    if not fits:
        raise BundleError(f"{where}: the image entry contradicts itself: {image}")


def _check_prompt(manifest: Manifest, where: str) -> None:
    tokens, trained = manifest.prompt_tokens, [entry.shape[:1] for entry in manifest.trainable]
    if manifest.train == "prompt":
        fits = trained == [(tokens,)] and 1 <= tokens <= manifest.max_length - SHORTEST_TEXT and manifest.image is None
    else:
        fits = tokens == 0
    if not fits:
        raise BundleError(f"{where}: prompt_tokens {tokens} contradicts the rest")


def _check_prefix(manifest: Manifest, prefix: PrefixEntry, where: str) -> None:
    counts_positions = manifest.image is not None
    fits = (
        1 <= prefix.blocks < manifest.split
        and 1 <= prefix.width < 2**31
        and (prefix.positions > 0) == counts_positions
        and prefix.positions < 2**31
        and any(entry.path == SHARD_PREFIX for entry in manifest.files)
    )
    if not fits:
        raise BundleError(f"{where}: the prefix entry contradicts the rest: {prefix}")


def _check_gradients(manifest: Manifest, where: str) -> None:
    """Raise BundleError where the graphs of gradients do not fit the files, the tensors or each other."""
    first = -1 if manifest.prefix is None else manifest.prefix.blocks
    blocks = [entry.block for entry in manifest.gradients]
    # The gradient goes through every block between what trains and the cut.
    if blocks and blocks != list(range(max(first, blocks[0]), manifest.split)):
        limits = f"expected all from one, {first} or later, to {manifest.split - 1}"
        raise BundleError(f"{where}: the gradients are of the blocks {blocks[:8]}, {limits}")

    files, tensors = {entry.path for entry in manifest.shard_files}, {entry.name for entry in manifest.tensors}
    trainable, named = {entry.name for entry in manifest.trainable}, Counter[str]()
    for entry in manifest.gradients:
        what = f"{where}: the gradient of block {entry.block}"
        if entry.graph not in files:
            raise BundleError(f"{what} has the graph {entry.graph!r}, which is none of the shard's files")
        for bound, known, kind in ((entry.parameters, tensors, "a tensor"), (entry.gradients, trainable, "trainable")):
            unknown = next((name for name in bound.values() if name not in known), None)
            if unknown is not None:
                raise BundleError(f"{what} names {unknown!r}, which is not {kind} of the shard")
        if reserved := RESERVED.intersection([*entry.parameters, *entry.gradients]):
            raise BundleError(f"{what} calls a weight or its gradient {min(reserved)!r}, which is another's name")
        named.update(entry.gradients.values())
    repeated = next((name for name, times in named.items() if times > 1), None)
    if repeated is not None:
        raise BundleError(f"{where}: the gradient of {repeated} has two places")


def load_manifest(bundle: Path) -> Manifest:
    """Read `bundle`/manifest.json. Raises BundleError."""
    path = bundle / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"no bundle at {bundle}: {error.strerror or error} ({MANIFEST})") from error
    return decode_manifest(data, str(path))


def check_files(bundle: Path, manifest: Manifest) -> None:
    """Read every file of a bundle and compare digests. Raises BundleError for the first that differs."""
    for entry in manifest.files:
        path, remedy = bundle / entry.path, "export the bundle again, or copy it again"
        try:
            size = path.stat().st_size
            digest = sha256_of_file(path)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror or error}; {remedy}") from error

        if digest != entry.sha256:
            what = f"has {size} bytes" if size != entry.size_bytes else f"has digest {digest}"
            expected = entry.size_bytes if size != entry.size_bytes else entry.sha256
            raise BundleError(f"{path} is damaged: it {what}, the manifest says {expected}; {remedy}")


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
