"""What a model is given of an image: read from its preprocessor, checked against its config, written for both sides."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hosl_export.exceptions import ModelError
from hosl_export.model.family import Family
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import TAIL_CONFIG, ImageEntry

logger = logging.getLogger(__name__)

PREPROCESSOR = "preprocessor_config.json"

DEFAULT_SIZE = 224

_RESAMPLE = get_args(get_type_hints(ImageEntry)["resample"])
"""Pillow's filters; the place of a name is the number that preprocessors write."""


def read_image_entry(facts: dict[str, Any], config: Any, family: Family, name: str, asked: int | None) -> ImageEntry:
    """Read what images become from the preprocessor's `facts`, the config and the size that was `asked` for, if any.

    Raises ModelError where they contradict each other, SettingsError where the size that was asked for cannot be.
    """
    height, width = _choose_size(facts, config, family, asked)
    if not facts:
        logger.warning(
            "%s says nothing of its images: they are resized to %d x %d, with mean and std 0.5", name, height, width
        )

    filter_ = facts.get("resample")
    is_normalized = facts.get("do_normalize", True)
    return ImageEntry(
        channels=config.num_channels,
        height=height,
        width=width,
        mean=_per_channel(facts, "image_mean", 0.5 if is_normalized else None, 0.0, config.num_channels),
        std=_per_channel(facts, "image_std", 0.5 if is_normalized else None, 1.0, config.num_channels),
        rescale=float(facts.get("rescale_factor") or 1 / 255) if facts.get("do_rescale", True) else 1.0,
        resample="bilinear" if filter_ is None else _RESAMPLE[int(filter_)],
    )


def _choose_size(facts: dict[str, Any], config: Any, family: Family, asked: int | None) -> tuple[int, int]:
    """Choose height and width: of fixed positions, or asked for, or the preprocessor's, or the config's, or 224."""
    own = _pair(getattr(config, "image_size", None))
    if family.has_fixed_size:
        if own is None:
            raise ModelError("image_size", None, "the model's config does not say how large its images are")
        if asked is not None and (asked, asked) != own:
            raise SettingsError("image-size", asked, f"the model embeds the positions of {own[0]} x {own[1]} pixels")
        return own

    if asked is not None:
        if not 8 <= asked <= 4096:
            raise SettingsError("image-size", asked, "use 8 to 4096 pixels")
        return asked, asked

    # Where the preprocessor cuts a center out of a larger image, the model sees the size of that.
    said = facts.get("crop_size") if facts.get("do_center_crop") else None
    return _pair(said) or _pair(facts.get("size")) or own or (DEFAULT_SIZE, DEFAULT_SIZE)


def _pair(size: Any) -> tuple[int, int] | None:
    """Read height and width in any of the ways that configs write them; None where it is none of them."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    if isinstance(size, dict) and size.get("shortest_edge"):
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def _per_channel(
    facts: dict[str, Any], field: str, default: float | None, neutral: float, channels: int
) -> tuple[float, ...]:
    """Get the preprocessor's numbers, one a channel; all `neutral` where it does not normalize (`default` is None)."""
    if default is None:
        return (neutral,) * channels
    said = facts.get(field)
    numbers = said if isinstance(said, (list, tuple)) else [default if said is None else said] * channels
    if len(numbers) != channels:
        raise ModelError(field, list(numbers), f"the model's images have {channels} channels")
    return tuple(float(number) for number in numbers)


def write_preprocessor(bundle: Path, image: ImageEntry) -> None:
    """Write a preprocessor beside the tail's config that does what the device does, for whoever uses a merged model."""
    facts = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": image.height, "width": image.width},
        "resample": _RESAMPLE.index(image.resample),
        "do_rescale": True,
        "rescale_factor": image.rescale,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    path = (bundle / TAIL_CONFIG).with_name(PREPROCESSOR)
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
