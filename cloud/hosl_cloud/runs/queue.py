"""The service's runs: of each bundle one trains at a time, while the others wait in line.

The line itself is in the store: unfinished runs, in the order in which they were queued. What is here is what this
process does about it: the current run of each bundle, each with a task of its own that loads and trains it.

All runs on the event loop but for `create`, `say` and `troubles`; the store is asked on other threads. Two things keep
two tasks from deciding about one run at once. `_deciding` is held from the look at a run's stored state to its change.
`_halting` names the runs whose task is cut off but whose state does not say so yet: `work` would begin them again.
Whatever may let another run begin sets `_changed`, which wakes `work`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from hosl_cloud.exceptions import ApiError, StoreError, is_disk_full
from hosl_cloud.runs.coordinator import Coordinator, MakeTail
from hosl_cloud.runs.current_run import CurrentRun, CurrentRuns
from hosl_cloud.runs.progress import Listener
from hosl_cloud.runs.resume import load_run
from hosl_cloud.runs.retry_schedule import RetrySchedule
from hosl_cloud.runs.run import Ending, Paused
from hosl_cloud.runs.run_status import QueueState
from hosl_cloud.sentences import in_line
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.data_folder import hint, new_run_id, run_folder
from hosl_cloud.storage.disk_space import DISK_PAUSE_S
from hosl_cloud.storage.event_log import EventLog
from hosl_cloud.storage.records import UNENDED, BegunBy, NewEvent, RunRow
from hosl_cloud.storage.run_names import short_name
from hosl_cloud.storage.store import Store
from hosl_cloud.tail.checkpoint import list_checkpoints
from hosl_cloud.tail.trainer import TailTrainer
from hosl_protocol.exceptions import HoslError
from hosl_protocol.program.logs import is_json, log_scope
from hosl_protocol.program.waiting import within
from hosl_protocol.run.manifest import load_manifest
from hosl_protocol.wire.messages import Complete, Hello, Refusal

log = logging.getLogger(__name__)

GOODBYE_S = 5.0
"""Longest wait for devices to hang up at the end of a run."""

Say = Callable[[str], None]


class RunQueue:
    """Begins, stops and resumes runs. Raises ApiError for what cannot be done in a run's present state."""

    def __init__(self, store: Store, data_dir: Path, say: Say, make_tail: MakeTail = TailTrainer) -> None:
        """`say` tells a person how it goes."""
        self.store, self.data_dir, self._make_tail = store, data_dir, make_tail
        self.events = EventLog(store)
        self.retries = RetrySchedule()
        self.current = CurrentRuns()
        self.listeners: list[Listener] = []
        """Who follows all runs that are loaded from now on."""
        self._tell = say
        self.serve_again = hint("serve", data_dir)
        """The command that starts this service, for who goes on with a run after it has left."""

        self._failed_to_load: set[str] = set()
        """Runs that stay as they are until they are resumed by hand, or the service starts again."""
        self._halting: set[str] = set()
        """Runs whose work is cut off, and whose state does not say so yet: none of them is to begin again."""
        self._told_in_line: set[str] = set()
        """Runs whose log says already behind which run they wait."""
        self._deciding = asyncio.Lock()
        """Held while a run's stored state is looked at and changed: what is decided by it must still be so."""
        self._changed = asyncio.Event()
        self._is_draining = False

    def folder(self, run: str) -> Path:
        """Where a run's checkpoints are."""
        return run_folder(self.data_dir, run)

    def say(self, sentence: str, run: str = "", level: str = "info", *, is_ending: bool = False) -> None:
        """Tell a person, and the run's log, which keeps longest what `is_ending`. From any thread; nothing waits."""
        is_one_of_many = len(self.current.under_way()) > 1
        is_result = is_ending or level != "info"
        with log_scope(is_result=is_result, **{"run": run} if run else {}):
            # A line of JSON names its run anyway.
            self._tell(f"{run}: {sentence}" if is_one_of_many and run not in sentence and not is_json() else sentence)
        if run:
            self.events.add(NewEvent(run, time.time(), level, sentence, is_ending))

    def create(self, bundle: Path, config: RunConfig, begun_by: BegunBy = "start") -> str:
        """Store a new run; its id. Raises BundleError. Slow, off the event loop."""
        bundle = bundle.resolve()
        id_ = new_run_id(config.name, self.store)
        self.store.create_run(id_, bundle, load_manifest(bundle).shard_digest, config, begun_by)
        return id_

    async def submit(self, bundle: Path, config: RunConfig) -> str:
        """Put a new run in line; its id. Raises BundleError."""
        async with self._deciding:
            id_ = await asyncio.to_thread(self.create, bundle, config)
        self._changed.set()
        return id_

    async def open(self, run: str) -> Coordinator:
        """Load a run now, so that it begins with the service. Raises what is wrong with it."""
        current = await self._take_place(await asyncio.to_thread(self.store.run, run))
        try:
            return await self._load(current)
        except Exception as error:
            await self._fail_to_load(run, error)
            raise

    def adopt(self, coordinator: Coordinator) -> None:
        """Take a coordinator that is loaded already."""
        run = coordinator.run
        self.current.put(run.manifest.shard_digest, CurrentRun(run.id, run.bundle, run.manifest, coordinator))

    async def work(self) -> None:
        """Train what is loaded, and then what waits, for ever."""
        while True:
            # Cleared before the look: what changes meanwhile makes another one.
            self._changed.clear()
            for current in self.current.all():
                if current.task is None:
                    self._start(current)

            async with self._deciding:
                for run in [] if self._is_draining else await asyncio.to_thread(self.store.unfinished_runs):
                    await self._begin_or_wait(run)
            await self._changed.wait()

    async def _begin_or_wait(self, run: str) -> None:
        row = await asyncio.to_thread(self.store.run, run)
        if run in self._failed_to_load | self._halting:
            return

        current = self.current.of_shard(row.shard_digest)
        if current is not None and not current.is_over:
            if run not in self._told_in_line | {current.run}:
                self._told_in_line.add(run)
                self.say(f"run {run} is {in_line([current.run])}", run)
            return

        try:
            self._start(await self._take_place(row))
        except HoslError as error:
            await self._fail_to_load(run, error)

    async def _take_place(self, row: RunRow) -> CurrentRun:
        """Make a run its bundle's current one. Raises BundleError, ForeignSettings."""
        row.settings.config(row.id)
        manifest = await asyncio.to_thread(load_manifest, row.bundle)
        # Kept until now, though it is over: late devices of it were still told how it ended.
        former = self.current.of_shard(row.shard_digest)
        if former is not None:
            self._retire(former)
        current = CurrentRun(row.id, row.bundle, manifest)
        self.current.put(row.shard_digest, current)
        return current

    def _start(self, current: CurrentRun) -> None:
        current.task = asyncio.create_task(self._train(current), name=current.run)
        current.task.add_done_callback(lambda _: self._changed.set())

    async def _train(self, current: CurrentRun) -> Ending | Paused:
        """Load a run where it is not loaded yet, and train it to its end: the life of its task."""
        with log_scope(run=current.run):
            if current.coordinator is None:
                try:
                    await self._load(current)
                except Exception as error:
                    await self._fail_to_load(current.run, error)
                    raise
            coordinator = current.coordinator
            assert coordinator is not None

            try:
                ending = await coordinator.train()
            except Exception as error:
                with contextlib.suppress(Exception):  # what ended the run is to be heard of
                    await within(2 * DISK_PAUSE_S, coordinator.end("failed"))
                await self._fail(current.run, error)
                await self._tell_next(current.run, "failed")
                raise
            sentence = f"run {current.run} {ending} at round {coordinator.run.round}"
            self.say(sentence, current.run, is_ending=True)
            await self._tell_next(current.run, ending)
            return ending

    async def _load(self, current: CurrentRun) -> Coordinator:
        def say(sentence: str) -> None:
            self.say(sentence, current.run)

        folder = self.folder(current.run)
        current.coordinator = await load_run(current, self.store, folder, say, self._make_tail, self.listeners)
        return current.coordinator

    async def _fail_to_load(self, run: str, error: Exception) -> None:
        """Fail a run that never began, and pause another: it may go on once what is wrong with it has been mended."""
        self._failed_to_load.add(run)
        row = await asyncio.to_thread(self.store.run, run)
        await self._fail(run, error, "paused" if row.round else "failed")

    async def _fail(self, run: str, error: Exception, state: str = "failed") -> None:
        log.info("run %s", run, exc_info=error)
        self.say(f"run {run} {state}: {error}", run, "error", is_ending=True)
        try:
            await asyncio.to_thread(self.store.set_state, run, state, f"{error}")
        except HoslError:
            self._failed_to_load.add(run)  # else it would begin again at once: the store does not know better

    async def _tell_next(self, run: str, ending: Ending | Paused) -> None:
        """Say what can be done with a run that is over."""
        checkpoints = await asyncio.to_thread(list_checkpoints, self.folder(run))
        name = short_name(run, await asyncio.to_thread(self.store.run_ids))
        if ending != "paused" and checkpoints:
            self.say(f"take it with: {hint(f'merge {name} --out trained', self.data_dir)}", run, is_ending=True)
        elif ending != "paused":
            self.say(f"run {run} has no checkpoint, so that there is nothing to merge", run, is_ending=True)
        if ending in ("stopped", "failed"):
            then = f" && {self.serve_again}" if self._is_draining else ""
            go_on = f"{hint(f'run resume {name}', self.data_dir)}{then}"
            self.say(f"go on with it: {go_on}; devices without --stay have to be started, too", run, is_ending=True)

    def state(self) -> QueueState:
        """Whose turn it is now."""
        return QueueState(self.current.by_shard(), frozenset(self._failed_to_load))

    async def route(self, hello: Hello) -> Coordinator | Refusal | Complete:
        """Find where a device belongs that says this, or what it is told instead."""
        is_known = hello.run is not None and self.current.of_shard(hello.shard_digest) is None
        row = await asyncio.to_thread(self.store.find_run, f"{hello.run}") if is_known else None

        # Looked up again: its bundle's run may have begun during the await.
        current = self.current.of_shard(hello.shard_digest)
        if current is not None and current.coordinator is not None:
            return current.coordinator
        if current is not None:
            return Refusal(code="run", reason=f"run {current.run} is being loaded", retry=True)
        if row is not None and row.state not in UNENDED:
            return Complete(run=row.id, reason=row.state, round=row.round)  # type: ignore[arg-type]
        if self.current.under_way():
            return Refusal(code="shard", reason="another shard; fetch this service's shard again", retry=False)
        return Refusal(code="run", reason="there is no run at present", retry=True)

    async def stop(self, run: str) -> None:
        """End a run after the round under way; it can be resumed."""
        async with self._deciding:
            # The current run before the row: of one that ends meanwhile the row then says so.
            current, row = self.current.of_run(run), await asyncio.to_thread(self.store.run, run)
            if row.state not in UNENDED:
                raise ApiError(409, f"run {run} is {row.state}: there is nothing to stop")
            if current is None or current.is_over:
                await asyncio.to_thread(self.store.set_state, run, "stopped")
                self.say(f"run {run} stopped before it had its turn", run, is_ending=True)
                return
        await self._halt(current, 2 * row.config.devices.round_deadline_s, pause=False)

    async def resume(self, run: str) -> None:
        """Put a stopped, paused or failed run in line again."""
        async with self._deciding:
            current, row = self.current.of_run(run), await asyncio.to_thread(self.store.run, run)
            row.settings.config(run)
            is_active = current is not None and not current.is_over
            if row.state == "completed" or is_active or (row.state == "pending" and run not in self._failed_to_load):
                raise ApiError(409, f"run {run} is {row.state}: only one that is stopped, paused or failed goes on")

            await asyncio.to_thread(self.store.queue_run, run)
            self._failed_to_load.discard(run)
            self._told_in_line.discard(run)
        self._changed.set()

    async def remove(self, run: str) -> None:
        """Delete a run with its checkpoints."""
        async with self._deciding:
            current, row = self.current.of_run(run), await asyncio.to_thread(self.store.run, run)
            if row.state in UNENDED:
                raise ApiError(409, f"run {run} is {row.state}: stop it first")
            if current is not None:
                self._retire(current)

            # The files first: on a full disk the database takes nothing before there is room.
            await asyncio.to_thread(shutil.rmtree, self.folder(run), ignore_errors=True)
            await asyncio.to_thread(self.store.remove_run, run)
        self.say(f"run {run} is removed")

    async def drain(self, limit_s: float | None, stops: str | None = None) -> None:
        """Pause all runs, so that a later service goes on with them, but for one that is to end.

        Each may end the round under way, for `limit_s` at most, or by default for two of its stages' deadlines.
        """
        self._is_draining = True
        begun = [current for current in self.current.under_way() if current.task is not None]
        await asyncio.gather(*(self._halt(current, limit_s, pause=current.run != stops) for current in begun))

    async def wait(self, run: str) -> None:
        """Wait until a run is over."""
        while (current := self.current.of_run(run)) is None or current.task is None:
            await asyncio.sleep(0.01)
        await asyncio.wait({current.task})

    async def outcome(self, run: str | None) -> Ending | Paused | None:
        """Tell how a run ended that was a current one here; None for no run. Raises what ended it."""
        current = self.current.of_run(run) if run is not None else None
        if current is None or current.task is None:
            return None
        if current.task.cancelled():
            row = await asyncio.to_thread(self.store.run, current.run)
            return "stopped" if row.state == "stopped" else "paused"
        return current.task.result()

    def troubles(self) -> list[str]:
        """Say why the service cannot do all of its work now. Slow, off the event loop."""
        found = [f"run {run} cannot be loaded" for run in sorted(self._failed_to_load)]
        found += ["the service is leaving"] if self._is_draining else []
        try:
            self.store.states()
        except HoslError as error:
            found.append(str(error))
        return found + [
            f"run {each.run} waits for room on the disk" for each in self.current.all() if each.is_without_room
        ]

    async def _halt(self, current: CurrentRun, limit_s: float | None, *, pause: bool) -> None:
        self._halting.add(current.run)  # no await before it: nobody may begin the run again
        try:
            if await self._is_cut_off(current, limit_s, pause=pause):
                await self._end_cut_off(current, pause=pause)
                state = "paused" if pause else "stopped"
                self.say(f"run {current.run} {state}: its round was cut off", current.run, is_ending=True)
                await self._tell_next(current.run, "paused" if pause else "stopped")
        finally:
            self._halting.discard(current.run)
            self._changed.set()

    async def _is_cut_off(self, current: CurrentRun, limit_s: float | None, *, pause: bool) -> bool:
        """Let a run end its round within the limit, and cancel it after; whether it had to be."""
        coordinator, task = current.coordinator, current.task
        assert task is not None
        if coordinator is not None:
            await coordinator.request_stop(pause=pause)
            most_s = 2 * coordinator.run.config.devices.round_deadline_s if limit_s is None else limit_s
            # One that waits for room is given another try.
            await asyncio.wait({task}, timeout=min(most_s, 2 * DISK_PAUSE_S) if current.is_without_room else most_s)
        task.cancel()  # nothing where it is done
        await asyncio.wait({task})
        return task.cancelled()

    async def _end_cut_off(self, current: CurrentRun, *, pause: bool) -> None:
        """Tell the devices and the store of a run whose work was cut off. A full disk does not hold the service up."""
        coordinator = current.coordinator
        try:
            if coordinator is None:
                await asyncio.to_thread(self.store.set_state, current.run, "paused" if pause else "stopped")
            else:
                ending = coordinator.pause() if pause else coordinator.end("stopped")
                await within(2 * DISK_PAUSE_S, ending)
        except (StoreError, asyncio.TimeoutError) as error:
            if isinstance(error, StoreError) and not is_disk_full(error):
                raise

            # Its stored state still says running: `work` would begin it again in this service.
            self._failed_to_load.add(current.run)
            sentence = f"run {current.run} goes on with the next service, for the full disk takes no word of its end"
            self.say(sentence, current.run)

    def _retire(self, current: CurrentRun) -> None:
        """Free what a run took; devices that are still there come back."""
        self.current.remove(current)
        if current.coordinator is None:
            return
        for peer in list(current.coordinator.fleet.peers.values()):
            peer.end(Refusal(code="run", reason=f"run {current.run} is over", retry=True))
        current.coordinator.close()

    async def close(self) -> None:
        """Let devices take their last message, and free everything."""
        coordinators = [each.coordinator for each in self.current.all() if each.coordinator is not None]
        peers = [peer for each in coordinators for peer in each.fleet.peers.values()]
        waits = [asyncio.create_task(peer.gone.wait()) for peer in peers]
        if waits:
            _, late = await asyncio.wait(waits, timeout=GOODBYE_S)
            for task in late:
                task.cancel()

        # Reports that came until now are part of the runs' records.
        for coordinator in coordinators:
            await coordinator.admission.flush()
            coordinator.close()
