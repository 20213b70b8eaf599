"""The agent on the device: numpy and ONNX Runtime, forward passes only.

"Inside" in edge/README.md leads from the command to ONNX Runtime, and says what is in which folder.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# From 1.29 on ONNX Runtime reports models and their hashes to its maker, unless this stands here before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from hosl_edge.agent import Summary, run_agent
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

_AGENT, _SETTINGS = ("Summary", "run_agent"), ("EdgeSettings", "load_settings")

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
    """Load a name on first use: the other commands do without ONNX Runtime, which may be what is wrong."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "agent" if name in _AGENT else "settings" if name in _SETTINGS else "exceptions"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
