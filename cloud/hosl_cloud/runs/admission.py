"""A device joins: who it is, which state it needs, and the proof that it has it.

One task for each connection runs `serve_peer`, on the event loop: Hello, checks, Welcome (`_welcome`), CatchUps, Ready.
The store is asked on other threads, and the mirror's digest is made on the compute thread.

The invariant: a device becomes ready only when its weights' digest is the mirror's at the run's present round, so that
from then on the same updates keep both the same. Whatever awaits between the last comparison and `is_ready` would break
it: a round that is committed in between would be neither caught up with nor sent to this device.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from hosl_cloud import metrics
from hosl_cloud.exceptions import StoreError
from hosl_cloud.rounds.exchange import break_off
from hosl_cloud.runs.fleet import Fleet, Participant
from hosl_cloud.runs.peer import Peer
from hosl_cloud.runs.run import Compute, Run
from hosl_cloud.runs.snapshots import Snapshots
from hosl_protocol.exceptions import ProtocolError
from hosl_protocol.program.logs import note_place
from hosl_protocol.run.updates import UpdateShape
from hosl_protocol.wire.messages import (
    CATCH_UP_ROUNDS,
    PROTOCOL_VERSION,
    CatchUp,
    Complete,
    Hello,
    Plan,
    Ready,
    Refusal,
    Report,
    Snapshot,
    Welcome,
    is_device_name,
    name_of,
)
from hosl_protocol.wire.updates import catch_up_tensors

log = logging.getLogger(__name__)

JOIN_DEADLINE_S = 600.0
"""Longest wait for a joining device, which may have to tokenize its data first; what it has to replay or to
download comes on top, by its own figures."""

LONGEST_CATCH_UP_S = 24 * 3600.0

CATCH_UP_BYTES = 4 * 1024 * 1024
"""Of the updates in one CatchUp, but for one update that is larger."""

_SINCE = "since this device joined: put the old file back, or join as a new device (hosl-cloud device add OTHER)"


class UpdatesGone(Exception):
    """The store has dropped updates that a device lacks, and there is no snapshot for it."""


@dataclass
class Admission:
    """Brings devices into a run, and takes their reports."""

    run: Run
    fleet: Fleet
    compute: Compute
    """Runs work on the thread that owns the mirror."""
    snapshots: Snapshots
    say: Callable[[str], None]
    _unsaved: dict[str, Report] = field(default_factory=dict)
    """Newest reports by device that are not in the store yet."""
    _saving: asyncio.Task[None] | None = None
    _largest_rss: int = 0

    async def serve_peer(self, peer: Peer, hello: Hello) -> None:
        """Serve a connection from its Hello to its end."""
        # What it sent before anybody knew its run counts there, too.
        self.fleet.tally.wire_bytes += peer.tally.wire_bytes
        peer.on_arrival, peer.tally = self.fleet.on_arrival, self.fleet.tally
        reports = asyncio.create_task(self._take_reports(peer))

        try:
            if await self._join(peer, hello):
                await peer.gone.wait()
        except asyncio.TimeoutError:
            peer.end(Refusal(code="late", reason="no answer in time while joining", retry=True))
        except UpdatesGone:
            reason = "the updates that it lacks are kept no more, and it has no snapshot: connect again for one"
            peer.end(Refusal(code="run", reason=reason, retry=True))
        except ProtocolError as error:
            _break_off(peer, error)
        finally:
            reports.cancel()
            # A newer connection of the same device may have taken the name meanwhile.
            if self.fleet.peers.get(peer.name) is peer:
                del self.fleet.peers[peer.name]
                if self.run.ending is None or peer.farewell:  # else it was told to leave
                    self.say(f"device {peer.name} is away" + (f": {peer.farewell}" if peer.farewell else ""))
            await self.fleet.notify()

    async def _join(self, peer: Peer, hello: Hello) -> bool:
        """Bring a device into the fleet, up to Ready; False where it was refused, or told that the run has ended."""
        refusal = _stranger(peer, hello) or await asyncio.to_thread(self._objection, hello)
        # Once more, and no await until the fleet knows it: its token may have been revoked meanwhile.
        refusal = refusal or _stranger(peer, hello)
        if refusal is not None:
            peer.end(refusal)
            return False

        peer.name = hello.device
        note_place(run=self.run.id, device=peer.name)
        if self.run.ending is not None and (hello.run != self.run.id or self._is_up_to_date(hello)):
            self.complete(peer)  # it has no part in the run, or nothing to catch up with
            return False

        # The newest connection counts: the device knows of a broken one before we do.
        former = self.fleet.peers.get(peer.name)
        if former is not None:
            former.end(Refusal(code="device", reason="the device has connected again", retry=False))
        self.fleet.peers[peer.name] = peer

        connections = await asyncio.to_thread(self.run.store.add_device, self.run.id, peer.name)
        if connections > 1:
            metrics.device_reconnects.labels(self.run.bundle.name).inc()
        # From here on the Connection checks every length against what this run's messages can have.
        peer.connection.agree(self.run.settings, self.run.manifest.width, self.run.update_shape)
        return await self._bring_up(peer, hello)

    def _is_up_to_date(self, hello: Hello) -> bool:
        """Tell whether a device already holds the run's last weights."""
        run, expected = self.run, self.run.digests.get(self.run.round)
        return (hello.epoch, hello.applied_round, hello.weights_digest) == (run.epoch, run.round, expected)

    def complete(self, peer: Participant) -> None:
        """Tell a device that the run has ended."""
        assert self.run.ending is not None
        peer.end(Complete(run=self.run.id, reason=self.run.ending, round=self.run.round))

    def _objection(self, hello: Hello) -> Refusal | None:
        """Find why a device may not join; None where it may. Asks the store, off the event loop."""
        if hello.protocol != PROTOCOL_VERSION:
            reason = f"protocol {hello.protocol}, this service speaks {PROTOCOL_VERSION}"
            return Refusal(code="protocol", reason=reason, retry=False)
        if not is_device_name(hello.device):
            return Refusal(
                code="device", reason="a name is 1 to 64 characters of A-Za-z0-9._-, no dot first", retry=False
            )
        if hello.shard_digest != self.run.manifest.shard_digest:
            return Refusal(code="shard", reason="another shard; fetch this service's shard again", retry=False)

        known = self.run.store.device(self.run.id, hello.device)
        if known is None:
            return None
        if known.data_digest and known.data_digest != hello.data_digest:
            return Refusal(code="data", reason=f"the training data has changed {_SINCE}", retry=False)
        # Held-out data has no part in the training; only a strict run is to come to the same figures.
        if known.data_digest and self.run.config.strict and known.eval_digest != hello.eval_digest:
            reason = f"the run is strict, and the held-out data has changed {_SINCE}"
            return Refusal(code="eval-data", reason=reason, retry=False)
        return refuse_after_strikes(known.strikes, self.run.config.devices.strikes)

    async def _bring_up(self, peer: Peer, hello: Hello) -> bool:
        """Welcome a device, and catch it up until it is ready at our round with our digest; False where it never is."""
        run = self.run
        rewound_to = await asyncio.to_thread(run.store.lowest_rewind, run.id, hello.epoch)
        plan, applied = _plan(run, hello, rewound_to)
        metrics.catchup_rounds.labels(run.bundle.name).observe(max(run.round - applied, 0))
        # Where the digests differ after the first plan, the device rebuilds once, from its shard and every update, or
        # from a snapshot where updates are gone.
        attempts: list[tuple[Plan, int]] = [(plan, applied), ("rebuild", 0)]
        for number, (attempt, start) in enumerate(attempts):
            base = await self.snapshots.offer(hello, start) if number == 0 or start < run.pruned_to else None
            if base is not None:
                attempt, start = "snapshot", base.round
            self._welcome(peer, attempt, start, base)
            ready = await self._catch_up(peer, start, JOIN_DEADLINE_S + self._expected_s(hello, start, base))
            if ready.weights_digest == (expected := run.digests.get(ready.applied_round)):
                await self._make_ready(peer, hello, ready)
                if run.ending is not None:
                    self.complete(peer)
                return True
            differs = _difference(ready, expected)
            log.warning("device %s: %s", peer.name, differs)

        reason = f"even after a rebuild {differs}: delete its state folder, or mend its software"
        peer.end(Refusal(code="weights", reason=reason, retry=False))
        return False

    def _welcome(self, peer: Peer, plan: Plan, applied: int, snapshot: Snapshot | None) -> None:
        """Send the Welcome: the run's settings, and the plan by which the device reaches its state."""
        if snapshot is not None:
            self.say(f"device {peer.name} takes a snapshot of round {snapshot.round} instead of replaying")

        welcome = Welcome(
            run=self.run.id,
            epoch=self.run.epoch,
            round=self.run.round,
            width=self.run.manifest.width,
            update=self.run.update_shape,
            settings=self.run.settings,
            plan=plan,
            snapshot=snapshot,
            rewind_to=applied if plan == "rewind" else 0,
        )
        peer.tell(welcome)

    def _expected_s(self, hello: Hello, applied: int, snapshot: Snapshot | None) -> float:
        """Double the time that catching up should take by the device's own figures."""
        rounds, update = self.run.round - applied, self.run.update_shape
        size_bytes = rounds * update.size_bytes + (snapshot.size_bytes if snapshot is not None else 0)
        download_s = size_bytes / hello.link_bytes_per_s if hello.link_bytes_per_s else 0.0
        return min(2.0 * (rounds * update.coefficients * hello.replay_s + download_s), LONGEST_CATCH_UP_S)

    async def _catch_up(self, peer: Peer, applied: int, deadline_s: float) -> Ready:
        """Send what is missing until nothing is; the last Ready speaks of the current round and its digest is known.

        Rounds go on meanwhile, so that a device may have to be sent more after each Ready. Raises ProtocolError for a
        Ready of another state than the CatchUps lead to.
        """
        while True:
            sent = await self._send_missed(peer, applied)
            ready = (await peer.next(deadline_s)).message
            assert isinstance(ready, Ready)
            self._check(ready)
            if ready.applied_round != sent:
                raise ProtocolError(f"ready at round {ready.applied_round}, the catch-up ended with round {sent}")

            applied = sent
            if applied == self.run.round:
                await self.compute(self.run.note_digest)
            # Again, after the await: a round may have been committed meanwhile.
            if applied == self.run.round and applied in self.run.digests:
                return ready

    def _check(self, message: Ready | Report) -> None:
        """Raise ProtocolError for a message that is not of this run, or ahead of it."""
        what, run = name_of(message), self.run
        if (message.run, message.epoch) != (run.id, run.epoch):
            theirs, ours = f"run {message.run}, epoch {message.epoch}", f"run {run.id}, epoch {run.epoch}"
            raise ProtocolError(f"{what} of {theirs}, this connection is in {ours}")
        if message.applied_round > run.round:
            raise ProtocolError(f"{what} at round {message.applied_round}, the run is at round {run.round}")

    async def _send_missed(self, peer: Peer, applied: int) -> int:
        """Send the updates after `applied` as CatchUps; the round at which a device stands that has applied them.

        Raises UpdatesGone where the store has them no more.
        """
        target = self.run.round
        rows = rows_of_a_catch_up(self.run.update_shape)
        for first in range(applied + 1, max(target, applied + 1) + 1, rows):
            last = min(first + rows - 1, target)
            updates = await asyncio.to_thread(self.run.store.updates, self.run.id, first, last)
            # By what was read: a round that is stored meanwhile drops some before `pruned_to` says so.
            if len(updates) <= last - first:
                raise UpdatesGone
            message = CatchUp(run=self.run.id, epoch=self.run.epoch, first_round=first, last=last >= target)
            await peer.emptied(JOIN_DEADLINE_S)  # one message at a time is in memory, however far behind it is
            peer.tell(message, catch_up_tensors(updates, self.run.update_shape))
        return target

    async def _make_ready(self, peer: Peer, hello: Hello, ready: Ready) -> None:
        """Let a device take part from here on, and bind it to its data."""
        # No await before it is ready: an update that is settled meanwhile would miss it.
        peer.is_ready, peer.sent_round = True, ready.applied_round
        peer.train_examples, peer.data_digest = ready.train_examples, hello.data_digest
        peer.eval_examples, peer.eval_digest = ready.eval_examples, hello.eval_digest
        counts = ready.train_examples, ready.eval_examples
        self.say(f"device {peer.name} is ready: {counts[0]} examples, {counts[1]} held out")
        await self.fleet.notify()
        digests = hello.data_digest, hello.eval_digest
        await asyncio.to_thread(self.run.store.set_data, self.run.id, peer.name, *counts, *digests)

    async def _take_reports(self, peer: Peer) -> None:
        """Take a device's reports until its connection ends; one whose weights differ is sent to rebuild them."""
        while True:
            report: Report = await peer.reports.get()
            try:
                self._check(report)
            except ProtocolError as error:
                _break_off(peer, error)
                return

            self._unsaved[peer.name] = report
            self._largest_rss = max(self._largest_rss, report.peak_rss_bytes)
            metrics.edge_peak_rss.labels(self.run.bundle.name).set(self._largest_rss)
            # One task saves; what comes during its transaction waits for its next one.
            if self._saving is None or self._saving.done():
                self._saving = asyncio.create_task(self._save_reports())

            # Rounds without a digest are not checked: it is made every `report_every` rounds, as devices report.
            expected = self.run.digests.get(report.applied_round)
            if expected is not None and report.weights_digest != expected:
                differs = _difference(report, expected)
                log.error("device %s: %s", peer.name, differs)
                peer.is_ready = False
                peer.end(Refusal(code="weights", reason=f"{differs}: connect again to rebuild them", retry=True))

    async def flush(self) -> None:
        """Wait until every report that came is stored."""
        if self._saving is not None:
            await self._saving

    async def _save_reports(self) -> None:
        """Store reports together: many devices report at once, and a transaction each would hold up the rounds' own."""
        while self._unsaved:
            reports, self._unsaved = self._unsaved, {}
            try:
                await asyncio.to_thread(self.run.store.set_reports, reports)
            except StoreError:
                log.exception("the reports of %d devices are lost", len(reports))


