"""The agent on the device: numpy and ONNX Runtime, forward passes only."""

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
