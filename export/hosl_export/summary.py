"""What an export made, as a struct for `--json` and as lines for people."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import msgspec

from hosl_export.bundle.gradient_check import GradientCheck
from hosl_export.bundle.parity import LONGEST
from hosl_export.model.families import find_family
from hosl_export.model.heads import is_classifier, own_labels
from hosl_export.tensor_files import read_tensors
from hosl_protocol.run.manifest import TAIL_WEIGHTS, Manifest, TrainMode
from hosl_protocol.run.updates import estimate_alignment


class Summary(msgspec.Struct, kw_only=True, frozen=True):
    """What an export made."""

    bundle: str
    bundle_bytes: int
    model: str
    family: str
    architecture: str
    split: int
    blocks: int
    width: int
    max_length: int
    client_parameters: int
    client_bytes: int
    tail_parameters: int
    tail_bytes: int
    train: TrainMode
    trainable_tensors: int
    trainable_parameters: int
    prefix_blocks: int
    """Blocks before the first that trains, which a round runs once."""
    lattice_max_change: float
    """Largest absolute change of a weight when it was put on the lattice."""
    parity_error: float
    """Largest difference from the uncut model, as a share of the output's largest magnitude."""
    gradient_error: float | None = None
    """Largest difference of a tensor's gradient from torch's, as a share of its norm; None without graphs of it."""
    first_order_forwards: float | None = None
    """Floating-point operations of a first-order round, in forwards of the device's half; None likewise."""
    ho_sfl_forwards: float | None = None
    """The same of a round of HO-SFL with the directions that it takes unasked."""
    checked_length: int
    """Longest input compared with the uncut model, in tokens."""
    sliding_window: int | None
    """Tokens that a sliding-window block sees, where the model has such blocks."""
    image_size: tuple[int, int] | None = None
    """Height and width of images, where the model takes such."""
    classes: int | None = None
    """Rows of the model's own classification head, where it has one."""
    class_names: tuple[str, ...] = ()
    """Its labels in the order of the rows, where they have names."""


def summarize(
    bundle: Path, manifest: Manifest, config: Any, parity_error: float, gradient: GradientCheck | None
) -> Summary:
    """Sum up a bundle that was just written from a model with `config`."""
    client = sum(math.prod(entry.shape) for entry in manifest.tensors)
    tail = sum(tensor.numel() for tensor in read_tensors(bundle / TAIL_WEIGHTS).values())
    has_classes = find_family(manifest.family).takes_images or is_classifier(config)

    return Summary(
        bundle=str(bundle),
        bundle_bytes=sum(entry.size_bytes for entry in manifest.files),
        model=manifest.model,
        family=manifest.family,
        architecture=manifest.architecture,
        split=manifest.split,
        blocks=manifest.blocks,
        width=manifest.width,
        max_length=manifest.max_length,
        client_parameters=client,
        client_bytes=4 * client,
        tail_parameters=tail,
        tail_bytes=4 * tail,
        train=manifest.train,
        trainable_tensors=len(manifest.trainable),
        trainable_parameters=sum(math.prod(entry.shape) for entry in manifest.trainable),
        prefix_blocks=0 if manifest.prefix is None else manifest.prefix.blocks,
        lattice_max_change=manifest.lattice_max_change,
        parity_error=parity_error,
        gradient_error=None if gradient is None else gradient.error,
        first_order_forwards=None if gradient is None else 1 + gradient.forwards,
        ho_sfl_forwards=None if gradient is None else 1 + default_directions(manifest.train) * gradient.probed,
        checked_length=min(manifest.max_length, LONGEST),
        sliding_window=_sliding_window(config),
        image_size=None if manifest.image is None else (manifest.image.height, manifest.image.width),
        classes=config.num_labels if has_classes else None,
        class_names=own_labels(config) if has_classes else (),
    )


def default_directions(train: TrainMode) -> int:
    """The directions of HO-SFL that the service takes where a run does not say."""
    return 8 if train == "norm" else 2