def rows_of_a_catch_up(update: UpdateShape) -> int:
    """Count the updates that are read and sent together."""
    return max(1, min(CATCH_UP_ROUNDS, CATCH_UP_BYTES // max(1, update.size_bytes)))


def _break_off(peer: Peer, error: ProtocolError) -> None:
    log.warning("device %s: %s", peer.name, error)
    peer.is_ready = False
    peer.end(break_off(str(error)))


def _difference(message: Ready | Report, expected: str | None) -> str:
    return (
        f"its weights differ at round {message.applied_round}, their digest is {message.weights_digest}, "
        f"the cloud's {expected}"
    )


def _stranger(peer: Peer, hello: Hello) -> Refusal | None:
    """Refuse a device whose token is not that of the device it says it is."""
    if peer.may_be(hello.device):
        return None
    reason = f"its token is not one of device {hello.device[:64]}: give it the right --name, or token"
    return Refusal(code="device", reason=reason, retry=False)


def refuse_after_strikes(strikes: int, limit: int) -> Refusal | None:
    """Refuse a device that has too many faults counted against it; a `limit` of 0 refuses none."""
    if not 0 < limit <= strikes:
        return None
    reason = f"it is put aside: {strikes} of its answers were such as no working device sends"
    return Refusal(code="device", reason=reason, retry=False)


def _plan(run: Run, hello: Hello, rewound_to: int | None) -> tuple[Plan, int]:
    """Choose how a device reaches the run's state, and the round that it then starts from.

    `rewound_to` is the lowest round to which the run was rewound since the device's epoch; None where it was not.
    Updates up to that round are the device's and the run's alike, and those after it were made again.
    """
    if hello.run is None:  # a new device, at the base shard
        return "continue", 0

    latest = run.round if rewound_to is None else rewound_to
    if hello.run != run.id or hello.epoch > run.epoch or (rewound_to is None and hello.applied_round > latest):
        return "rebuild", 0  # its weights are of another history

    if hello.applied_round <= latest:
        return "continue", hello.applied_round
    # Its journal reaches back to its base round: up to there it can take updates back.
    return ("rewind", latest) if latest >= hello.base_round else ("rebuild", 0)
