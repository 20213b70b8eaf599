"""Write the files of a bundle into a folder that becomes the bundle when it is complete and checked (`staging`).

The manifest is the last file: it says the size and digest of all others.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hosl_export.bundle.graph import write_graph
from hosl_export.bundle.staging import nearest_folder
from hosl_export.exceptions import SpaceError
from hosl_export.model.halves import ClientHalf, Tail, base_prefix, split_prefix
from hosl_export.model.trainable import plain_tensors
from hosl_export.tensor_files import write_tensors
from hosl_protocol.run.chat import TextForm, encode_form
from hosl_protocol.run.manifest import (
    MANIFEST,
    SHARD_CHAT,
    SHARD_GRAPH,
    SHARD_PREFIX,
    SHARD_TOKENIZER,
    SHARD_WEIGHTS,
    TAIL_CONFIG,
    TAIL_WEIGHTS,
    FileEntry,
    Manifest,
    PrefixEntry,
    TensorEntry,
    describe_file,
    encode_manifest,
)

SPARE_BYTES = 32 * 2**20
"""Room for the graph, the tokenizer and the manifest beside the weights."""

TOOLS = ("hosl", "torch", "transformers", "peft", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def check_space(out: Path, weight_bytes: int) -> None:
    """Raise SpaceError where the disk cannot hold weights of this size."""
    folder = nearest_folder(out)
    needed, free = weight_bytes + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise SpaceError(str(folder), needed, free)


def write_shard_graphs(
    bundle: Path,
    client: ClientHalf,
    tensors: Sequence[TensorEntry],
    prefix: PrefixEntry | None = None,
    grid: tuple[int, int] | None = None,
    shown: Sequence[int] = (),
) -> None:
    """Write `shard/shard.onnx`, and `shard/prefix.onnx` where there is one, without weights but for constants.

    `grid` is the shape of the activations between them where they are a feature map; `shown` are the blocks whose
    inputs are outputs, too.
    """
    (bundle / SHARD_GRAPH).parent.mkdir(exist_ok=True)
    constants = {entry.name for entry in tensors if entry.constant}

    if prefix is not None:
        first, client = split_prefix(client, prefix.blocks, grid)
        write_graph(first, bundle / SHARD_PREFIX, constants)
    write_graph(client, bundle / SHARD_GRAPH, constants, prefix, shown)


def write_weights(bundle: Path, client: ClientHalf, tail: Tail) -> None:
    """Write both halves' weights, under the names that they have without a task head.

    Tied embeddings are written twice: from here on the halves are untied.
    """
    for name in (SHARD_WEIGHTS, TAIL_WEIGHTS):
        (bundle / name).parent.mkdir(exist_ok=True)

    write_tensors(bundle / SHARD_WEIGHTS, plain_tensors(client))
    prefix = base_prefix(tail.model, tail.family)
    state = {name.removeprefix(prefix): tensor for name, tensor in tail.model.state_dict().items()}
    write_tensors(bundle / TAIL_WEIGHTS, state)


def write_texts(bundle: Path, model: Any, tokenizer: Any, pad_token_id: int, form: TextForm) -> None:
    """Write the device's tokenizer and `form`, and the uncut model's config and tokenizer beside the tail."""
    # Padding and truncation stored in the file would change every text's tokens; hosl pads and cuts by itself.
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_padding()
    plain.no_truncation()
    plain.save(str(bundle / SHARD_TOKENIZER))
    (bundle / SHARD_CHAT).write_bytes(encode_form(form))

    padding = tokenizer.added_tokens_decoder.get(pad_token_id)
    if tokenizer.pad_token_id != pad_token_id and padding is not None and padding.special:
        # A merged model's batches are padded as its config says. A token that is not special yet stays as it is: texts
        # would be split at it.
        tokenizer.pad_token = padding.content
    tokenizer.save_pretrained((bundle / TAIL_CONFIG).parent)
    write_config(bundle, model)


def write_config(bundle: Path, model: Any) -> None:
    """Write the uncut model's config beside the tail, and how a language model generates."""
    config = bundle / TAIL_CONFIG
    model.config.to_json_file(config)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(config.with_name("generation_config.json"))


def describe_files(bundle: Path) -> tuple[FileEntry, ...]:
    """Describe every file of the bundle but the manifest, in the order of their paths."""
    paths = (path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    return tuple(describe_file(bundle, path) for path in sorted(paths) if path != MANIFEST)


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write `manifest.json`."""
    (bundle / MANIFEST).write_bytes(encode_manifest(manifest))


def tool_versions() -> dict[str, str]:
    """Versions of the tools that write the bundle, where they are installed."""
    versions = {}
    for tool in TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[tool] = importlib.metadata.version(tool)
    return versions
