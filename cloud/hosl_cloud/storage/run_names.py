"""How people name a run: by its id, by the beginning of it that no other run has, or as `latest`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hosl_cloud.exceptions import AmbiguousRun, RunNotFound

LATEST = "latest"
"""Names the run that was begun last."""


def find_run_id(name: str, ids: Sequence[str]) -> str:
    """Find the run that is meant, among all `ids`, oldest first. Raises RunNotFound, AmbiguousRun."""
    if name in ids:  # an id is itself, also where it is the beginning of another
        return name
    if name == LATEST and ids:
        return ids[-1]

    # A whole id means that run alone: once it is deleted, it must not become the beginning of its twin's.
    is_whole = re.search(r"-\d{8}-\d{6}(-\d+)?$", name) is not None
    found = [id_ for id_ in ids if name and not is_whole and id_.startswith(name)]
    if not found:
        raise RunNotFound(name, list(ids))
    if len(found) > 1:
        raise AmbiguousRun(name, found)
    return found[0]


def short_name(run: str, ids: Sequence[str]) -> str:
    """The shortest beginning of a run's id that ends before a dash and means no other run; else the id."""
    others = [id_ for id_ in ids if id_ != run]
    beginnings = (run[:place] for place, letter in enumerate(run) if letter == "-" and place)
    clear = (name for name in beginnings if name != LATEST and not any(id_.startswith(name) for id_ in others))
    return next(clear, run)
