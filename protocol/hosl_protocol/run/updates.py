"""How many numbers and bytes a round's update has: of a run's algorithm, and of what trains in a bundle."""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias

import msgspec

from hosl_protocol.arithmetic.rotation import GradientLayout
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.settings import RunSettings

Size: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]


class UpdateShape(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Sizes of an update's tensors, the same in every round of a run."""

    coefficients: Size
    """P: the directions, or first-order the scales of the gradient's blocks; 0 where the device is frozen."""
    codes: Size = 0
    """C: bytes of the gradient's levels, first-order; else 0."""

    @property
    def size_bytes(self) -> int:
        """Of an update's numbers."""
        return 4 * self.coefficients + self.codes


def estimate_alignment(directions: int, elements: int) -> float:
    """Tell how far an estimate from random directions points towards the gradient of so many numbers, from 0 to 1.

    It is the mean cosine between the two, sqrt(P / d_c), with directions that are almost orthogonal.
    """
    return math.sqrt(min(1.0, directions / max(elements, 1)))


def gradient_layout(settings: RunSettings, manifest: Manifest) -> GradientLayout:
    """Lay out the gradient of what trains in a bundle."""
    return GradientLayout([math.prod(entry.shape) for entry in manifest.trainable], settings.gradient_bits)


def update_shape(settings: RunSettings, manifest: Manifest) -> UpdateShape:
    """Find the sizes of a run's updates."""
    if settings.traits.sends_gradient:
        layout = gradient_layout(settings, manifest)
        return UpdateShape(coefficients=layout.scales, codes=layout.codes)
    return UpdateShape(coefficients=settings.directions if settings.traits.trains_client else 0)
