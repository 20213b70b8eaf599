"""The agent on the device: numpy and ONNX Runtime, forward passes only."""

from hosl_edge.agent import Summary, run_agent
from hosl_edge.exceptions import (
    ConnectionLost,
    ConsentError,
    DataError,
    EdgeError,
    MemoryBudgetError,
    RefusedError,
)
from hosl_edge.settings import EdgeSettings, load_settings

__all__ = [
    "ConnectionLost",
    "ConsentError",
    "DataError",
    "EdgeError",
    "EdgeSettings",
    "MemoryBudgetError",
    "RefusedError",
    "Summary",
    "load_settings",
    "run_agent",
]
