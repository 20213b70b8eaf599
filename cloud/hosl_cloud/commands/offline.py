"""The commands' answers from a data folder in which no service runs, in the form that the service would give them."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from hosl_cloud.commands.client import is_local
from hosl_cloud.exceptions import ServiceError
from hosl_cloud.runs.run_status import LiveState, list_runs, run_status
from hosl_cloud.storage.data_folder import DATABASE, SERVICE_FILE, is_locked, lock, run_folder
from hosl_cloud.storage.evaluations import show_evaluation
from hosl_cloud.storage.records import UNENDED
from hosl_cloud.storage.store import Store


class DataFolder:
    """A data folder in which no service runs. One may start at any time: what only looks writes nothing."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir, self._store = data_dir, Store(data_dir / DATABASE, reads_only=True)

    def __enter__(self) -> DataFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._store.close()

    def run_ids(self) -> list[str]:
        """Ids of all runs, oldest first."""
        return self._store.run_ids()

    def runs(self) -> Any:
        """All runs, oldest first."""
        return _plain({"runs": list_runs(self._store, {})})

    def run(self, run: str) -> Any:
        """A run, with its last evaluation class by class. Raises RunNotFound."""
        shown = run_status(self._store, run, LiveState())
        return _plain(shown) | {"evaluation": _plain(show_evaluation(self._store, run))}

    def resume(self, run: str) -> Any:
        """Put a run that has stopped in line, so that the next service goes on with it. Raises ServiceError."""
        with contextlib.closing(lock(self._data_dir)), contextlib.closing(Store(self._data_dir / DATABASE)) as store:
            row = store.run(run)
            row.settings.config(run)
            if row.state == "completed":
                raise ServiceError(f"run {run} is completed: only one that is stopped, paused or failed goes on")
            if row.state not in UNENDED:
                store.queue_run(run)
        return self.run(run)

    def log(self, run: str, after: int) -> list[dict[str, Any]]:
        """Read what was said about a run after an event."""
        events: list[dict[str, Any]] = _plain(self._store.events(run, after))
        return events

    def checkpoints(self, run: str) -> Any:
        """A run's checkpoints. Raises RunNotFound."""
        from hosl_cloud.service.runs_api import describe_checkpoints  # imports torch, which takes seconds

        return _plain({"checkpoints": describe_checkpoints(run_folder(self._data_dir, self._store.run(run).id))})

    def checkpoint_files(self, run: str) -> dict[int, Path]:
        """Files of a run's checkpoints by their rounds, oldest first; of one round that of the newest epoch."""
        from hosl_cloud.tail.checkpoint import list_checkpoints  # imports torch, too

        return {each.info.round: each.path for each in list_checkpoints(run_folder(self._data_dir, run))}


def _plain(answer: Any) -> Any:
    """As the service's JSON says it."""
    return json.loads(msgspec.json.encode(answer))


def find_offline(options: argparse.Namespace) -> DataFolder | None:
    """The data folder, where the options name no service elsewhere and none runs in it; None asks the service.

    A service that was killed has left the file that says where it is, but not its lock.
    """
    data_dir: Path = options.data_dir
    if not is_local(options) or not (data_dir / DATABASE).exists():
        return None
    # Both: a lock without the file is a simulation's, or a service's that does not listen yet.
    is_served = (data_dir / SERVICE_FILE).exists() and is_locked(data_dir)
    return None if is_served else DataFolder(data_dir)
