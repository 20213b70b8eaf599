"""The agent on the device: numpy and ONNX Runtime, forward passes only."""

import os
from typing import TYPE_CHECKING, Any

from hosl_edge.exceptions import (
    ConnectionLost,
    ConsentError,
    DataError,
    EdgeError,
    LowMemoryError,
    MemoryBudgetError,
    RefusedError,
)
from hosl_edge.settings import EdgeSettings, load_settings

# From 1.29 on ONNX Runtime reports models and their hashes to its maker, unless this stands here before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from hosl_edge.agent import Summary, run_agent

__all__ = [
    "ConnectionLost",
    "ConsentError",
    "DataError",
    "EdgeError",
    "EdgeSettings",
    "LowMemoryError",
    "MemoryBudgetError",
    "RefusedError",
    "Summary",
    "load_settings",
    "run_agent",
]


def __getattr__(name: str) -> Any:
    """The agent on first use: the other commands do without ONNX Runtime, which may be what is wrong."""
    if name not in ("Summary", "run_agent"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hosl_edge import agent

    return getattr(agent, name)
