"""Updates that a device was not sent because it took no part in their rounds, and gets before it takes part again.

Where an update is a gradient, it is kilobytes or more, and only who took part in its round is sent it at once
(`Coordinator._commit_round`). `Backlog.clear` brings devices up before they are asked for anything: with the updates
that they missed, in order, ahead of the start of a round; or, where a snapshot of the weights takes fewer bytes, by
ending the connection. The device then connects again, and admission offers it the snapshot.

All methods run on the event loop, in the task that commits rounds, so that no round is committed meanwhile. The
invariant: what is sent is stored, and a device is sent every update once, in order, up to `Participant.sent_round`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Sequence

from hosl_cloud.runs.admission import rows_of_a_catch_up
from hosl_cloud.runs.fleet import Fleet, Participant
from hosl_cloud.runs.run import Run
from hosl_cloud.runs.snapshots import is_snapshot_smaller
from hosl_protocol.wire.messages import Refusal, Update
from hosl_protocol.wire.updates import update_tensors

RECONNECT_BYTES = 64 * 1024
"""What it costs to connect again, with its handshakes, in bytes of updates: below it nobody is sent for a snapshot."""

TAKING_DEADLINE_S = 600.0
"""Longest wait until a device has taken the updates of one read of the store."""


class Backlog:
    """Brings devices of a run up to its round."""

    def __init__(self, run: Run, fleet: Fleet) -> None:
        self._run, self._fleet = run, fleet
        self._sent_away: set[str] = set()

    @property
    def awaited(self) -> set[str]:
        """Devices that were sent for a snapshot, and are not back yet."""
        self._sent_away -= set(self._fleet.ready_names())
        return set(self._sent_away)

    def behind(self, names: Collection[str]) -> list[Participant]:
        """Those of the ready devices that were not sent every update."""
        peers = (self._fleet.peers.get(name) for name in names)
        return [peer for peer in peers if peer is not None and peer.is_ready and peer.sent_round < self._run.round]

    async def clear(self, names: Collection[str], *, may_leave: bool = True) -> bool:
        """Send these devices what they missed; False where one of them is to come back for a snapshot instead.

        One with held-out data is never sent for a snapshot, or an evaluation would go without it: see `rescue`. Without
        `may_leave` no device is, and those that would have to stay behind.
        """
        by_round: dict[int, list[Participant]] = defaultdict(list)
        is_clear = True
        for peer in self.behind(names):
            if peer.sent_round < self._run.pruned_to or not (peer.eval_examples or self._is_cheap(peer.sent_round)):
                if may_leave:
                    is_clear = False
                    self._send_away(peer)
            else:
                by_round[peer.sent_round].append(peer)
        for sent_round, peers in sorted(by_round.items()):
            await self._send(peers, sent_round)
        return is_clear

    def _send_away(self, peer: Participant) -> None:
        self._sent_away.add(peer.name)
        peer.is_ready = False
        reason = "a snapshot takes fewer bytes than the updates of the rounds without this device: connect again"
        peer.end(Refusal(code="run", reason=reason, retry=True))

    async def rescue(self, pruned_to: int) -> None:
        """Before the store drops the updates up to `pruned_to`, send them to the devices with held-out data."""
        peers = self.behind(self._fleet.ready_names())
        await self.clear([peer.name for peer in peers if peer.eval_examples and peer.sent_round < pruned_to])

    def _is_cheap(self, sent_round: int) -> bool:
        """Whether the updates since then take no more bytes than a snapshot and a new connection."""
        missed = self._run.round - sent_round
        is_little = missed * self._run.update_shape.size_bytes <= RECONNECT_BYTES
        return is_little or not is_snapshot_smaller(missed, self._run)

    async def _send(self, peers: Sequence[Participant], sent_round: int) -> None:
        """Send devices that stand at one round all updates since."""
        run, store = self._run, self._run.store
        rows = rows_of_a_catch_up(run.update_shape)
        for first in range(sent_round + 1, run.round + 1, rows):
            count = min(rows, run.round + 1 - first)
            records = await asyncio.to_thread(store.updates, run.id, first, first + count - 1)
            losses = await asyncio.to_thread(store.rounds, run.id, first - 1, count)
            for record, row in zip(records, losses, strict=True):
                message = Update(run=run.id, epoch=run.epoch, round=record.round, learning_rate=record.learning_rate)
                self._fleet.send_update(peers, message, update_tensors(record, row.loss))
            # Before the next read: of all that a device missed, one read's updates are in memory at a time.
            await asyncio.gather(*map(_taken, peers))


async def _taken(peer: Participant) -> None:
    try:
        await peer.emptied(TAKING_DEADLINE_S)
    except asyncio.TimeoutError:
        peer.end(Refusal(code="late", reason="the updates that it missed are not taken in time", retry=True))
