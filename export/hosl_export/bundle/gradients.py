"""Graphs of the exact gradient, one for each kind of block: from a block's input, the cotangent of its output and its
weights to the gradients of what trains in it and of its input (protocol/README.md, "Manifest").
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import optimizer
from torch import Tensor

from hosl_export.bundle.graph import (
    OPSET,
    dynamic_axes,
    graph_inputs,
    make_examples,
    quiet_exporter,
    save_graph,
    showing_inputs,
)
from hosl_export.exceptions import ExportError
from hosl_export.model.halves import ClientHalf, block_part
from hosl_export.model.lora import plain_name
from hosl_export.model.trainable import block_of
from hosl_export.model.vjp import Vjp, trace_vjp
from hosl_protocol.run.manifest import (
    COTANGENT,
    INPUT_GRADIENT,
    RESERVED,
    BlockGradient,
    PrefixEntry,
    TensorEntry,
)

_GRADIENT_OF = "gradient."
"""Before the name of a weight: the graph's output that is its gradient."""

_NAMES = ("layer_idx", "name_or_path")
"""Of a block and of a model, among the settings of modules: no trace depends on them."""


def gradient_blocks(client: ClientHalf, tensors: Sequence[TensorEntry]) -> range:
    """The blocks that the gradient goes through: from the first in which something trains to the last."""
    trained = [block_of(entry.name, client.family) for entry in tensors if entry.trainable]
    last = len(client.model.get_submodule(client.family.blocks))
    return range(min(trained, default=last), last)


def shown_blocks(client: ClientHalf, tensors: Sequence[TensorEntry], prefix: PrefixEntry | None) -> list[int]:
    """Those whose inputs `shard.onnx` computes: it is given that of block -1, and that of the first after a prefix."""
    given = -1 if prefix is None else prefix.blocks
    return [block for block in gradient_blocks(client, tensors) if block != given]


def write_gradients(
    bundle: Path, client: ClientHalf, tensors: Sequence[TensorEntry], prefix: PrefixEntry | None = None
) -> tuple[BlockGradient, ...]:
    """Write `shard/gradient-0.onnx` and so on, as few as blocks differ. Returns the manifest's entries."""
    blocks = gradient_blocks(client, tensors)
    trainable = {entry.name for entry in tensors if entry.trainable}
    examples = _run_examples(client, blocks)
    graphs: dict[tuple[str, ...], str] = {}
    entries = []

    with tempfile.TemporaryDirectory() as traced:
        for block in blocks:
            given = examples[block]
            # A prefix gives a feature map as positions, as whatever leaves the device does.
            is_packed = prefix is not None and block == prefix.blocks and given.ndim == 4
            grid = (given.shape[2], given.shape[3]) if is_packed else None
            part = block_part(client, block, grid, packs=block == blocks[-1] or given.ndim == 3)
            part.model.set_attn_implementation("eager")

            kind = describe_part(part)
            whole = Path(traced, hashlib.sha256(kind.encode()).hexdigest())
            if not whole.exists():
                write_whole_gradient(part, whole, given.flatten(2).transpose(1, 2).contiguous() if is_packed else given)

            wanted = [_GRADIENT_OF + name for name in _weights(part) if _full_name(part, name) in trainable]
            wanted += [INPUT_GRADIENT] if block != blocks[0] else []
            path = graphs.setdefault((kind, *wanted), f"shard/gradient-{len(graphs)}.onnx")
            if not (bundle / path).exists():
                _write_wanted(part, whole, bundle / path, wanted)
            entries.append(_describe_graph(part, bundle, path))
    return tuple(entries)


@torch.no_grad()
def _run_examples(client: ClientHalf, blocks: range) -> dict[int, Tensor]:
    """What each block is given, of the inputs that the client half is traced with."""
    examples = make_examples(client)
    shown = [block for block in blocks if block >= 0]
    with showing_inputs(client, shown):
        _, *given = client(**examples)
    return {-1: examples[graph_inputs(client)[0]], **dict(zip(shown, given, strict=True))}


def _weights(part: ClientHalf) -> dict[str, Tensor]:
    """What a device has of the part, by its name in the graph: within a block, plain and without the block's path."""
    state: dict[str, Tensor] = dict(part.model.named_parameters())
    if part.family.keeps_constants:
        state |= {name: buffer for name, buffer in part.model.named_buffers() if buffer.is_floating_point()}
    return {_graph_name(part, name): tensor for name, tensor in state.items()}


def _graph_name(part: ClientHalf, name: str) -> str:
    return plain_name(name).removeprefix("" if part.embeds else f"{part.family.blocks}.0.")


