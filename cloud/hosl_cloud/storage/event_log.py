"""What is said about runs, on its way to the store: written in the order in which it was said, by one thread.

`add` is called from any thread, the event loop's too: nobody who says something waits for the disk. The list of what
waits is guarded by a lock, which no one holds during a write.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from hosl_cloud.exceptions import StoreError
from hosl_cloud.storage.records import NewEvent
from hosl_cloud.storage.store import Store

log = logging.getLogger(__name__)

MOST_WAITING = 1000
"""Sentences that wait in memory while the store takes none; the oldest go first, those about a run's end last."""


class EventLog:
    """Writes sentences from one thread, all that waits in one transaction.

    What a full disk does not take waits for the next try, which is made when more is said, and at the end.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._waiting: list[NewEvent] = []
        self._writer = ThreadPoolExecutor(1, "events")
        self._is_closed = False

    def add(self, event: NewEvent) -> None:
        """Write a sentence soon."""
        with self._lock:
            self._waiting.append(event)
            if not self._is_closed:  # under the lock: an executor that is shut down takes no work
                self._writer.submit(self._write)

    def flush(self) -> None:
        """Wait until all that was said before is written, or was tried: slow, off the event loop."""
        with self._lock:
            done = None if self._is_closed else self._writer.submit(self._write)
        if done is not None:
            done.result()

    def close(self) -> None:
        """Write what is left, and end the thread: slow, off the event loop."""
        self.flush()
        with self._lock:
            self._is_closed = True
        self._writer.shutdown()

    def _write(self) -> None:
        with self._lock:
            events, self._waiting = self._waiting, []
        if not events:
            return

        try:
            self._store.add_events(events)
        except StoreError as error:
            log.info("%d sentences of the log wait: %s", len(events), error)
            with self._lock:
                self._waiting = _newest([*events, *self._waiting])


def _newest(events: list[NewEvent]) -> list[NewEvent]:
    """Keep at most as many as may wait, in their order."""
    surplus = len(events) - MOST_WAITING
    if surplus <= 0:
        return events

    dropped = set(sorted(range(len(events)), key=lambda place: (events[place].is_ending, place))[:surplus])
    return [event for place, event in enumerate(events) if place not in dropped]
