"""Where a model may be cut, and what each cut costs the device: the answer to "which --split?".

It needs the configuration, and with images the preprocessor, but no weights: the model is built without memory.
Shapes: B batch, T tokens or positions of an image, D width of the activations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hosl_export.exceptions import as_trace_error
from hosl_export.inputs import count_positions
from hosl_export.model.families import find_family
from hosl_export.model.family import Family
from hosl_export.model.halves import client_half
from hosl_export.model.heads import auto_class, is_classifier
from hosl_export.sources.images import read_image_entry
from hosl_export.sources.loading import find_source, load_preprocessor, load_source_config, quiet_transformers
from hosl_protocol.run.manifest import ImageEntry

LENGTH = 128
"""Tokens of the text whose computation is counted."""


class Cut(msgspec.Struct, kw_only=True, frozen=True):
    """What the device has and does if the model is cut after block `split`."""

    split: int
    weights_bytes: int
    """Of its blocks, as float32, and of its embeddings but for the token table: what a forward reads."""
    table_bytes: int
    """Of the token table, which stays on the disk but for the rows of a batch's tokens; 0 for images."""
    forward_share: float
    """Its forward's floating-point operations, as a share of the whole model's."""
    positions: int
    """T of one example."""
    width: int
    """D."""

    @property
    def activation_bytes(self) -> int:
        """Of one example as float32; as many come back as the cut gradient."""
        return 4 * self.positions * self.width


class Inspection(msgspec.Struct, kw_only=True, frozen=True):
    """A model and its cuts."""

    model: str
    family: str
    blocks: int
    parameters: int
    forward_flops: int
    """Floating-point operations of a forward of one example."""
    lora_targets: tuple[str, ...]
    """What PEFT adapts by itself."""
    cuts: tuple[Cut, ...]


def inspect_model(
    model: str, revision: str | None = None, image_size: int | None = None, length: int | None = None
) -> Inspection:
    """Look at a model; `length` is that of a text in tokens. Raises ModelError, UnknownFamily and SettingsError."""
    source = find_source(model, revision)
    config = load_source_config(source)
    family = find_family(config.model_type)
    image = None
    if family.takes_images:
        image = read_image_entry(load_preprocessor(source), config, family, source.name, image_size)

    # A copy, because building a model may write into its config.
    with torch.device("meta"), quiet_transformers():
        whole = auto_class(family, is_classifier=is_classifier(config)).from_config(copy.deepcopy(config)).eval()
    tokens = 0 if family.takes_images else length or min(LENGTH, count_positions(config))
    with as_trace_error(config.model_type, "looking at the cuts"), quiet_transformers():
        if image is None:
            total = _text_flops(whole, tokens, family.count_blocks(config))
        else:
            total = _image_flops(whole, image)[0]
        cuts = tuple(_cuts(whole, family, image, tokens, total))
    return Inspection(
        model=source.name,
        family=config.model_type,
        blocks=family.count_blocks(config),
        parameters=sum(parameter.numel() for parameter in whole.parameters()),
        forward_flops=total,
        lora_targets=family.lora_targets,
        cuts=cuts,
    )


def _cuts(whole: Any, family: Family, image: ImageEntry | None, tokens: int, total: int) -> Iterator[Cut]:
    for split in range(1, family.count_blocks(whole.config)):
        half = client_half(whole, split, image)
        table = half.token_table
        in_table = 0 if table is None else table.numel()
        if image is None:
            flops, positions, width = _text_flops(half.model, tokens, split), tokens, whole.config.hidden_size
        else:
            flops, (_, positions, width) = _image_flops(half, image)
        yield Cut(
            split=split,
            weights_bytes=4 * (sum(parameter.numel() for parameter in half.parameters()) - in_table),
            table_bytes=4 * in_table,
            forward_share=flops / total,
            positions=positions,
            width=width,
        )


def _text_flops(model: Any, tokens: int, blocks: int) -> int:
    """Count what a text's forward multiplies and adds: each matrix once a token, and attention in each block."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    # A head that shares the table with the embeddings multiplies by it.
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    matrices = {id(weight): weight.numel() for weight in model.parameters() if weight.ndim > 1}
    numbers = sum(count for place, count in matrices.items() if place not in looked_up - multiplied)
    attended = 4 * tokens**2 * int(model.config.hidden_size) * blocks
    return int(2 * tokens * numbers + attended)


def _image_flops(part: nn.Module, image: ImageEntry) -> tuple[int, tuple[int, ...]]:
    """Count the same of an image, by running one without memory; and tell the shape of what comes of it."""
    pixels = torch.zeros(1, image.channels, image.height, image.width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = part(pixel_values=pixels)
    return int(counter.get_total_flops()), tuple(out.shape if isinstance(out, torch.Tensor) else ())


def describe_cuts(inspection: Inspection, batch: int = 16) -> str:
    """Write the cuts as a table for people, with the bytes of a round of `batch` examples."""
    first = inspection.cuts[0]
    has_table = first.table_bytes > 0
    what = f"texts of {first.positions} tokens" if has_table else "images"
    lines = [
        f"{inspection.model} ({inspection.family}): {inspection.blocks} blocks, {inspection.parameters / 1e6:.1f} M "
        f"parameters, {inspection.forward_flops / 1e9:.2g} GFLOP for one of its {what}",
    ]
    if has_table:
        table = f"{first.table_bytes / 1e6:.0f} MB"
        lines.append(f"each device also has the token table, {table} on the disk; a round reads the rows of its tokens")
    targets = ", ".join(inspection.lora_targets) or "no modules by itself; name them with --lora-targets"
    lines += [
        f"--train lora adapts {targets}",
        "",
        f"{'--split':>7}  {'weights':>9}  {'computes':>9}  {f'sends in a round of {batch}':>24}  {'at the cut':>14}",
    ]
    for cut in inspection.cuts:
        lines.append(
            f"{cut.split:7d}  {cut.weights_bytes / 1e6:6.1f} MB  {100 * cut.forward_share:7.1f} %  "
            f"{batch * cut.activation_bytes / 1e6:21.2f} MB  {f'{cut.positions} x {cut.width}':>14}"
        )
    lines += [
        "",
        "weights: what a forward reads, as float32. computes: the device's share of the model's forward. A round costs",
        "one such forward (frozen), about 3.5 (first-order), or one and one more for each direction (HO-SFL). sends:",
        "activations as float32, and as many bytes come back; wire_dtype in run.toml makes them fewer.",
    ]
    return "\n".join(lines)
