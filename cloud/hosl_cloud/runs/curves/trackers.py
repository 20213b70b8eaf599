"""A run's settings and figures for MLflow and Weights & Biases, by their own clients (hosl[mlflow], hosl[wandb]).

Each tracker has a thread of its own, which a server that is away may hold up as long as it likes: the run never waits.
What it did not take stays in memory, up to a limit, and is tried again. The store has all figures in any case.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from hosl_cloud.settings import TrackingSettings
from hosl_protocol.program.installing import install_line

log = logging.getLogger(__name__)

TRACKING_FILE = "tracking.json"
"""In the run's folder: under which id each tracker has the run, so that one that resumes goes on there."""

MOST_WAITING = 10_000
"""Rounds whose figures wait for a tracker; of those that come beyond it knows nothing."""
RETRY_S = 60.0
LEAVING_S = 30.0
"""Longest wait at a run's end for what a tracker still has to take."""

Figures = Mapping[str, float]


class Tracker(Protocol):
    """What a tracker's client does. Any error may come of it."""

    def open(self, known: str | None) -> str:
        """Begin the run there, or go on with the one of this id. Returns its id."""

    def add(self, round_: int, figures: Figures, at: float) -> None:
        """Add figures of a round; `at` is in Unix time."""

    def end(self, has_failed: bool) -> None:
        """Say that the run is over."""


