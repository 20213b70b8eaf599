"""The vector-Jacobian product of a part of a model, as a flat graph of torch: its gradient, from that of its output.

The part's forward is traced by torch.export, which copes with the branches in the masks of transformers; then that
graph is differentiated while it is traced again, with the same symbols for batch and length, down to operators that
torch's exporter to ONNX has functions for. Weights are arguments, so that equal parts share a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Vjp:
    """A traced vector-Jacobian product."""

    program: ExportedProgram
    """What the exporter to ONNX takes: the cotangent first, then `inputs`, gives the gradients."""
    inputs: tuple[str, ...]
    """Those of what the part is given and of its weights that it reads, then the names of `constants`."""
    constants: dict[str, Tensor]
    """What else it reads: tables and masks of its own."""
    gradients: tuple[str, ...]
    """The inputs whose gradients it gives, in order; what the part does not read has gradient zero."""


def trace_vjp(
    part: nn.Module,
    given: dict[str, Tensor],
    axes: dict[int, Any],
    weights: Collection[str],
    wanted: Sequence[str],
) -> Vjp:
    """Trace the gradient of ⟨cotangent, part(given)⟩ by those of `given` and of `weights` that are `wanted`.

    `axes` are the dynamic ones of everything given; `weights` names parameters and buffers of the part.
    """
    with torch.no_grad():
        shapes = dict.fromkeys(given, axes)
        forward = torch.export.export(part, (), kwargs=given, dynamic_shapes=shapes, strict=False)
    _write_nothing_in_place(forward.graph_module)

    places = [spec.target or spec.arg.name for spec in forward.graph_signature.input_specs]
    nodes = [node for node in forward.graph.nodes if node.op == "placeholder"]
    # What the part does not read is no input: a graph has no place for it.
    read = {name: node.meta["val"] for name, node in zip(places, nodes, strict=True) if node.users}
    own = [name for name in read if name not in given and name not in weights]
    inputs = [name for name in read if name not in own] + own
    gradients = tuple(name for name in wanted if name in read)
    (output,) = forward.graph.output_node().args[0]
    output = output.meta["val"]

    def vjp(cotangent: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        leaves = {name: value.detach() for name, value in zip(inputs, values, strict=True)}
        by = [leaves[name].requires_grad_() for name in gradients]
        with torch.enable_grad():
            (out,) = Interpreter(forward.graph_module).run(*(leaves.get(name) for name in places))
        return torch.autograd.grad(out, by, cotangent, materialize_grads=True)

    # The symbols of the first trace: in a new one, equal sizes would become one symbol, a width and a length too.
    with output.fake_mode:
        flat = make_fx(vjp, decomposition_table=_decompositions())(output, *(read[name] for name in inputs))
    constants = {name: forward.state_dict.get(name, forward.constants.get(name)) for name in own}
    return Vjp(_as_program(flat, forward), tuple(inputs), constants, gradients)


def _write_nothing_in_place(forward: GraphModule) -> None:
    """Let operators that write into their first argument, as a ResNet's sum does, give a new tensor."""
    nodes = list(forward.graph.nodes)
    for place, node in enumerate(nodes):
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            name, _, overload = node.target.__name__.partition(".")
            later = set(nodes[place + 1 :])
            node.args[0].replace_all_uses_with(node, delete_user_cb=later.__contains__)
            node.target = getattr(getattr(aten, name.removesuffix("_")), overload)
    forward.recompile()


class _Decomposed(ExportedProgram):
    """A program that is decomposed already: to do it again would take most of an export's time."""

    def run_decompositions(self, *arguments: Any, **keywords: Any) -> ExportedProgram:
        return self


def _as_program(flat: GraphModule, forward: ExportedProgram) -> ExportedProgram:
    """Wrap a flat graph as the program that torch's exporter to ONNX takes."""
    flat.graph.eliminate_dead_code()
    flat.recompile()
    placeholders = [node for node in flat.graph.nodes if node.op == "placeholder"]
    outputs: Any = flat.graph.output_node().args[0]
    return _Decomposed(
        root=flat,
        graph=flat.graph,
        graph_signature=ExportGraphSignature(
            [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in placeholders],
            [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs],
        ),
        state_dict={},
        range_constraints={},
        module_call_graph=forward.module_call_graph,
    )


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's decompositions, and ours of operators that its exporter to ONNX has no function for."""
    # Every family's backward is one of these tables away: a new operator without a function is a new entry here.
    return {**torch._decomp.core_aten_decompositions(), **_OURS}


def _zeros_permuted(size: Sequence[int], order: Sequence[int], **keywords: Any) -> Tensor:
    """For `empty_permuted`, with which torch begins what it then writes all over: no layout, and no garbage."""
    return torch.zeros(size, dtype=keywords.get("dtype"))


def _squeeze_dims(x: Tensor, dims: Sequence[int]) -> Tensor:
    places = [dim % x.ndim for dim in dims]
    return x.reshape([size for place, size in enumerate(x.shape) if place not in places or size != 1])


def _convolution_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution of x [B, C, H, W] by x, weight and bias, as convolutions again."""
    if transposed or groups != 1:
        raise NotImplementedError("the gradient of a transposed or grouped convolution")
    kernel, by_x, by_weight, by_bias = weight.shape[2:], None, None, None
    if mask[0]:
        # What the strides passed over at the end of x gets no gradient, but has its place.
        rest = [
            size - ((out - 1) * step - 2 * pad + gap * (taps - 1) + 1)
            for size, out, step, pad, gap, taps in zip(
                x.shape[2:], g.shape[2:], stride, padding, dilation, kernel, strict=True
            )
        ]
        by_x = aten.convolution.default(g, weight, None, stride, padding, dilation, True, rest, 1)
    if mask[1]:
        # Summed over the batch as over channels, each tap of the kernel is where g meets x, in steps of its dilation.
        taps = aten.convolution.default(
            x.transpose(0, 1), g.transpose(0, 1), None, dilation, padding, stride, False, [0] * len(kernel), 1
        )
        by_weight = taps[:, :, : kernel[0], : kernel[1]].transpose(0, 1)
    if mask[2]:
        by_bias = g.sum((0, *range(2, g.ndim)))
    return by_x, by_weight, by_bias


def _max_pool_backward(
    g: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Give each window's gradient to its largest place; windows that overlap may share one."""
    flat = torch.zeros((*x.shape[:2], math.prod(x.shape[2:])), dtype=x.dtype)
    return flat.scatter_add(2, indices.flatten(2), g.flatten(2)).view(x.shape)


_OURS: dict[Any, Callable[..., Any]] = {
    aten.empty_permuted.default: _zeros_permuted,
    aten.squeeze.dims: _squeeze_dims,
    aten.convolution_backward.default: _convolution_backward,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
}
