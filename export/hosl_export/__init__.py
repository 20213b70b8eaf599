"""hosl-export: a Hugging Face model becomes a bundle, and the halves of a bundle become a Hugging Face model."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# From 1.29 on ONNX Runtime reports models and their hashes to its maker, unless this stands here before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from hosl_export.bundle.reading import full_config, load_tail
    from hosl_export.exceptions import ExportError, ModelError, ParityError, SpaceError, UnknownFamily
    from hosl_export.exporter import export_bundle
    from hosl_export.model.families import FAMILIES, find_family
    from hosl_export.model.family import Family
    from hosl_export.model.halves import ClientHalf, Tail, client_half, tail_half
    from hosl_export.model.joining import join_state
    from hosl_export.model.lora import fold_lora, inject_lora, load_plain_state, plain_state
    from hosl_export.model.peft_files import peft_adapter
    from hosl_export.settings import ExportSettings
    from hosl_export.sources.loading import load_model
    from hosl_export.summary import Summary

_HOMES = {
    "exceptions": ("ExportError", "ModelError", "ParityError", "SpaceError", "UnknownFamily"),
    "exporter": ("export_bundle",),
    "model.families": ("FAMILIES", "find_family"),
    "model.family": ("Family",),
    "bundle.reading": ("full_config", "load_tail"),
    "model.halves": ("ClientHalf", "Tail", "client_half", "tail_half"),
    "model.joining": ("join_state",),
    "model.peft_files": ("peft_adapter",),
    "sources.loading": ("load_model",),
    "model.lora": ("fold_lora", "inject_lora", "load_plain_state", "plain_state"),
    "settings": ("ExportSettings",),
    "summary": ("Summary",),
}

__all__ = [
    "FAMILIES",
    "ClientHalf",
    "ExportError",
    "ExportSettings",
    "Family",
    "ModelError",
    "ParityError",
    "SpaceError",
    "Summary",
    "Tail",
    "UnknownFamily",
    "client_half",
    "export_bundle",
    "find_family",
    "fold_lora",
    "full_config",
    "inject_lora",
    "join_state",
    "load_model",
    "load_plain_state",
    "load_tail",
    "peft_adapter",
    "plain_state",
    "tail_half",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: the cloud needs the halves without the ONNX tools, and --help needs no torch.
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"hosl_export.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