class MlflowTracker:
    """An MLflow server, or a folder or database of it, by its URI."""

    EXPERIMENT = "hosl"

    def __init__(self, uri: str, run: str, settings: Mapping[str, Any]) -> None:
        self._uri, self._run, self._settings = uri, run, settings

    def open(self, known: str | None) -> str:
        """Begin the run there, or go on with the one of this id. Returns its id."""
        # It would print addresses among the service's lines.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri)
        if known is None:
            experiment = self._client.get_experiment_by_name(self.EXPERIMENT)
            id_ = experiment.experiment_id if experiment else self._client.create_experiment(self.EXPERIMENT)
            known = self._client.create_run(id_, run_name=self._run).info.run_id
            # A value of MLflow's has no more than 6000 characters.
            params = [Param(name, str(value)[:6000]) for name, value in self._settings.items()]
            self._client.log_batch(known, params=params)
        else:
            self._client.update_run(known, status="RUNNING")
        self._id: str = known
        return known

    def add(self, round_: int, figures: Figures, at: float) -> None:
        """Add figures of a round; `at` is in Unix time."""
        from mlflow.entities import Metric

        metrics = [Metric(name, float(value), int(at * 1000), round_) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def end(self, has_failed: bool) -> None:
        """Say that the run is over."""
        self._client.set_terminated(self._id, "FAILED" if has_failed else "FINISHED")


class WandbTracker:
    """A project of Weights & Biases; WANDB_MODE=offline keeps it on this machine, in the run's folder."""

    def __init__(self, project: str, run: str, settings: Mapping[str, Any], folder: Path) -> None:
        self._project, self._run, self._settings, self._folder = project, run, settings, folder

    def open(self, known: str | None) -> str:
        """Begin the run there, or go on with the one of this id. Returns its id."""
        import wandb

        id_ = known or self._run
        self._handle = wandb.init(
            project=self._project,
            id=id_,
            name=self._run,
            config=dict(self._settings),
            resume="allow",
            dir=str(self._folder),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Rounds that are made again after an interruption have the same numbers, which its own steps may not.
        self._handle.define_metric("*", step_metric="round")
        return id_

    def add(self, round_: int, figures: Figures, at: float) -> None:
        """Add figures of a round; `at` is in Unix time."""
        self._handle.log({**figures, "round": round_, "_timestamp": at})

    def end(self, has_failed: bool) -> None:
        """Say that the run is over."""
        self._handle.finish(exit_code=int(has_failed))


class _Line:
    """A tracker with what waits for it, and its thread."""

    def __init__(self, name: str, tracker: Tracker, known: str | None, opened: Callable[[str, str], None]) -> None:
        self._name, self._tracker, self._known, self._opened = name, tracker, known, opened
        self._waiting: queue.Queue[tuple[int, Figures, float] | bool] = queue.Queue(MOST_WAITING)
        self._leaving = threading.Event()
        # A daemon: at the service's end nobody waits for a server that does not answer.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, entry: tuple[int, Figures, float] | bool) -> None:
        try:
            self._waiting.put_nowait(entry)
        except queue.Full:
            log.debug("%s has %d rounds waiting: the newest are left out", self._name, MOST_WAITING)

    def leave(self, has_failed: bool) -> None:
        """Let the thread end after what waits, or at the first error."""
        self.put(has_failed)
        self._leaving.set()

    def join(self, until: float) -> None:
        """Wait for that, up to a time of time.monotonic."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            log.warning("tracking.%s lacks the run's last figures: it does not answer", self._name)

    def _work(self) -> None:
        if not self._try("open", self._open):
            return
        while True:
            entry = self._waiting.get()
            if isinstance(entry, bool):
                self._try("end", partial(self._tracker.end, entry))
                return
            if not self._try("add", partial(self._tracker.add, *entry)):
                return

    def _open(self) -> None:
        self._known = self._tracker.open(self._known)
        self._opened(self._name, self._known)

    def _try(self, what: str, work: Callable[[], None]) -> bool:
        """Do it, again and again until it goes, or the run is over. Whether it went."""
        has_told = False
        while True:
            try:
                work()
                return True
            except ModuleNotFoundError as error:
                line = f"tracking.{self._name} needs: {install_line(self._name)} ({error.name} is missing)"
                log.warning("%s; the run goes on without it", line)
                return False
            except Exception as error:  # of a client, of any type
                said = (str(error).strip().splitlines() or [type(error).__name__])[0]
                if not has_told:
                    log.warning("tracking.%s: %s fails, and is tried again every minute: %s", self._name, what, said)
                    has_told = True
            if self._leaving.wait(RETRY_S):
                log.warning("tracking.%s lacks the run's last figures: %s", self._name, said)
                return False


class Trackers:
    """All trackers of a run. Its methods return at once, but for `close`; call that off the event loop."""

    def __init__(self, settings: TrackingSettings, run: str, facts: Mapping[str, Any], folder: Path) -> None:
        self._path, self._lock = folder / TRACKING_FILE, threading.Lock()
        trackers: dict[str, Tracker] = {}
        if settings.mlflow:
            trackers["mlflow"] = MlflowTracker(settings.mlflow, run, facts)
        if settings.wandb:
            trackers["wandb"] = WandbTracker(settings.wandb, run, facts, folder)
        self._known = read_ids(folder) if trackers else {}
        self._lines = [_Line(name, each, self._known.get(name), self._keep) for name, each in trackers.items()]

    def _keep(self, name: str, id_: str) -> None:
        """Remember an id. Called on the trackers' threads."""
        with self._lock:
            self._known[name] = id_
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._known) + "\n", encoding="utf-8")

    def add(self, round_: int, figures: Figures) -> None:
        """Hand on figures of a round by name."""
        entry = (round_, dict(figures), time.time())
        for line in self._lines:
            line.put(entry)

    def close(self, has_failed: bool = False) -> None:
        """Say that the run is over, or paused, and wait a moment for what is left; nothing the second time."""
        lines, self._lines = self._lines, []
        until = time.monotonic() + LEAVING_S
        for line in lines:
            line.leave(has_failed)
        for line in lines:
            line.join(until)


def read_ids(folder: Path) -> dict[str, str]:
    """Read under which ids trackers have the run of this folder; empty where none has it."""
    try:
        found: dict[str, str] = json.loads((folder / TRACKING_FILE).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


def flat(settings: Any, before: str = "") -> dict[str, Any]:
    """Name the settings of nested tables by their whole names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found
