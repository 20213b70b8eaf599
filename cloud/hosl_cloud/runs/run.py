"""A run in progress: what it is, how far it has come, and the devices' weights as its scalars give them.

A Run is shared by its Coordinator, Admission, Checkpointer and Snapshots. Its plain fields belong to the event loop;
`mirror` belongs to the compute thread, where `load`, `apply`, `note_digest` and `write_state` run. The mirror may be
one round ahead of `round`, while that round is stored; nothing of such a round may be told to anybody.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from hosl_cloud.runs.progress import Event, Listener
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.client_state import write_snapshot
from hosl_cloud.storage.mirror import load_shard_weights
from hosl_cloud.storage.store import Store
from hosl_protocol.arithmetic.rotation import GradientLayout
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.updates import UpdateShape, gradient_layout, update_shape
from hosl_protocol.weights.client_weights import ClientWeights, make_client_weights
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.weights.state import ClientState
from hosl_protocol.wire.messages import Snapshot

Ending = Literal["completed", "stopped-early", "stopped", "failed"]
"""How a run ends; a paused one does not."""

Paused = Literal["paused"]

Compute: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs work on the one thread that owns the tail and the mirror."""

KEPT_STATES = 3
"""Bytes of updates that the store keeps in first-order training, in units of the client's state.

A device that lacks half of them is better off with a snapshot (snapshots.MARGIN); the other half is what rounds may
add while it joins.
"""

LEAST_KEPT = 16
"""Updates that the store keeps at least."""

KEPT_DIGESTS = 16
"""Rounds whose digest is remembered; a device that reports on an older one is not checked."""


@dataclass
class Run:
    """The state of a run in progress."""

    id: str
    config: RunConfig
    manifest: Manifest
    bundle: Path
    folder: Path
    """The run's folder; checkpoints go below it."""
    store: Store
    epoch: int = 0
    round: int = 0
    """The last finished round; stored, and in the mirror."""
    ending: Ending | None = None
    pruned_to: int = 0
    """The last round whose update the store has dropped; from there on devices can replay."""
    digests: dict[int, str] = field(default_factory=dict)
    """Digest of the devices' weights by round."""
    listeners: list[Listener] = field(default_factory=list)
    """Who follows the run."""
    settings: RunSettings = field(init=False)
    update_shape: UpdateShape = field(init=False)
    layout: GradientLayout | None = field(init=False)
    """Of the gradients that devices send, in first-order training."""

    def __post_init__(self) -> None:
        self.settings = self.config.wire_settings()
        self.update_shape = update_shape(self.settings, self.manifest)
        sends_gradient = self.settings.traits.sends_gradient
        self.layout = gradient_layout(self.settings, self.manifest) if sends_gradient else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that train, by name."""
        return {entry.name: entry.shape for entry in self.manifest.trainable}

    @property
    def state_bytes(self) -> int:
        """The size of the client's state, as a snapshot has it, but for the header."""
        elements = sum(map(math.prod, self.shapes.values()))
        return 4 * elements * (3 if self.settings.client.optimizer == "adamw" else 1)

    @property
    def kept_updates(self) -> int | None:
        """How many of the newest updates the store keeps; None where it keeps all, for they are small."""
        if self.layout is None:
            return None
        return max(LEAST_KEPT, math.ceil(KEPT_STATES * self.state_bytes / self.update_shape.size_bytes))

    def tell(self, event: Event) -> None:
        """Tell whoever follows the run, on the event loop."""
        for listener in self.listeners:
            listener(event)

    def load(self, state: ClientState | None = None) -> None:
        """Make the mirror of the client's weights at `round`, from a checkpoint's `state` where it has one.

        Raises BundleError, StoreError, and HoslError where the state is of something else.
        """
        weights = load_shard_weights(self.bundle, self.manifest, only_trainable=True)
        self.mirror: ClientWeights = make_client_weights(self.manifest, weights, self.settings)
        if state is not None:
            self.mirror.load_state(state)
        self.mirror.apply(self.store.replay(self.id, self.round, self.mirror.applied_round))
        self.pruned_to = self.store.pruned_to(self.id)
        self.note_digest()

    def write_state(self, path: Path) -> Snapshot:
        """Write the mirror's state to a file. Raises OSError."""
        return write_snapshot(path, self.id, self.epoch, self.mirror.state(), self.shapes)

    def apply(self, update: UpdateRecord) -> None:
        """Move the mirror. Raises LatticeError where the weights diverge, and changes nothing."""
        self.mirror.apply([update])

    def note_digest(self) -> None:
        """Remember the mirror's digest; the oldest are forgotten."""
        if self.mirror.applied_round not in self.digests:
            self.digests[self.mirror.applied_round] = self.mirror.digest()
            while len(self.digests) > KEPT_DIGESTS:
                del self.digests[min(self.digests)]
