"""The client's state at the end of a round: what a snapshot holds, and what proves two machines equal.

Specification: protocol/README.md, sections "Digests" and "Snapshots".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from hosl_protocol.arithmetic.directions import Vector

FIRST_MOMENT, SECOND_MOMENT = "optimizer/{}/first", "optimizer/{}/second"
"""Names of a tensor's moments in a snapshot; no tensor of a manifest has a slash in its name."""


@dataclass(frozen=True)
class Moments:
    """AdamW's part, by the tensors' names."""

    steps: int
    """Steps taken; the powers of β follow from it."""
    first: Mapping[str, Vector]
    second: Mapping[str, Vector]


@dataclass(frozen=True)
class ClientState:
    """Trainable tensors in the manifest's order, and what the optimizer remembers."""

    round: int
    weights: Mapping[str, Vector]
    exponents: Mapping[str, int]
    """Of the lattices: coarser than the manifest's after re-lattice events."""
    moments: Moments | None = None
    """None with SGD."""

    def arrays(self) -> Iterator[tuple[str, str, Vector]]:
        """(name in a snapshot, name of the tensor, elements): weights, then first, then second moments."""
        for name, values in self.weights.items():
            yield name, name, values
        if self.moments is not None:
            for form, moments in ((FIRST_MOMENT, self.moments.first), (SECOND_MOMENT, self.moments.second)):
                for name, values in moments.items():
                    yield form.format(name), name, values

    def digest(self) -> str:
        """SHA-256 of the trainable tensors in order, little-endian, then AdamW's step count and moments."""
        # Shapes and names are the manifest's, which both sides hold by its digest: the numbers say the rest.
        digest = hashlib.sha256()
        for values in self.weights.values():
            digest.update(values.data.cast("B"))
        if self.moments is not None:
            digest.update(self.moments.steps.to_bytes(8, "little"))
            for values in (*self.moments.first.values(), *self.moments.second.values()):
                digest.update(values.data.cast("B"))
        return digest.hexdigest()


class SnapshotHeader(msgspec.Struct, kw_only=True, frozen=True):
    """The JSON text in a snapshot's metadata, entry `hosl`."""

    run: str
    epoch: int
    round: int
    weights_digest: str
    """Digest of the state inside, as in Ready."""
    exponents: dict[str, int]
    """Lattice exponent of each trainable tensor, now."""
    steps: int | None = None
    """AdamW's; null with SGD."""
