"""The client half as an ONNX graph whose parameters, but for constants, are inputs under their Hugging Face names."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor

from hosl_export.exceptions import ExportError
from hosl_export.model.families import renumber
from hosl_export.model.halves import ClientHalf
from hosl_export.model.lora import plain_name
from hosl_protocol.run.manifest import BOUNDARY, PrefixEntry, input_output

OPSET = 18
IR_VERSION = 10
"""The newest that ONNX Runtime 1.19 reads, the oldest runtime that a device may have."""

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
OUTPUT = "activations"


def graph_inputs(half: ClientHalf) -> tuple[str, ...]:
    """Names of the graph's inputs that are not weights."""
    takes_images = half.family.takes_images
    given = BOUNDARY if not half.embeds else "pixel_values" if takes_images else "input_ids"
    needs_mask = half.family.is_encoder and not takes_images
    return (given, "attention_mask") if needs_mask else (given,)


def dynamic_axes(half: ClientHalf) -> dict[int, str]:
    """The axes of all such inputs that have no fixed size, and their names: the size of images is fixed."""
    return {0: "batch"} if half.family.takes_images else {0: "batch", 1: "token"}


def write_graph(
    half: ClientHalf,
    path: Path,
    constants: Collection[str] = (),
    prefix: PrefixEntry | None = None,
    shown: Sequence[int] = (),
) -> None:
    """Trace the half with dynamic batch and length, lift its parameters to inputs, and write `path`.

    Parameters whose plain names are among `constants` stay inside. `prefix` says what a half is given that goes on from
    a prefix. What the blocks `shown` are given are further outputs. Raises ExportError where the graph is none that a
    device can run.
    """
    # The fused attention would trace to a pass over all scores for rows that see nothing, and no row is such a row.
    half.model.set_attn_implementation("eager")

    model = _trace(half, prefix, shown)
    _lift_parameters(model, half, constants)
    if half.family.keeps_constants:
        # Only now, when what trains is an input that nothing can fold away.
        optimizer.optimize(model)
    save_graph(model, path)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph that a device can run, and nothing else about it. Raises ExportError where it is none."""
    _check_self_contained(model)
    # Without paths of this machine and other facts of the trace, which a device has no use for.
    for described in (model, model.graph, *model.graph):
        described.metadata_props.clear()
    model.ir_version = IR_VERSION
    ir.save(model, path)


def _trace(half: ClientHalf, prefix: PrefixEntry | None, shown: Sequence[int]) -> ir.Model:
    names = graph_inputs(half)
    axes = dict.fromkeys(dynamic_axes(half), torch.export.Dim.DYNAMIC)
    examples = make_examples(half, prefix)

    with quiet_exporter(), showing_inputs(half, shown):
        # optimize=True would fold transposed weights into constants, which cannot be lifted.
        program = torch.onnx.export(
            half,
            (),
            kwargs={name: examples[name] for name in names},
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=list(names),
            output_names=[OUTPUT, *map(input_output, shown)],
            dynamic_shapes=dict.fromkeys(names, axes),
            verbose=False,
        )
    if program is None:
        raise ExportError("the exporter of torch gave no graph")
    return program.model


@contextlib.contextmanager
def showing_inputs(half: ClientHalf, blocks: Sequence[int]) -> Iterator[None]:
    """Let the half's forward give what each of these of its blocks is given, after the activations."""
    if not blocks:
        yield
        return

    given: dict[int, Tensor] = {}

    def keep(block: int) -> Any:
        return lambda _, arguments: given.update({block: arguments[0]})

    modules = half.model.get_submodule(half.family.blocks)
    hooks = [modules[block - half.first_block].register_forward_pre_hook(keep(block)) for block in blocks]
    hooks.append(half.register_forward_hook(lambda _, __, h: (h, *(given[block] for block in blocks))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def make_examples(half: ClientHalf, prefix: PrefixEntry | None = None) -> dict[str, Tensor]:
    """Make an input of each name to trace the half with: 2 rows, since the exporter would take 1 for a constant."""
    # Room for the soft prompt and some text, within the model's positions.
    length = half.prompt_tokens + 8
    if half.prompt_tokens:
        length = min(length, half.model.config.max_position_embeddings)

    examples = {}
    for name in graph_inputs(half):
        if name == BOUNDARY:
            assert prefix is not None
            examples[name] = torch.ones(2, prefix.positions or 8, prefix.width)
        elif half.image is not None:
            examples[name] = torch.ones(2, half.image.channels, half.image.height, half.image.width)
        else:
            # A new tensor for each: given the same one twice, the exporter takes both inputs for one.
            examples[name] = torch.ones(2, length, dtype=torch.long)
    return examples


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hold back the exporter's chatter: it prints, warns and logs for every model, and says nothing a user can use."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)

    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _lift_parameters(model: ir.Model, half: ClientHalf, constants: Collection[str]) -> None:
    """Turn each parameter's initializer into a graph input under its plain name; buffers and constants stay inside."""
    graph = model.graph
    for name, parameter in half.model.named_parameters():
        plain = renumber(plain_name(name), half.family.blocks, half.first_block)
        if plain in constants:
            continue

        # The trace names what belongs to the half itself, whose module `model` is.
        value = graph.initializers.pop(f"model.{name}", None)
        if value is None:
            raise ExportError(f"the exporter of torch folded {name} away; it can be no graph input")

        value.const_value = None
        value.name = plain
        # A device may bind no more of the table than the rows of a batch's tokens.
        is_table = parameter is half.token_table
        value.shape = ir.Shape(["rows", *parameter.shape[1:]] if is_table else parameter.shape)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        graph.inputs.append(value)


def _check_self_contained(model: ir.Model) -> None:
    """Raise ExportError for operators that are not ONNX's own: a device's runtime need not have them."""
    foreign = {node.domain for node in model.graph.all_nodes()} - STANDARD_DOMAINS
    if foreign or len(model.functions):
        raise ExportError(f"the graph uses operators outside the standard domains: {sorted(foreign)}")
