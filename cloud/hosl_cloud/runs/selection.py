"""Which devices take part: waiting until enough of them are there, and choosing those of a round or an evaluation.

Used by a run's Coordinator alone, on the event loop. A strict run waits for the very devices that it began with, its
roster, however long it takes. Any other takes the devices that are ready once they make a quorum. Every wait ends as
soon as the run is to stop, with whoever is there: the caller looks at that itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from hosl_cloud.exceptions import NoDevicesError
from hosl_cloud.rounds.kept import Holding, KeptActivations, may_keep
from hosl_cloud.runs.fleet import Fleet, Participant
from hosl_cloud.runs.progress import Waits
from hosl_cloud.runs.run import Compute, Run
from hosl_cloud.storage.data_folder import cache_folder
from hosl_cloud.storage.kept_data import KeptFolder
from hosl_protocol.run.ordering import sample_devices

RETURN_S = 120.0
"""Longest wait for devices that are to come back before a run ends: a download of the weights, and a pause before."""


class DeviceSelection:
    """Chooses among the devices of a fleet."""

    def __init__(
        self,
        run: Run,
        fleet: Fleet,
        is_stopping: Callable[[], bool],
        say: Callable[[str], None],
        kept: KeptActivations | None = None,
    ) -> None:
        """`kept` are the activations of a frozen run, whose devices need not be there for what it has of them."""
        self._run, self._config, self._fleet = run, run.config, fleet
        self._is_stopping, self._say, self._kept = is_stopping, say, kept
        self.roster: list[str] = []
        """Who was there at the start: the devices of a strict run."""
        self._unfinished: Counter[str] = Counter()
        """Evaluations in a row for which devices did not send all their data."""

    async def find_kept(self, compute: Compute) -> None:
        """Let devices take part whose activations are here from before, whether or not they come."""
        kept, run = self._kept, self._run
        if kept is None:
            return
        await compute(kept.load)
        limit = self._config.devices.strikes
        for row in await asyncio.to_thread(run.store.devices, run.id):
            if 0 < limit <= row["strikes"]:
                kept.set_aside(row["name"])
            elif row["connections"]:  # what it said itself, in this run
                data = await asyncio.to_thread(run.store.device, run.id, row["name"])
                assert data is not None
                counts = row["train_examples"], row["eval_examples"]
                kept.note(row["name"], Holding(data.data_digest, counts[0], data.eval_digest, counts[1]))
        self.note_data()  # of who has come meanwhile
        await compute(kept.open)
        for name in sorted(kept.training_names() - set(self._fleet.peers)):
            holding = kept.holding(name)
            assert holding is not None
            counts = holding.train_examples, holding.eval_examples
            self._say(f"device {name} need not be there: {counts[0]} examples are kept, {counts[1]} held out")
            # Bound to its data only where other data would change the bits.
            digests = (holding.data_digest if self._config.strict else ""), holding.eval_digest
            await asyncio.to_thread(run.store.add_kept_device, run.id, name, *counts, *digests)

    def note_data(self) -> None:
        """Note what the devices that are here have said of their data."""
        for peer in self._fleet.peers.values():
            if self._kept is not None and peer.is_ready:
                said = Holding(peer.data_digest, peer.train_examples, peer.eval_digest, peer.eval_examples)
                self._kept.note(peer.name, said)

    def away(self, devices: Collection[str]) -> dict[str, Holding]:
        """Look up the data of devices that are not ready, and whose activations are kept."""
        held = {name: self._kept.holding(name) for name in devices if self._kept is not None}
        return {name: holding for name, holding in held.items() if holding is not None}

    def present(self) -> list[str]:
        """Devices that can take part in a round: those that are ready, and those whose data is kept here."""
        kept = set() if self._kept is None else self._kept.training_names()
        return sorted(kept | set(self._fleet.ready_names()))

    async def for_round(self) -> list[str]:
        """Choose who takes part in the next round, once they are there. Raises NoDevicesError."""
        devices, round_ = self._config.devices, self._run.round + 1
        if self._config.strict:
            chosen = sample_devices(self._config.seed, round_, self.roster, devices.per_round)
            await self._wait_for_these(chosen, self.present)
            return chosen
        # Sampled from all that are ready, after the wait: the draw depends on the seed and who is there, nothing else.
        await self.wait_for_quorum()
        return sample_devices(self._config.seed, round_, self.present(), devices.per_round)

    async def for_evaluation(self) -> list[str]:
        """Choose whose held-out data is scored: of all ready devices that have any, or of a strict run's roster."""
        kept = set() if self._kept is None else self._kept.evaluation_names()
        if self._config.strict:
            # Those without held-out data, and those whose data is kept, need not be there.
            away = kept if self._kept is None else kept | self._kept.without_held_out()
            await self._wait_for_these(set(self.roster) - away, self._fleet.ready_names)
        ready = {name for name in self._fleet.ready_names() if self._fleet.peers[name].eval_examples}
        devices = sorted(kept | ready)
        if self._config.strict:
            return [name for name in devices if name in self.roster]
        return [name for name in devices if not self._is_unreliable(name)]

    async def held_out_examples(self, peers: Sequence[Participant]) -> dict[str, int]:
        """Count held-out examples by device, of those that are away too; what `peers` said last counts for them."""
        examples = await asyncio.to_thread(self._run.store.held_out, self._run.id)
        if not self._config.strict:  # what never comes must not leave every evaluation in want of it
            examples = {name: count for name, count in examples.items() if not self._is_unreliable(name)}
        return examples | {peer.name: peer.eval_examples for peer in peers}

    def note_unfinished(self, devices: Collection[str], unfinished: Collection[str]) -> None:
        """Note which devices of an evaluation did not send all; too often in a row, and they are asked no more."""
        for device in devices:
            self._unfinished[device] = self._unfinished[device] + 1 if device in unfinished else 0
            if not self._config.strict and self._is_unreliable(device):
                times = self._unfinished[device]
                self._say(
                    f"device {device} did not send all its held-out data in {times} evaluations: it is asked no more"
                )

    def _is_unreliable(self, device: str) -> bool:
        """Whether a device has so often not sent what it said it has that no evaluation should wait for it."""
        return 0 < self._config.devices.strikes <= self._unfinished[device]

    async def wait_for_quorum(self) -> None:
        """Wait for as many devices as a round needs. Raises NoDevicesError."""
        limit_s, quorum = self._config.devices.rejoin_deadline_s, self._config.devices.quorum
        try:
            await self.wait_for_devices(quorum, timeout_s=limit_s)
        except asyncio.TimeoutError:
            present = len(self.present())
            raise NoDevicesError(self._run.id, self._run.round, limit_s, present, quorum) from None

    async def wait_for_devices(self, count: int, timeout_s: float | None) -> None:
        """Wait for so many devices, whoever they are. Raises TimeoutError."""
        ready = self.present()
        if len(ready) < count and not self._is_stopping():
            self._say(f"waits for devices: {len(ready)} of {count} are there")

        def is_time() -> bool:
            return self._is_stopping() or self._tell_ready(len(self.present()), count)

        await self._fleet.wait_until(is_time, timeout_s, count)

    async def _wait_for_these(self, devices: Collection[str], present: Callable[[], Collection[str]]) -> None:
        """Wait for the devices of a strict run, however long it takes."""
        absent = sorted(set(devices) - set(present()))
        if absent and not self._is_stopping():
            self._say(f"waits for devices: {', '.join(absent)}")

        def is_time() -> bool:
            there = set(devices) & set(present())
            return self._is_stopping() or self._tell_ready(len(there), len(set(devices)))

        await self._fleet.wait_until(is_time, None, len(devices), devices)

    async def wait_for_return(self, devices: Collection[str]) -> None:
        """Give devices that were sent to connect again the time to do so."""

        def is_time() -> bool:
            return self._is_stopping() or set(devices) <= set(self._fleet.ready_names())

        with contextlib.suppress(asyncio.TimeoutError):
            await self._fleet.wait_until(is_time, RETURN_S, len(devices), devices)

    def _tell_ready(self, ready: int, needed: int) -> bool:
        """Whether enough devices are there; where they are not, whoever follows the run is told how many are."""
        if ready < needed:
            self._run.tell(Waits(self._run.id, ready, needed))
        return ready >= needed


def keep_for(run: Run, say: Callable[[str], None]) -> KeptActivations | None:
    """Make what keeps a run's activations; None for a run in which they change, or that has no budget for it."""
    if not may_keep(run.config):
        return None
    folder = KeptFolder(cache_folder(run.folder), run.config.cache.budget_bytes)
    return KeptActivations(run.config, run.manifest, run.bundle.name, folder, say)
