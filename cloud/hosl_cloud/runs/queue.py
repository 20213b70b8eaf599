"""The service's runs: of each bundle one at a time, while the others wait in line."""

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
from hosl_cloud.runs.event_log import EventLog
from hosl_cloud.runs.resume import cut
from hosl_cloud.runs.returning import Returning
from hosl_cloud.runs.run import Ending, Paused, Run
from hosl_cloud.runs.run_status import Turns
from hosl_cloud.runs.slot import Slot, course_of
from hosl_cloud.sentences import in_line
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.data_folder import hint, new_run_id, run_folder
from hosl_cloud.storage.disk_space import DISK_PAUSE_S, when_there_is_room
from hosl_cloud.storage.records import UNENDED, BegunBy, RunRow, Said
from hosl_cloud.storage.store import Store
from hosl_cloud.tail.checkpoint import list_checkpoints
from hosl_cloud.tail.trainer import TailTrainer
from hosl_protocol.exceptions import HoslError
from hosl_protocol.program.logs import is_json, log_scope
from hosl_protocol.program.waiting import within
from hosl_protocol.run.manifest import check_files, load_manifest
from hosl_protocol.wire.messages import Complete, Hello, Refusal

log = logging.getLogger(__name__)

GOODBYE_S = 5.0
"""Longest wait for devices to hang up at the end of a run."""

Say = Callable[[str], None]


