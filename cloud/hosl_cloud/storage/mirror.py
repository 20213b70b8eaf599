"""The client half as the cloud knows it: the base shard, and the scalars that moved it.

The cloud never receives weights. A run in progress has what trains as `Run.mirror` (runs/run.py); a merge has all of
it, replayed from the store. Both hold the bits that the devices hold, for the arithmetic is exact
(hosl_protocol/weights/client_weights.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from hosl_cloud.storage.records import RunRow
from hosl_cloud.storage.store import Store
from hosl_protocol.run.manifest import SHARD_WEIGHTS, BundleError, Manifest
from hosl_protocol.weights.client_weights import make_client_weights
from hosl_protocol.weights.state import ClientState

Weights = dict[str, npt.NDArray[np.float32]]


def load_shard_weights(bundle: Path, manifest: Manifest, *, only_trainable: bool = False) -> Weights:
    """Read the base shard's tensors by name, in memory of their own. Raises BundleError."""
    entries = manifest.trainable if only_trainable else manifest.tensors
    try:
        with safe_open(bundle / SHARD_WEIGHTS, framework="numpy") as file:
            return {entry.name: np.array(file.get_tensor(entry.name), np.float32) for entry in entries}
    except Exception as error:  # safetensors raises a type of its own that has no public name
        raise BundleError(f"{bundle / SHARD_WEIGHTS} cannot be read: {error}") from error


def replay_client(
    store: Store, run: RunRow, bundle: Path, manifest: Manifest, round_: int, state: ClientState | None = None
) -> Weights:
    """Replay the client half up to `round_`: the base shard plus the stored updates, bit for bit what devices hold.

    Where there is a `state`, it begins there. Slow, off the event loop. Raises BundleError, StoreError where updates
    are missing, and HoslError where the state is of something else.
    """
    weights = load_shard_weights(bundle, manifest)
    client = make_client_weights(manifest, weights, run.config.wire_settings())
    if state is not None:
        client.load_state(state)
    # In place, in the arrays of `weights`.
    client.apply(store.replay(run.id, round_, client.applied_round))
    client.close()
    return weights
