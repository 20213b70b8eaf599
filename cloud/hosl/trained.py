"""A trained model in memory, as `run.model()` gives it."""

from __future__ import annotations

from pathlib import Path

from hosl.extras import needs
from hosl_cloud.tail.trained import Trained, load_folder
from hosl_protocol.run.tasks import Task

__all__ = ["Trained", "load_trained"]


def load_trained(folder: Path, task: Task) -> Trained:
    """Load a merged folder. Raises MissingExtra."""
    with needs("Run.model", "cloud"):
        return load_folder(folder, task)
