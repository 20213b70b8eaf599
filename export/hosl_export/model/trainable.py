"""What the device trains, and putting it on the lattice before anything is computed or written.

On the lattice (protocol/README.md, "Lattice") each value is a multiple of a power of two, one for each tensor.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from hosl_export.model.family import Family
from hosl_export.model.halves import ClientHalf
from hosl_export.model.lora import is_lora, is_lora_b, plain_name, plain_state
from hosl_export.model.prompt import is_prompt
from hosl_protocol.arithmetic.lattice import exponent_for, round_to_lattice
from hosl_protocol.run.manifest import TensorEntry, TrainMode


def plain_parameters(half: ClientHalf) -> dict[str, nn.Parameter]:
    """Get the client half's parameters under plain names, in the order of the graph's inputs."""
    return {plain_name(name): parameter for name, parameter in half.model.named_parameters()}


def plain_tensors(half: ClientHalf) -> dict[str, Tensor]:
    """Get what the shard's file holds: the parameters and, where the graph keeps constants, the buffers after them."""
    parameters: dict[str, Tensor] = dict(plain_parameters(half))
    if not half.family.keeps_constants:
        return parameters
    # A merge reads the half's whole state from this file: in the graph, constants may be folded into one another.
    return parameters | {name: tensor for name, tensor in plain_state(half.model).items() if name not in parameters}


def uses_lora(mode: TrainMode) -> bool:
    """Whether `--train mode` puts adapters in."""
    return mode in ("lora", "lora-b")


def trained_blocks(split: int, count: int | None) -> range:
    """The blocks that `--train-blocks count` lets train, of the `split` on the device.

    Block -1 is the embeddings. A `count` below zero means the last blocks, of which those are none.
    """
    if count is None:
        return range(-1, split)
    return range(-1, count) if count > 0 else range(split + count, split)


def is_trainable(name: str, tensor: Tensor, mode: TrainMode, family: Family, blocks: range | None = None) -> bool:
    """Whether `--train mode` moves the parameter with this plain name, where only `blocks` train (None: all)."""
    block = block_of(name, family)
    if blocks is not None and block not in blocks:
        return False
    if mode == "lora":
        return is_lora(name)
    if mode == "lora-b":
        return is_lora_b(name)
    if mode == "prompt":
        return is_prompt(name)
    if mode == "norm":
        # Norms and biases are exactly what has one dimension.
        return tensor.ndim == 1
    if mode == "blocks":
        return block >= 0
    return mode == "all"


def block_of(name: str, family: Family) -> int:
    """The number of the block that a parameter is in; -1 for what comes before the first."""
    path = f"{family.blocks}."
    number, _, _ = name.removeprefix(path).partition(".")
    return int(number) if name.startswith(path) else -1


def put_on_lattice(
    half: ClientHalf, mode: TrainMode, blocks: range | None = None
) -> tuple[tuple[TensorEntry, ...], float]:
    """Round what trains to its lattice, in place. Returns the manifest's entries and the largest change of a weight.

    The tensors are the uncut model's own, so that its outputs after this call are those of the rounded weights.
    """
    entries, largest_change = [], 0.0
    for name, tensor in plain_tensors(half).items():
        exponent = None
        if isinstance(tensor, nn.Parameter) and is_trainable(name, tensor, mode, half.family, blocks):
            values = tensor.detach().numpy()
            exponent = exponent_for(float(np.abs(values).max()))
            rounded = round_to_lattice(values, exponent)
            largest_change = max(largest_change, float(np.abs(rounded - values).max()))
            values[...] = rounded  # through numpy's view into the model's own tensor

        entries.append(
            TensorEntry(
                name=name,
                shape=tuple(tensor.shape),
                trainable=exponent is not None,
                exponent=exponent,
                lookup=tensor is half.token_table,
                constant=half.family.keeps_constants and exponent is None,
            )
        )
    return tuple(entries), largest_change
