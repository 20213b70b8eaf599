"""The device's data as token ids, kept on disk: a restart tokenizes nothing and loads no tokenizer."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hosl_edge.data.datasets import TextDataset
from hosl_protocol.run.settings import RunSettings

log = logging.getLogger(__name__)

FILE = "tokens.safetensors"

Splits: TypeAlias = dict[str, TextDataset]
"""`train`, and `eval` where there is held-out data."""


def tokens_key(shard_digest: str, data_digest: str, settings: RunSettings) -> str:
    """Digest what the token ids depend on: the tokenizer (part of the shard), the data files, task and length."""
    facts = [shard_digest, data_digest, settings.task, settings.max_length]
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()


def load_or_tokenize(folder: Path, key: str, pad_token_id: int, tokenize: Callable[[], Splits]) -> Splits:
    """Take the splits from `folder` where they were kept under the same key, else from `tokenize`, and keep them."""
    kept = _load(folder / FILE, key, pad_token_id)
    if kept is not None:
        return kept
    splits = tokenize()
    try:
        _save(folder / FILE, key, splits)
    except OSError as error:
        log.warning("the token ids are not kept, the next start makes them again: %s", error)
    return splits


def _load(path: Path, key: str, pad_token_id: int) -> Splits | None:
    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, TypeError) as error:
        log.warning("%s cannot be used (%s); tokenizing again", path, error)
        return None

    # The key says what they should be; a digest of their own, that the disk has kept them.
    digest = arrays.pop("digest", None)
    if digest is None or digest.tobytes() != _digest(arrays):
        log.warning("%s is damaged; tokenizing again", path)
        return None

    return {
        split: TextDataset(
            arrays[f"{split}/ids"],
            arrays[f"{split}/offsets"],
            arrays.get(f"{split}/labels"),
            pad_token_id,
            arrays.get(f"{split}/is_answer"),
        )
        for split in ("train", "eval")
        if f"{split}/ids" in arrays
    }


def _save(path: Path, key: str, splits: Splits) -> None:
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for split, dataset in splits.items():
        arrays[f"{split}/ids"], arrays[f"{split}/offsets"] = dataset.ids, dataset.offsets
        if dataset.labels is not None:
            arrays[f"{split}/labels"] = dataset.labels
        if dataset.is_answer is not None:
            arrays[f"{split}/is_answer"] = dataset.is_answer
    content = save({**arrays, "digest": np.frombuffer(_digest(arrays), np.uint8)}, {"key": key})
    new = path.with_suffix(".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # as private as the data
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    new.replace(path)


def _digest(arrays: dict[str, npt.NDArray[np.generic]]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data.cast("B") if arrays[name].size else b"")
    return digest.digest()
