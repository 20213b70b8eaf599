"""What systemd is told over NOTIFY_SOCKET: ready, what goes on, and that it does go on.

The pool counts its work from any thread, under a lock; the watchdog's feeder reads it on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from hosl_protocol.program.notify import feed_watchdog, notify

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class WatchedPool(ThreadPoolExecutor):
    """Threads for the agent's work, which tell for how long nothing has come of it."""

    def __init__(self) -> None:
        super().__init__(thread_name_prefix="work")
        self._lock = threading.Lock()
        self._running = 0
        self._moved_at = 0.0

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Submit as to any executor; counted until its future is done."""
        self._count(1)
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(lambda _: self._count(-1))
        return future

    def tick(self) -> None:
        """Note that work goes on: a piece of a download has come."""
        self._moved_at = time.monotonic()

    def stalled_s(self) -> float:
        """Count the seconds since work began, ended or ticked; 0 where none is running."""
        return time.monotonic() - self._moved_at if self._running else 0.0

    def _count(self, change: int) -> None:
        with self._lock:
            self._running += change
            self.tick()


@contextlib.asynccontextmanager
async def notified(pool: WatchedPool | None, stall_timeout_s: float) -> AsyncIterator[None]:
    """Work in the threads of `pool`, within, and tell systemd: READY=1, and WATCHDOG=1 while its work goes on.

    The watchdog starves where this event loop stands still, or nothing has come of the pool's work for
    `stall_timeout_s` seconds. Without a pool nobody is told, and the event loop's own threads stay.
    """
    if pool is None:
        yield
        return

    asyncio.get_running_loop().set_default_executor(pool)
    notify("READY=1")
    feeding = asyncio.create_task(feed_watchdog(partial(_is_well, pool, stall_timeout_s)))
    try:
        yield
    finally:
        feeding.cancel()
        notify("STOPPING=1")


def _is_well(pool: WatchedPool, stall_timeout_s: float) -> bool:
    is_well = pool.stalled_s() < stall_timeout_s
    if not is_well:
        log.error("a piece of work takes longer than stall_timeout_s; the watchdog is left to starve")
    return is_well
