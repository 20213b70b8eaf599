"""Dealing one data set out to many devices: alike (iid), or with classes shared unevenly (Dirichlet)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hosl_protocol.arithmetic.directions import Stream, philox
from hosl_protocol.exceptions import SettingsError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Partition:
    """How examples are dealt out."""

    alpha: float | None = None
    """Concentration of the Dirichlet distribution from which each class draws its shares over devices: small is
    uneven. None deals examples out at random, as many to each device."""

    @classmethod
    def parse(cls, text: str) -> Partition:
        """`iid` or `dirichlet:ALPHA`. Raises SettingsError."""
        kind, _, value = text.partition(":")
        if text == "iid":
            return cls()
        try:
            alpha = float(value)
        except ValueError:
            alpha = math.nan
        if kind != "dirichlet" or not 0.0 < alpha < math.inf:
            raise SettingsError("--partition", text, "use iid or dirichlet:ALPHA, for example dirichlet:0.5")
        return cls(alpha)

    def deal(self, labels: npt.NDArray[np.int32] | None, examples: int, devices: int, seed: int) -> list[Indices]:
        """Deal out examples, as rising indices by device; every example goes to one device, and none is left without.

        Raises SettingsError where there are fewer examples than devices, or no labels to be uneven in.
        """
        if examples < devices:
            raise SettingsError("--devices", devices, f"use at most {examples}, the examples in the data")

        generator = np.random.Generator(philox(seed, 0, 0, Stream.SAMPLING, index=1))
        if self.alpha is None:
            return [np.sort(part) for part in np.array_split(generator.permutation(examples), devices)]
        if labels is None:
            raise SettingsError("--partition", f"dirichlet:{self.alpha:g}", "the task has no classes: use iid")
        return _fill_empty(_deal_unevenly(labels, devices, self.alpha, generator))


def _deal_unevenly(
    labels: npt.NDArray[np.int32], devices: int, alpha: float, generator: np.random.Generator
) -> list[list[int]]:
    """Cut each class at shares drawn from a symmetric Dirichlet distribution (Hsu et al., arXiv 1909.06335)."""
    parts: list[list[int]] = [[] for _ in range(devices)]
    for label in np.unique(labels):
        places = generator.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(generator.dirichlet(np.full(devices, alpha)))[:-1] * len(places)).astype(int)
        for part, piece in zip(parts, np.split(places, cuts), strict=True):
            part += piece.tolist()
    return parts


def _fill_empty(parts: list[list[int]]) -> list[Indices]:
    """Give each device without an example one of the device with the most."""
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return [np.array(sorted(part), np.int64) for part in parts]
