"""Weights in safetensors files, without a second copy in memory: written tensor by tensor, read as memory maps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

_ALIGNMENT = 8


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as float32 in the given order; `safetensors.torch.save_file` would hold all their bytes again."""
    stream_tensors(path, {name: tensor.shape for name, tensor in tensors.items()}, tensors.values())


def stream_tensors(path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[Tensor]) -> None:
    """Write tensors of these names and shapes as float32; one is held at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * 4
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}

    text = json.dumps(header, separators=(",", ":")).encode()
    # Readers map the file: float32 must begin at a multiple of its size.
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            file.write(tensor.detach().contiguous().numpy().astype("<f4", copy=False).data)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file's tensors as private memory maps: untouched pages cost nothing, writing leaves the file as it is."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
