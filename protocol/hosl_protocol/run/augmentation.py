"""How a round's training images vary: pure functions of (seed, round, device, place of the example).

Shapes: B images, H rows, W columns, C channels. Specification with golden vectors: protocol/README.md, section
"Augmentation".
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from hosl_protocol.arithmetic.directions import Stream, philox
from hosl_protocol.run.settings import Augmentation


def draw_variations(
    seed: int, round_: int, device: str, places: npt.NDArray[np.int64], augmentation: Augmentation
) -> npt.NDArray[np.int64]:
    """Draw row and column at which each image's crop begins in the padded image, and whether it is flipped [B, 3]."""
    choices = 2 * augmentation.crop_padding + 1
    name = zlib.crc32(device.encode())
    rows = []
    for place in places.tolist():
        # A block of words for each example: what one becomes does not depend on those beside it.
        words = philox(seed, round_, 0, Stream.AUGMENTATION, name, place).random_raw(3).tolist()
        rows.append((words[0] % choices, words[1] % choices, words[2] % 2 if augmentation.flip else 0))
    return np.array(rows, np.int64).reshape(-1, 3)


def vary(
    pixels_BHWC: npt.NDArray[np.uint8], variations_B3: npt.NDArray[np.int64], crop_padding: int
) -> npt.NDArray[np.uint8]:
    """Put each image within black pixels, crop it to its own size, then flip it [B, H, W, C]."""
    height, width = pixels_BHWC.shape[1:3]
    around = (crop_padding, crop_padding)
    padded = np.pad(pixels_BHWC, ((0, 0), around, around, (0, 0)))
    varied = np.empty_like(pixels_BHWC)
    for target, image, (top, left, is_flipped) in zip(varied, padded, variations_B3.tolist(), strict=True):
        crop = image[top : top + height, left : left + width]
        target[...] = crop[:, ::-1] if is_flipped else crop
    return varied