def _full_name(part: ClientHalf, name: str) -> str:
    """The manifest's name of a weight of the part."""
    return name if part.embeds else f"{part.family.blocks}.{part.first_block}.{name}"


def describe_part(part: ClientHalf) -> str:
    """Describe everything that the trace of a part depends on: parts of one description share it.

    Weights count by their shapes, settings of modules whatever their names, but for the block's number and the model's
    path.
    """
    weights = {id(tensor) for tensor in _weights(part).values()}
    facts: list[Any] = [
        *(repr(part.model), getattr(part.model.config, "layer_types", None), part.embeds, part.grid, part.packs),
        [(name, tuple(tensor.shape)) for name, tensor in _weights(part).items()],
        [(name, buffer.tolist()) for name, buffer in part.model.named_buffers() if id(buffer) not in weights],
    ]
    for path, module in part.model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, str | int | float | tuple)}
        facts.append((path, sorted((key, repr(value)) for key, value in plain.items() if key not in _NAMES)))
    return repr(facts)


def write_whole_gradient(part: ClientHalf, path: Path, given: Tensor) -> None:
    """Trace the gradient of a part by what it is given and by all its weights, and write `path`.

    `given` is an example of that. Whatever trains, a graph of it is a piece of this one: a trace takes seconds, and
    taking a piece out does not. Raises ExportError where the graph is none that a device can run.
    """
    name, *others = graph_inputs(part)
    examples = {name: given, **{other: torch.ones(given.shape[:2], dtype=torch.long) for other in others}}
    axes = dict.fromkeys(dynamic_axes(part), torch.export.Dim.DYNAMIC)
    modules = {_graph_name(part, name): f"model.{name}" for name in part.model.state_dict()}
    weights = [modules[weight] for weight in _weights(part)]
    parameters = {f"model.{name}" for name, _ in part.model.named_parameters()}
    wanted = [*([] if part.embeds else [name]), *(weight for weight in weights if weight in parameters)]

    with quiet_exporter():
        vjp = trace_vjp(part, examples, axes, weights, wanted)
        program = torch.onnx.export(vjp.program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    if program is None:
        raise ExportError("the exporter of torch gave no graph")

    _name_values(program.model.graph, vjp, {module: weight for weight, module in modules.items()})
    optimizer.optimize(program.model)
    save_graph(program.model, path)


def _name_values(graph: ir.Graph, vjp: Vjp, weights: dict[str, str]) -> None:
    """Give inputs and outputs the manifest's names, and constants their values."""
    for value, name in zip(list(graph.inputs), (COTANGENT, *vjp.inputs), strict=True):
        value.name = weights.get(name, name)
        if name in vjp.constants:
            graph.inputs.remove(value)
            value.const_value = ir.tensor(vjp.constants[name].detach().numpy(), name=value.name)
            graph.register_initializer(value)
    for value, name in zip(graph.outputs, vjp.gradients, strict=True):
        value.name = _GRADIENT_OF + weights[name] if name in weights else INPUT_GRADIENT


def _write_wanted(part: ClientHalf, whole: Path, path: Path, wanted: Sequence[str]) -> None:
    """Write the piece of a graph that gives the `wanted` outputs; those that it does not have are zero."""
    model = ir.load(whole)
    graph = model.graph
    for value in [value for value in graph.outputs if value.name not in wanted]:
        graph.outputs.remove(value)
    RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)

    # The names of sizes say what they are of, and those within follow from them.
    axes = dynamic_axes(part)
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([size if isinstance(size, int) else axes[axis] for axis, size in enumerate(value.shape)])
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None

    # A device may bind no more of a table than the rows of a batch's tokens, unless its gradient has a place for all.
    table = part.token_table
    for value in graph.inputs:
        name = str(value.name)
        if table is not None and _weights(part).get(name) is table and _GRADIENT_OF + name not in wanted:
            value.shape = ir.Shape(["rows", *table.shape[1:]])
    save_graph(model, path)


def _describe_graph(part: ClientHalf, bundle: Path, path: str) -> BlockGradient:
    """The manifest's entry of a part that computes with this graph, whose names say what it reads and gives."""
    graph = ir.load(bundle / path).graph
    inputs = [str(value.name) for value in graph.inputs if value.name not in RESERVED]
    outputs = [str(value.name) for value in graph.outputs if value.name not in RESERVED]
    return BlockGradient(
        block=part.first_block if not part.embeds else -1,
        graph=path,
        parameters={name: _full_name(part, name) for name in inputs},
        gradients={name: _full_name(part, name.removeprefix(_GRADIENT_OF)) for name in outputs},
    )
