"""A run's figures as TensorBoard's event files, in the run's folder: tensorboard --logdir DATA/runs.

The Coordinator writes on its compute thread, and closes on another; a lock keeps the two apart. The files are a copy of
what the store has, for people: to lose some of them costs a run nothing, so no error of the disk gets out of here.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

log = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
"""The folder's name."""

FLUSH_S = 5.0
"""What a crash may cost of the curves; the store has all figures."""

RETRY_S = 60.0
"""Between tries to write to a disk that takes nothing."""


class TensorBoardWriter:
    """Writes scalars by round. Its methods are slow: call them off the event loop, from any thread."""

    def __init__(self, folder: Path, first_round: int) -> None:
        """Hide what an earlier service wrote of `first_round` and later ones: those rounds are made again."""
        self._folder, self._first_round = folder, first_round
        self._lock = threading.Lock()
        self._writer: EventsWriter | None = None
        self._flushed_at = 0.0
        self._retry_at = 0.0

    def add(self, round_: int, figures: Mapping[str, float]) -> None:
        """Add figures of a round by name. A disk that takes none costs the curves a part, and never the run."""
        with self._lock:
            if time.monotonic() < self._retry_at:
                return

            try:
                self._write(round_, figures)
            except OSError as error:
                if not self._retry_at:
                    log.warning("%s takes no figures, which is tried again every minute: %s", self._folder, error)
                self._retry_at = time.monotonic() + RETRY_S
                self._drop_writer()
            else:
                self._first_round, self._retry_at = round_ + 1, 0.0

    def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()

    def _write(self, round_: int, figures: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._open()

        for name, value in figures.items():
            self._writer.write_event(Event(wall_time=time.time(), step=round_, summary=scalar(name, value)))
        if time.monotonic() - self._flushed_at >= FLUSH_S:
            self._writer.flush()
            self._flushed_at = time.monotonic()

    def _open(self) -> EventsWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        # The library names files by the second; one that is there would be overwritten.
        writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")

        # To TensorBoard a session's start hides what is there of its step and of later ones.
        start = SessionLog(status=SessionLog.START)
        writer.write_event(Event(wall_time=time.time(), step=self._first_round, session_log=start))
        return writer

    def close(self) -> None:
        """Write what is left; figures that still come go to another file."""
        with self._lock:
            writer, self._writer = self._writer, None
            if writer is None:
                return
            try:
                writer.close()
            except OSError as error:
                log.warning("%s lacks the last figures: %s", self._folder, error)
