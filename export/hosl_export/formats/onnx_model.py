"""A whole model as a graph for ONNX Runtime, compared with the folder that it was made from.

The graph reads whole texts or images and keeps nothing between two calls: keys and values of earlier tokens, which
generation is fast with, are for other programs.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from hosl_export.bundle.graph import IR_VERSION, OPSET, quiet_exporter
from hosl_export.bundle.parity import TOLERANCE
from hosl_export.exceptions import ExportError, as_trace_error
from hosl_export.model.families import find_family
from hosl_export.sources.loading import quiet_transformers

GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
OUTPUT = "logits"

_LEAST = 1024
"""Bytes of a tensor that goes to the file of weights: ONNX Runtime wants shapes and axes in the graph."""
_LEFT_OUT = ("model.safetensors", "README.md")
"""Of the folder: what the graph has itself, and the card, which tells of transformers."""


@dataclass(frozen=True)
class OnnxFacts:
    """What was written."""

    inputs: tuple[str, ...]
    size_bytes: int
    largest_error: float
    """Of a logit, as a share of the largest."""


class _Logits(nn.Module):
    """The model as a function from named tensors to its logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        if pixel_values is not None:
            found: Tensor = self.model(pixel_values=pixel_values).logits
        else:
            more = {} if find_family(self.model.config.model_type).is_encoder else {"use_cache": False}
            found = self.model(input_ids=input_ids, attention_mask=attention_mask, **more).logits
        return found


def write_onnx(source: Path, folder: Path, loader: Any) -> OnnxFacts:
    """Fill `folder` with model.onnx, its weights and what makes its inputs. `loader` is transformers' class for it.

    Raises TraceError where torch cannot trace the model, and ExportError where the graph computes something else.
    """
    with quiet_transformers():
        model = loader.from_pretrained(source, dtype=torch.float32).eval()
    model.set_attn_implementation("eager")
    kind = model.config.model_type
    with as_trace_error(kind, "tracing the whole model"):
        _trace(model, folder / GRAPH)
    for path in source.iterdir():
        if path.is_file() and path.name not in _LEFT_OUT:
            shutil.copyfile(path, folder / path.name)
    with as_trace_error(kind, "running the graph"):
        largest = _compare(model, folder / GRAPH)
    if not largest <= TOLERANCE:
        raise ExportError(
            f"the graph departs from the folder by {largest:.3g} of the largest logit, the limit is {TOLERANCE:.3g}; "
            "nothing was written"
        )
    size = sum(path.stat().st_size for path in (folder / GRAPH, folder / WEIGHTS) if path.exists())
    return OnnxFacts(tuple(_batch(model, 2, 8)), size, largest)


def _batch(model: Any, rows: int, length: int) -> dict[str, Tensor]:
    """Make a batch of random inputs, all but the first text padded on the right."""
    generator = torch.Generator().manual_seed(length)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 32)
        return {"pixel_values": torch.randn(rows, config.num_channels, size, size, generator=generator)}
    lengths = torch.tensor([max(1, length - 2 * row) for row in range(rows)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(0, config.vocab_size - 1, (rows, length), generator=generator)
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    # A classifier finds the last token by the padding after it, which is nowhere else.
    ids = torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)
    return {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}


def _trace(model: Any, path: Path) -> None:
    examples = _batch(model, 2, 8)
    takes_images = "pixel_values" in examples
    dynamic = torch.export.Dim.DYNAMIC
    axes = {0: dynamic} if takes_images else {0: dynamic, 1: dynamic}
    with quiet_exporter():
        program = torch.onnx.export(
            _Logits(model),
            (),
            kwargs=examples,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(examples),
            output_names=[OUTPUT],
            dynamic_shapes=dict.fromkeys(examples, axes),
            verbose=False,
        )
    assert program is not None
    graph = program.model
    # Without paths of this machine.
    for described in (graph, graph.graph, *graph.graph):
        described.metadata_props.clear()
    graph.ir_version = IR_VERSION
    # A file of ONNX holds no more than 2 GB; the weights are beside it.
    ir.save(graph, path, external_data=WEIGHTS, size_threshold_bytes=_LEAST)


def _compare(model: Any, path: Path) -> float:
    """Run both on batches of other sizes than the traced one. The largest difference, as a share of all logits."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    largest = 0.0
    for rows, length in ((1, 5), (3, 13)):
        batch = _batch(model, rows, length)
        with torch.no_grad():
            expected = model(**batch).logits
        (found,) = session.run([OUTPUT], {name: tensor.numpy() for name, tensor in batch.items()})
        error = (torch.from_numpy(found) - expected).abs()
        if expected.dim() == 3:  # what stands after a text's end has no meaning
            error = error[batch["attention_mask"].bool()]
        largest = max(largest, float(error.max() / expected.abs().max()))
    return largest


def show_onnx(folder: Path, facts: OnnxFacts) -> str:
    """A line for people."""
    return (
        f"{folder / GRAPH} is the model for ONNX Runtime, {facts.size_bytes / 1e6:.0f} MB with its weights: "
        f"{', '.join(facts.inputs)} in, {OUTPUT} out; it departs from the folder by at most "
        f"{facts.largest_error:.2g} of the largest logit"
    )
