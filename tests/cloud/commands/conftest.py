"""A bundle that costs nothing, for commands that look at its files and no further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hosl_protocol.run.manifest import MANIFEST, Manifest, TensorEntry, describe_file, encode_manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small one of two files; what is in them is nobody's business here."""
    folder = tmp_path / "smollm"
    for path in ("shard/shard.onnx", "tail/config.json"):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_bytes(path.encode())
    files = tuple(describe_file(folder, path) for path in ("shard/shard.onnx", "tail/config.json"))
    shape: dict[str, Any] = {"split": 1, "blocks": 2, "width": 4, "max_length": 8, "pad_token_id": 0, "train": "none"}
    names = {"model": "tiny", "family": "llama", "architecture": "Tiny"}
    tensors = (TensorEntry(name="w", shape=(2, 4)),)
    (folder / MANIFEST).write_bytes(encode_manifest(Manifest(**names, **shape, tensors=tensors, files=files)))
    return folder
