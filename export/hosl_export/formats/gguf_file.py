"""A model folder as one .gguf file for llama.cpp and what builds on it, read back and compared with the folder.

Tensors are read, written and compared one by one: besides the file it takes no more memory than the largest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from safetensors import safe_open
from transformers import AutoConfig

from hosl_export.exceptions import ExportError, ModelError
from hosl_export.formats.architectures import (
    FIELD,
    Architecture,
    Array,
    add_facts,
    context_length,
    extra_tensors,
    find_architecture,
    tensor_form,
)
from hosl_export.formats.gguf_tokenizer import TokenizerFacts

GgufType = Literal["f16", "q8_0"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)

_Q8_BLOCK = 32
"""Numbers of a row that share a scale."""


@dataclass(frozen=True)
class GgufFacts:
    """What was written."""

    type: GgufType
    size_bytes: int
    context_length: int
    largest_error: float
    """Of a number, as a share of the largest number of its tensor."""
    window: int | None
    """The sliding window, where llama.cpp knows none for this model: the context ends there."""


def check_gguf(config: Any, tokenizer_folder: Path) -> tuple[Architecture, TokenizerFacts]:
    """Find out whether llama.cpp computes what this model does. Raises ModelError, before anything is written."""
    if any("SequenceClassification" in name or "ImageClassification" in name for name in config.architectures or ()):
        remedy = "llama.cpp has no class head; use the folder that merge --out writes, or --onnx"
        raise ModelError(FIELD, config.architectures[0], remedy)
    return find_architecture(config), TokenizerFacts(tokenizer_folder)


def write_gguf(folder: Path, path: Path, kind: GgufType, name: str) -> GgufFacts:
    """Write `path` from a folder with config.json, model.safetensors and tokenizer.json, and read it back.

    Matrices become `kind`, all else stays float32. `name` is the model's, for people. Raises ModelError for a model
    that llama.cpp does not compute, and ExportError where a number does not fit its type.
    """
    config = AutoConfig.from_pretrained(folder)
    architecture, tokenizer = check_gguf(config, folder)
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        tensors = _Tensors(file, config, architecture, kind)
        _write(path, tensors, tokenizer, name)
        largest = _compare(path, tensors)
    length, positions = context_length(config, architecture), config.max_position_embeddings
    return GgufFacts(
        type=kind,
        size_bytes=path.stat().st_size,
        context_length=length,
        largest_error=largest,
        window=length if length < positions else None,
    )


class _Tensors:
    """The folder's tensors under llama.cpp's names, in its form."""

    def __init__(self, file: Any, config: Any, architecture: Architecture, kind: GgufType) -> None:
        import gguf

        self.config, self.architecture, self.kind, self._file = config, architecture, kind, file
        self._extra = extra_tensors(config)
        number = next(key for key, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture.name)
        names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        self._sources = {_renamed(names, source): source for source in file.keys()}  # noqa: SIM118 (no mapping)

    def names(self) -> list[str]:
        """All tensors of the file, in its order."""
        return [*self._sources, *self._extra]

    def values(self, name: str) -> Array:
        """A tensor, float32."""
        if name in self._extra:
            return self._extra[name]
        source = self._sources[name]
        values = np.asarray(self._file.get_tensor(source), dtype=np.float32)
        return np.ascontiguousarray(tensor_form(source, self.config, self.architecture)(values))

    def type_of(self, name: str, shape: tuple[int, ...]) -> Any:
        """In which type a tensor is written: llama.cpp wants vectors, norms and positions as float32."""
        from gguf import GGMLQuantizationType

        if len(shape) < 2 or name.startswith("position_embd."):
            return GGMLQuantizationType.F32
        if self.kind == "q8_0" and shape[-1] % _Q8_BLOCK == 0:
            return GGMLQuantizationType.Q8_0
        return GGMLQuantizationType.F16


def _renamed(names: Any, source: str) -> str:
    name = names.get_name(source, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ModelError(FIELD, source, "llama.cpp has no such tensor in this architecture; use --out or --onnx")
    return str(name)


def _packed(values: Array, type_: Any) -> Any:
    from gguf import quants

    with np.errstate(over="ignore"):  # what overflows is told by _compare
        return quants.quantize(values, type_)


def _write(path: Path, tensors: _Tensors, tokenizer: TokenizerFacts, name: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, tensors.architecture.name)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{tensors.kind.upper()}"))
        add_facts(writer, tensors.config, tensors.architecture)
        tokenizer.add(writer, tensors.config.vocab_size)
        for each, shape in _shapes(tensors):
            type_ = tensors.type_of(each, shape)
            rows, row_bytes = int(np.prod(shape[:-1])), _row_bytes(shape[-1], type_)
            writer.add_tensor_info(each, shape, np.dtype(np.float32), rows * row_bytes, raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in tensors.names():
            values = tensors.values(each)
            writer.write_tensor_data(_packed(values, tensors.type_of(each, values.shape)))
    finally:
        writer.close()


def _shapes(tensors: _Tensors) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in tensors.names():
        yield name, tensors.values(name).shape


def _row_bytes(width: int, type_: Any) -> int:
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    return int(width // block * block_bytes)


def _compare(path: Path, tensors: _Tensors) -> float:
    """Read the file back: every tensor must be the folder's, rounded to its type. The largest error, as a share."""
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if missing := set(tensors.names()) ^ found.keys():
        raise ExportError(f"{path.name}: it has not the tensors that were written: {', '.join(sorted(missing))}")
    largest = 0.0
    for name, tensor in found.items():
        values = tensors.values(name)
        error, allowed = (
            np.abs(gguf.quants.dequantize(tensor.data, tensor.tensor_type) - values),
            _allowed(values, tensor),
        )
        if not (error <= allowed).all():  # also where a number is not finite
            remedy = "a number is too large for float16: use --type q8_0" if tensors.kind == "f16" else "write it again"
            raise ExportError(f"{path.name}: {name} read back is not what the folder has: {remedy}")
        largest = max(largest, float(error.max(initial=0.0) / max(float(np.abs(values).max(initial=0.0)), 1e-30)))
    return largest


def _allowed(values: Array, tensor: Any) -> Any:
    """By how much each number may depart from the folder's: half a step of its type."""
    kind = tensor.tensor_type.name
    if kind == "F32":
        return np.zeros_like(values)
    if kind == "F16":
        return np.maximum(np.abs(values) * np.float32(2.0**-11), np.float32(2.0**-25))
    blocks = np.abs(values).reshape(-1, _Q8_BLOCK)
    # A step is a 127th of the block's largest number, rounded to float16 itself.
    step = blocks.max(axis=1, keepdims=True) / np.float32(127)
    return (
        (step * np.float32(0.5 + 127 * 2.0**-10) + np.float32(2.0**-17)).repeat(_Q8_BLOCK, axis=1).reshape(values.shape)
    )


def show_gguf(path: Path, facts: GgufFacts) -> list[str]:
    """Lines for people."""
    size = f"{facts.size_bytes / 1e6:.0f} MB" if facts.size_bytes >= 1e6 else f"{facts.size_bytes / 1e3:.0f} kB"
    lines = [
        f"{path} is the model for llama.cpp: {facts.type}, {size}, a context of {facts.context_length} tokens; "
        f"read back it departs by at most {facts.largest_error:.2g} of a tensor's largest number"
    ]
    if facts.window is not None:
        lines.append(
            f"llama.cpp has no sliding window for it, so the context ends with the window: {facts.window} tokens"
        )
    return lines
