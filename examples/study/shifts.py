"""What befalls the devices' inputs that the model was not trained on: a camera's colours, another way of writing."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any

import numpy as np

Images = np.ndarray
"""[N, H, W, C], uint8."""


def blur(images: Images) -> Images:
    """The mean of 3 x 3 pixels, twice."""
    for _ in range(2):
        padded = np.pad(images.astype(np.uint16), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        height, width = images.shape[1:3]
        shifted = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
        images = (np.sum(shifted, axis=0) // 9).astype(np.uint8)
    return images


IMAGES: dict[str, Callable[[Images], Images]] = {
    "invert": lambda images: 255 - images,
    "darken": lambda images: images // 4,
    "tint": lambda images: (images * np.array([1.0, 0.55, 0.2])).astype(np.uint8),
    "blur": blur,
}

_LOOKALIKES = str.maketrans("aeiostAEIOST", "431057431057")

TEXTS: dict[str, Callable[[str], str]] = {
    "upper": str.upper,
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "digits": lambda text: text.translate(_LOOKALIKES),
    "joined": lambda text: text.replace(" ", "_"),
    "backwards": lambda text: " ".join(word[::-1] for word in text.split()),
}


def shift_images(images: Images, name: str) -> Images:
    """`images` as the devices see them."""
    return IMAGES[name](images)


def shift_row(row: dict[str, Any], name: str) -> dict[str, Any]:
    """`row` with every text as the devices see it; numbers and labels stay."""
    return {key: TEXTS[name](value) if isinstance(value, str) else value for key, value in row.items()}
