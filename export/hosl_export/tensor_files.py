"""Tensors in safetensors files, without a second copy in memory: written one by one, read as memory maps.

Bundles are written so, and the cloud's checkpoints, whose tensors may come from other processes one at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

_ALIGNMENT = 8
"""Bytes: the header is filled up with spaces to a multiple, as the safetensors library does."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as float32 in the given order; `safetensors.torch.save_file` would hold all their bytes again."""
    stream_tensors(path, {name: tensor.shape for name, tensor in tensors.items()}, tensors.values())


def stream_tensors(path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[Tensor]) -> None:
    """Write tensors, given one by one in the order of `shapes`, as float32; only one is held at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * 4
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}

    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)

    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            file.write(tensor.detach().contiguous().numpy().astype("<f4", copy=False).data)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map all tensors of a file, privately: untouched pages cost nothing, and writing leaves the file as it is."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