def _sliding_window(config: Any) -> int | None:
    """Tokens that a sliding-window block sees; a config may name a window although no block has one."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def describe(summary: Summary) -> str:
    """Write the summary as lines for people."""
    on_tail = summary.blocks - summary.split
    cut = f"cut after block {summary.split} of {summary.blocks}"
    device = _describe_half(summary.split, summary.client_parameters, summary.client_bytes)
    cloud = _describe_half(on_tail, summary.tail_parameters, summary.tail_bytes)
    lines = [
        f"{summary.bundle}: {summary.model} ({summary.architecture}) {cut}",
        f"  device  {device}, and the embeddings",
        f"  cloud   {cloud}, and the head",
        *_describe_head(summary),
        f"  trains  {_describe_training(summary)}",
        f"  parity  {_describe_parity(summary)}",
        *_describe_gradient(summary),
        f"next: {next_step(summary)}",
    ]
    return "\n".join(lines)


def next_step(summary: Summary) -> str:
    """The commands that train the bundle on the user's own data."""
    kind = "" if summary.image_size is None else " image-classification"
    serve = f"hosl-cloud serve --bundle {shlex.quote(summary.bundle)} --config run.toml"
    return f"hosl-cloud config --example{kind} > run.toml && {serve}"


def _describe_head(summary: Summary) -> list[str]:
    """The line of the classification head; none where there is no such head."""
    if summary.classes is None:
        return []
    few = ", ".join(summary.class_names[:4]) + (", ..." if len(summary.class_names) > 4 else "")
    names = f" ({few})" if few else ""
    return [f"  head    of {summary.classes} labels{names}; a task of as many keeps it, another gets a new one"]


def _describe_half(blocks: int, parameters: int, size_bytes: int) -> str:
    name = "block" if blocks == 1 else "blocks"
    return f"{blocks:3d} {name}, {parameters / 1e6:.1f} M parameters, {size_bytes / 2**20:.0f} MiB"


def _describe_training(summary: Summary) -> str:
    if summary.train == "none":
        return "nothing on the device (--train none)"

    tensors = "tensor" if summary.trainable_tensors == 1 else "tensors"
    text = (
        f"{summary.trainable_parameters:,} parameters in {summary.trainable_tensors} {tensors} on the device "
        f"(--train {summary.train}); rounding moved them by at most {summary.lattice_max_change:.2g}"
    )
    if summary.prefix_blocks:
        text += f"; the first {summary.prefix_blocks} of the device's blocks run once a round"
    return text


def _describe_parity(summary: Summary) -> str:
    text = f"differs from the uncut model by at most {summary.parity_error:.1g} of an output's range, "
    if summary.image_size is not None:
        height, width = summary.image_size
        return text + f"checked on images of {height} x {width}, {summary.max_length} positions each at the cut"

    text += f"checked to {summary.checked_length} tokens"
    if summary.checked_length < summary.max_length:
        text += f" of the {summary.max_length} allowed"
    if summary.sliding_window is not None and summary.checked_length <= summary.sliding_window:
        text += f"; that is within the model's sliding window of {summary.sliding_window}, which stays untested"
    return text


def _describe_gradient(summary: Summary) -> list[str]:
    """The lines of the exact gradient, and of what a round with it computes; none without its graphs."""
    if summary.gradient_error is None or summary.first_order_forwards is None or summary.ho_sfl_forwards is None:
        return []
    probes = f"HO-SFL with its {default_directions(summary.train)} directions {summary.ho_sfl_forwards:.1f}"
    costs = f"first-order costs {summary.first_order_forwards:.1f} forwards of the device's half, {probes}"
    alignment = 100 * estimate_alignment(default_directions(summary.train), summary.trainable_parameters)
    return [
        f"  exact   gradients differ from those of torch by at most {summary.gradient_error:.1g} of a tensor's norm",
        f"  round   {costs} (floating-point operations);",
        f"          first-order has the exact gradient, an estimate of HO-SFL's points {alignment:.1f} % towards it",
    ]
