"""A run that goes on in a thread of its own, with an event loop of its own: in a notebook the caller's has one already.

What happens in the run is put down under a condition, on which callers wait. Callers lead it by `allow` and `stop`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from hosl.rounds import Evaluation, Round, as_evaluation
from hosl_cloud.runs.progress import Evaluated, Evaluates, Event, RoundDone, Waits
from hosl_protocol.run.tasks import Task

T = TypeVar("T")

say = logging.getLogger("hosl").info
"""What the commands would tell a person; heard where the caller has logging configured so."""


def elsewhere(work: Callable[[], T]) -> T:
    """Do work that blocks in a thread of its own: the store warns of use on a thread with an event loop."""
    done: list[T] = []
    failed: list[BaseException] = []

    def do() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=do, name="hosl", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


class Leader:
    """Leads a run from its beginning to its end, and knows what came of it."""

    def __init__(self, work: Callable[[Leader], str | None], task: Task, *, is_paced: bool) -> None:
        """`work` is called in the thread, with this, and returns how the run ended; where `is_paced`, each round waits
        until it is allowed."""
        self._task = task
        self._work: Callable[[Leader], str | None] | None = work
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._lead, name="hosl run", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._may_go_on: asyncio.Event | None = None
        self._main: asyncio.Task[Any] | None = None
        self._stop: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._is_stopping = False
        self._is_ready = False
        self._allowed = 0 if is_paced else None
        """Rounds that may be made; None for all."""
        self._pending: Round | None = None
        """The last finished round, which may yet be scored."""

        self.run = ""
        """The run's id, as soon as it has one."""
        self.waits = ""
        """Whom the run waits for; empty where it does not."""
        self.rounds: list[Round] = []
        self.evaluations: list[Evaluation] = []
        self.ending: str | None = None
        self.error: BaseException | None = None
        self.is_over = False

    def start(self) -> None:
        """Begin, and wait until everything is loaded. Raises what is wrong."""
        self._thread.start()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._is_ready or self.is_over)
        except BaseException:  # Ctrl-C
            self.stop()
            raise
        self.check()

    def check(self) -> None:
        """Raise what ended the run, if that was an error."""
        if self.error is not None:
            raise self.error

    def next_round(self, place: int) -> Round | None:
        """Wait for the round at a place of `rounds`, and let it be made; None where none comes. Raises as `check`."""
        self.allow(place + 1)
        with self._changed:
            self._changed.wait_for(lambda: len(self.rounds) > place or self.is_over)
            if len(self.rounds) > place:
                return self.rounds[place]
        self.wait()
        self.check()
        return None

    def allow(self, rounds: int | None) -> None:
        """Let so many rounds be made, of all; None for all there are."""
        if self._allowed is None or (rounds is not None and rounds <= self._allowed):
            return
        self._allowed = rounds
        self._call(self._go_on)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the end."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_over, timeout_s)
        if self.is_over:
            self._thread.join()

    def stop(self, timeout_s: float | None = None) -> None:
        """End the run after the round under way, and wait for its end, which a second Ctrl-C breaks off."""
        self._is_stopping = True
        self._call(self._begin_to_stop)
        if threading.current_thread() is not self._thread:  # in which the collector may find that nobody holds the run
            self.wait(timeout_s)

    def _call(self, work: Callable[[], None]) -> None:
        with self._changed:  # the loop is not closed before `is_over` says so, under the same lock
            if self._loop is not None and not self.is_over:
                self._loop.call_soon_threadsafe(work)

    # All below in the thread of the run.

    def _lead(self) -> None:
        ending: str | None = None
        error: BaseException | None = None
        assert self._work is not None
        try:
            ending = self._work(self)
        except asyncio.CancelledError as raised:
            ending, error = ("stopped", None) if self._is_stopping else (None, raised)
        except BaseException as raised:
            error = raised
        with self._changed:
            self._publish()
            self.ending, self.error, self.is_over, self.waits = ending, error, True, ""
            # They lead back here through all of the run: nothing of it is to stay in memory.
            self._work = self._stop = self._main = None
            self._changed.notify_all()

    def run_loop(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run an event loop to the end of `main`; from here on callers are heard."""

        async def lead() -> T:
            self._may_go_on = asyncio.Event()
            with self._changed:
                self._loop = asyncio.get_running_loop()
            try:
                self._main = asyncio.current_task()
                if self._is_stopping:
                    raise asyncio.CancelledError
                return await main()
            finally:
                with self._changed:
                    self._loop = None

        return asyncio.run(lead())

    def ready(self, stop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Tell who waits in `start` that everything is loaded; `stop` ends the run in order."""
        self._stop = stop
        with self._changed:
            self._is_ready = True
            self._changed.notify_all()

    def hear(self, event: Event) -> None:
        """Take note of what happens in the run; a listener of hosl_cloud/runs/progress.py."""
        if event.run != self.run:  # another one of the same service
            return
        with self._changed:
            if isinstance(event, RoundDone):
                self._publish()
                self._pending = Round(
                    number=event.round,
                    of=event.rounds,
                    loss=event.loss,
                    seconds=event.seconds,
                    bytes=event.wire_bytes,
                    devices=event.devices,
                )
            elif isinstance(event, Evaluated):
                self._score(as_evaluation(event.evaluation, self._task))
            elif not isinstance(event, Evaluates):
                self._publish()
            self.waits = f"{event.ready} of {event.needed} devices are there" if isinstance(event, Waits) else ""
            self._changed.notify_all()

    async def pace(self) -> None:
        """Hold the next round until it is allowed."""
        assert self._may_go_on is not None
        with self._changed:
            self._publish()
            self._changed.notify_all()
        while not self._is_stopping and self._allowed is not None and len(self.rounds) >= self._allowed:
            self._may_go_on.clear()
            await self._may_go_on.wait()

    def _publish(self) -> None:
        """Let callers have the last round, which is not scored any more."""
        if self._pending is not None:
            self.rounds.append(self._pending)
            self._pending = None

    def _score(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)
        if self._pending is not None and self._pending.number == evaluation.round:
            self._pending = replace(self._pending, evaluation=evaluation)
        elif self.rounds and self.rounds[-1].number == evaluation.round:
            # The devices whose data it needed were away, and the round was shown meanwhile.
            self.rounds[-1] = replace(self.rounds[-1], evaluation=evaluation)

    def _go_on(self) -> None:
        assert self._may_go_on is not None
        self._may_go_on.set()

    def _begin_to_stop(self) -> None:
        self._go_on()
        if self._stop is not None:
            self._stopping = asyncio.create_task(self._stop())
        elif self._main is not None:
            self._main.cancel()
