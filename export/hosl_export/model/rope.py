"""Rotary embeddings whose angles depend on how long an input is: within some length they are always the same.

A graph has the angles of one length, so that an export keeps `max_length` within that one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hosl_protocol.exceptions import SettingsError


def rope_limit(config: Any) -> tuple[str, int] | None:
    """The kind of rotary embedding that changes first, and the tokens up to which it does not; None where none does."""
    return min(_find_limits(config), key=lambda found: found[1], default=None)


def _find_limits(config: Any) -> Iterator[tuple[str, int]]:
    """Find the kinds of rotary embeddings that choose their angles by the length, and to which they keep the first."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for entry in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        kind = str(entry.get("rope_type", ""))
        if "dynamic" in kind:
            yield kind, config.max_position_embeddings
        elif kind == "longrope":
            yield kind, entry.get("original_max_position_embeddings") or config.max_position_embeddings


def check_rope(config: Any, max_length: int) -> None:
    """Raise SettingsError where inputs of `max_length` tokens would change the angles."""
    limit = rope_limit(config)
    if limit is not None and max_length > limit[1]:
        kind, tokens = limit
        remedy = f"the model's rope_scaling ({kind}) has other angles beyond {tokens} tokens: use at most {tokens}"
        raise SettingsError("max-length", max_length, remedy)


def settle_rope(model: Any) -> None:
    """Let the model keep the angles that it has, which `check_rope` found to be those of every input.

    Otherwise the model compares the length at each run, and a graph can have no such branch.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            module.rope_type = dict.fromkeys(kinds, "default")
        elif kinds is not None:
            module.rope_type = "default"