class Runs:
    """Begins, stops and resumes runs. Its methods run on the event loop but for `create` and `say`; the store is asked
    on other threads.

    Raises ApiError for what cannot be done in a run's present state.
    """

    def __init__(self, store: Store, data_dir: Path, say: Say, make_tail: MakeTail = TailTrainer) -> None:
        """`say` tells a person how it goes."""
        self.store, self.data_dir, self._make_tail = store, data_dir, make_tail
        self.events = EventLog(store)
        self.returning = Returning()
        self._tell = say
        self._slots: dict[str, Slot] = {}
        """By the shard's digest."""
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
        is_one_of_many = sum(not slot.is_over for slot in self.slots()) > 1
        with log_scope(**{"run": run} if run else {}):
            # A line of JSON names its run anyway.
            self._tell(f"{run}: {sentence}" if is_one_of_many and run not in sentence and not is_json() else sentence)
        if run:
            self.events.add(Said(run, time.time(), level, sentence, is_ending))

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
        slot = await self._reserve(await asyncio.to_thread(self.store.run, run))
        try:
            await self._load(slot)
        except Exception as error:
            await self._fail_to_load(run, error)
            raise
        assert slot.coordinator is not None
        return slot.coordinator

    def adopt(self, coordinator: Coordinator) -> None:
        """Take a coordinator that is loaded already."""
        run = coordinator.run
        self._slots[run.manifest.shard_digest] = Slot(run.id, run.bundle, run.manifest, coordinator)

    async def work(self) -> None:
        """Train what is loaded, and then what waits, for ever."""
        while True:
            self._changed.clear()
            for slot in self._slots.values():
                if slot.task is None:
                    self._start(slot)
            async with self._deciding:
                for run in [] if self._is_draining else await asyncio.to_thread(self.store.unfinished_runs):
                    await self._begin_or_wait(run)
            await self._changed.wait()

    async def _begin_or_wait(self, run: str) -> None:
        row = await asyncio.to_thread(self.store.run, run)
        if run in self._failed_to_load | self._halting:
            return
        slot = self._slots.get(row.shard_digest)
        if slot is not None and not slot.is_over:
            if run not in self._told_in_line | {slot.run}:
                self._told_in_line.add(run)
                self.say(f"run {run} is {in_line([slot.run])}", run)
            return
        try:
            self._start(await self._reserve(row))
        except HoslError as error:
            await self._fail_to_load(run, error)

    async def _reserve(self, row: RunRow) -> Slot:
        """The bundle's place, for this run. Raises BundleError, ForeignSettings."""
        row.settings.config(row.id)
        manifest = await asyncio.to_thread(load_manifest, row.bundle)
        former = self._slots.get(row.shard_digest)
        if former is not None:
            self._retire(former)
        slot = self._slots[row.shard_digest] = Slot(row.id, row.bundle, manifest)
        return slot

    def _start(self, slot: Slot) -> None:
        slot.task = asyncio.create_task(self._course(slot), name=slot.run)
        slot.task.add_done_callback(lambda _: self._changed.set())

    async def _course(self, slot: Slot) -> Ending | Paused:
        with log_scope(run=slot.run):
            return await self._lead(slot)

    async def _lead(self, slot: Slot) -> Ending | Paused:
        if slot.coordinator is None:
            try:
                await self._load(slot)
            except Exception as error:
                await self._fail_to_load(slot.run, error)
                raise
        coordinator = slot.coordinator
        assert coordinator is not None
        try:
            ending = await coordinator.train()
        except Exception as error:
            with contextlib.suppress(Exception):
                await within(2 * DISK_PAUSE_S, coordinator.end("failed"))
            await self._fail(slot.run, error)
            await self._tell_next(slot.run, "failed")
            raise
        self.say(f"run {slot.run} {ending} at round {coordinator.run.round}", slot.run, is_ending=True)
        await self._tell_next(slot.run, ending)
        return ending

    async def _load(self, slot: Slot) -> None:
        await asyncio.to_thread(check_files, slot.bundle, slot.manifest)
        row = await asyncio.to_thread(self.store.run, slot.run)

        def say(sentence: str) -> None:
            self.say(sentence, row.id)

        def notice(is_waiting: bool) -> None:
            slot.is_waiting_for_room = is_waiting

        found = await when_there_is_room(
            lambda: asyncio.to_thread(cut, self.store, row, self.folder(row.id), say), say, notice
        )
        if row.state != "pending" or row.round:
            again = f"; {found.dropped} rounds after it are made again" if found.dropped else ""
            say(f"run {row.id} resumes after round {found.round}{again}")
        run = Run(
            row.id,
            row.config,
            slot.manifest,
            slot.bundle,
            self.folder(row.id),
            self.store,
            epoch=found.epoch,
            round=found.round,
        )
        coordinator = Coordinator(run, say, make_tail=self._make_tail)
        try:
            await coordinator.prepare(None if found.checkpoint is None else found.checkpoint.path)
        except BaseException:
            coordinator.close()
            raise
        say(f"run {row.id}: {course_of(run)}")
        slot.coordinator = coordinator

    async def _fail_to_load(self, run: str, error: Exception) -> None:
        """One that never began is not to go on; another may once what is wrong with it has been mended."""
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
        if ending != "paused" and checkpoints:
            self.say(f"take it with: {hint(f'merge {run} --out DIR', self.data_dir)}", run, is_ending=True)
        if ending in ("stopped", "failed"):
            first = f"start {hint('serve', self.data_dir)}, and then " if self._is_draining else ""
            self.say(f"go on with it: {first}{hint(f'run resume {run}', self.data_dir)}", run, is_ending=True)

    def slot_of(self, run: str) -> Slot | None:
        """Where a run takes place, or took place last; None for one that waits, or is history."""
        return next((slot for slot in self._slots.values() if slot.run == run), None)

    def slots(self) -> list[Slot]:
        """What takes place, or took place last, in the order in which it began."""
        return list(self._slots.values())

    def turns(self) -> Turns:
        """Whose turn it is now."""
        under_way = {shard: slot.run for shard, slot in self._slots.items() if not slot.is_over}
        return Turns(under_way, frozenset(self._failed_to_load))

    def current(self, bundle: str = "") -> Slot | None:
        """Whose shard a device is given: that of the oldest run under way, or else of the last one.

        A device that is kept to a bundle's runs is given no other.
        """
        slots = [slot for slot in self.slots() if bundle in ("", slot.bundle.name)]
        return next((slot for slot in slots if not slot.is_over), slots[-1] if slots else None)

    async def route(self, hello: Hello) -> Coordinator | Refusal | Complete:
        """Where a device belongs that says this, or what it is told instead."""
        is_known = hello.run is not None and hello.shard_digest not in self._slots
        row = await asyncio.to_thread(self.store.find_run, f"{hello.run}") if is_known else None
        slot = self._slots.get(hello.shard_digest)
        if slot is not None and slot.coordinator is not None:
            return slot.coordinator
        if slot is not None:
            return Refusal(code="run", reason=f"run {slot.run} is being loaded", retry=True)
        if row is not None and row.state not in UNENDED:
            return Complete(run=row.id, reason=row.state, round=row.round)  # type: ignore[arg-type]
        if any(not slot.is_over for slot in self.slots()):
            return Refusal(code="shard", reason="another shard; fetch this service's shard again", retry=False)
        return Refusal(code="run", reason="there is no run at present", retry=True)

    async def stop(self, run: str) -> None:
        """End a run after the round under way; it can be resumed."""
        # The slot before the row: of a run that ends meanwhile the row then says so.
        async with self._deciding:
            slot, row = self.slot_of(run), await asyncio.to_thread(self.store.run, run)
            if row.state not in UNENDED:
                raise ApiError(409, f"run {run} is {row.state}: there is nothing to stop")
            if slot is None or slot.is_over:
                await asyncio.to_thread(self.store.set_state, run, "stopped")
                self.say(f"run {run} stopped before it had its turn", run, is_ending=True)
                return
        await self._halt(slot, 2 * row.config.devices.round_deadline_s, pause=False)

    async def resume(self, run: str) -> None:
        """Put a stopped, paused or failed run in line again."""
        async with self._deciding:
            slot, row = self.slot_of(run), await asyncio.to_thread(self.store.run, run)
            row.settings.config(run)
            is_active = slot is not None and not slot.is_over
            if row.state == "completed" or is_active or (row.state == "pending" and run not in self._failed_to_load):
                raise ApiError(409, f"run {run} is {row.state}: only one that is stopped, paused or failed goes on")
            await asyncio.to_thread(self.store.queue_run, run)
            self._failed_to_load.discard(run)
            self._told_in_line.discard(run)
        self._changed.set()

    async def remove(self, run: str) -> None:
        """Delete a run with its checkpoints."""
        async with self._deciding:
            slot, row = self.slot_of(run), await asyncio.to_thread(self.store.run, run)
            if row.state in UNENDED:
                raise ApiError(409, f"run {run} is {row.state}: stop it first")
            if slot is not None:
                self._retire(slot)
            # The files first: on a full disk the database takes nothing before there is room.
            await asyncio.to_thread(shutil.rmtree, self.folder(run), ignore_errors=True)
            await asyncio.to_thread(self.store.remove_run, run)
        self.say(f"run {run} is removed")

    async def drain(self, limit_s: float | None, stops: str | None = None) -> None:
        """Pause all runs, so that a later service goes on with them, but for one that is to end.

        Each may end the round under way, for `limit_s` at most, or by default for two of its stages' deadlines.
        """
        self._is_draining = True
        slots = [slot for slot in self.slots() if slot.task is not None and not slot.is_over]
        await asyncio.gather(*(self._halt(slot, limit_s, pause=slot.run != stops) for slot in slots))

    async def wait(self, run: str) -> None:
        """Wait until a run is over."""
        while (slot := self.slot_of(run)) is None or slot.task is None:
            await asyncio.sleep(0.01)
        await asyncio.wait({slot.task})

    async def outcome(self, run: str | None) -> Ending | Paused | None:
        """How a run ended that took place here; None for no run. Raises what ended it."""
        slot = self.slot_of(run) if run is not None else None
        if slot is None or slot.task is None:
            return None
        if slot.task.cancelled():
            return "stopped" if (await asyncio.to_thread(self.store.run, slot.run)).state == "stopped" else "paused"
        return slot.task.result()

    def troubles(self) -> list[str]:
        """Why the service cannot do all of its work now."""
        found = [f"run {run} cannot be loaded" for run in sorted(self._failed_to_load)]
        found += ["the service is leaving"] if self._is_draining else []
        try:
            self.store.states()
        except HoslError as error:
            found.append(str(error))
        return found + [f"run {slot.run} waits for room on the disk" for slot in self.slots() if slot.is_without_room]

    async def _halt(self, slot: Slot, limit_s: float | None, *, pause: bool) -> None:
        self._halting.add(slot.run)  # no await before it: nobody may begin the run again
        try:
            await self._cut_off(slot, limit_s, pause=pause)
        finally:
            self._halting.discard(slot.run)
            self._changed.set()

    async def _cut_off(self, slot: Slot, limit_s: float | None, *, pause: bool) -> None:
        coordinator, task = slot.coordinator, slot.task
        assert task is not None
        if coordinator is not None:
            await coordinator.request_stop(pause=pause)
            most_s = 2 * coordinator.run.config.devices.round_deadline_s if limit_s is None else limit_s
            # One that waits for room is given another try.
            await asyncio.wait({task}, timeout=min(most_s, 2 * DISK_PAUSE_S) if slot.is_without_room else most_s)
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            return
        await self._end_cut_off(slot, pause=pause)
        self.say(f"run {slot.run} {'paused' if pause else 'stopped'}: its round was cut off", slot.run, is_ending=True)
        await self._tell_next(slot.run, "paused" if pause else "stopped")

    async def _end_cut_off(self, slot: Slot, *, pause: bool) -> None:
        """Tell the devices and the store of a run whose work was cut off. A full disk does not hold the service up."""
        coordinator = slot.coordinator
        try:
            if coordinator is None:
                await asyncio.to_thread(self.store.set_state, slot.run, "paused" if pause else "stopped")
            else:
                ending = coordinator.pause() if pause else coordinator.end("stopped")
                await within(2 * DISK_PAUSE_S, ending)
        except (StoreError, asyncio.TimeoutError) as error:
            if isinstance(error, StoreError) and not is_disk_full(error):
                raise
            self._failed_to_load.add(slot.run)
            self.say(
                f"run {slot.run} goes on with the next service, for the full disk takes no word of its end", slot.run
            )

    def _retire(self, slot: Slot) -> None:
        """Free what a run took; devices that are still there come back."""
        for shard, each in list(self._slots.items()):
            if each is slot:
                del self._slots[shard]
        if slot.coordinator is None:
            return
        for peer in list(slot.coordinator.fleet.peers.values()):
            peer.end(Refusal(code="run", reason=f"run {slot.run} is over", retry=True))
        slot.coordinator.close()

    async def close(self) -> None:
        """Let devices take their last message, and free everything."""
        coordinators = [slot.coordinator for slot in self.slots() if slot.coordinator is not None]
        peers = [peer for each in coordinators for peer in each.fleet.peers.values()]
        waits = [asyncio.create_task(peer.gone.wait()) for peer in peers]
        if waits:
            _, late = await asyncio.wait(waits, timeout=GOODBYE_S)
            for task in late:
                task.cancel()
        for coordinator in coordinators:
            await coordinator.admission.flush()
            coordinator.close()
