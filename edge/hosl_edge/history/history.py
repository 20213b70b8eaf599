"""The run as this device holds it: a journal, the snapshot that it may begin at, and the weights that both give.

The three change together or not at all: what fails half way leaves the base shard and no run, from which every run can
be caught up with. `Device` calls it from worker threads, one call at a time. What would break it is a change of the
weights that the journal does not hold: a restart would then replay to other weights than the cloud's mirror has.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from hosl_edge.connection.catch_up_speed import RATED_COEFFICIENTS
from hosl_edge.connection.fetch import part_of
from hosl_edge.exceptions import HistoryError, JournalError, SnapshotError
from hosl_edge.history.journal import Journal, JournalHeader, NewJournal, journal_path, open_journal
from hosl_edge.history.snapshot import drop_others, read_snapshot, snapshot_path
from hosl_edge.model.shard import Shard
from hosl_protocol.exceptions import HoslError, IrreversibleError, ProtocolError
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.weights.client_weights import ClientWeights, make_client_weights
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.weights.state import ClientState
from hosl_protocol.wire.messages import Snapshot

log = logging.getLogger(__name__)

FetchSnapshot = Callable[[Snapshot, Path], None]
"""Downloads a snapshot to a path."""

REVERTED_ROUNDS = 4096
"""Rounds that are taken back at a time."""


class History:
    """Reads and changes the files in a device's state folder, and the shard's trainable weights."""

    def __init__(self, folder: Path, shard: Shard, manifest: Manifest, threads: int, sync_interval_s: float) -> None:
        self.weights: ClientWeights | None = None
        """None before a run is joined."""
        self.replay_s = 0.0
        """Seconds for one coefficient of the last long replay; 0 before there was one."""
        self._folder, self._shard, self._manifest = folder, shard, manifest
        self._threads, self._sync_interval_s = threads, sync_interval_s
        self._journal: Journal | None = None

    @property
    def header(self) -> JournalHeader | None:
        """The run that the weights belong to."""
        return self._journal.header if self._journal else None

    @property
    def applied_round(self) -> int:
        """The last round in the weights."""
        return self.weights.applied_round if self.weights else 0

    def recover(self) -> None:
        """Come back to the state before the last stop: shard (or snapshot) + journal. Raises JournalError."""
        journal = open_journal(self._folder)
        if journal is None:
            return
        # Its updates are of other weights; the file stays until the next run takes its place.
        if journal.header.shard_digest != self._manifest.shard_digest:
            log.warning("the journal in %s is of another shard; starting at the base shard", self._folder)
            journal.close()
            return

        try:
            with self._changing():
                self._use(journal)
                self._load_base(journal.header)
                self._replay(journal.updates())
        except (HoslError, OSError) as error:
            log.warning("the journal in %s cannot be replayed (%s); starting at the base shard", self._folder, error)

    def restart(self, header: JournalHeader, state: ClientState | None = None) -> None:
        """Begin with an empty journal, and the weights of the base shard or of a snapshot."""
        # Written before anything changes: where the disk is full, the former run stays.
        new = NewJournal(self._folder, header)
        with self._changing():
            self.forget()
            self.weights = self._new_weights(header.settings)
            if state is not None:
                self.weights.load_state(state)
            self._use(new.install())
        self.replay_s = 0.0  # of another run
        drop_others(self._folder, snapshot_path(self._folder, header.base_sha256))

    def rebase(self, header: JournalHeader, snapshot: Snapshot, fetch: FetchSnapshot) -> None:
        """Go on from a snapshot. Until it is here and whole, everything stays as it is. Raises SnapshotError, and what
        `fetch` raises."""
        header = msgspec.structs.replace(header, base_round=snapshot.round, base_sha256=snapshot.sha256)
        path = snapshot_path(self._folder, snapshot.sha256)
        base = self.header.base_sha256 if self.header else ""
        # Room for the new one. What the journal begins at stays until another journal takes its place.
        drop_others(self._folder, path, part_of(path), snapshot_path(self._folder, base))
        fetch(snapshot, path)
        self.restart(header, self._read_snapshot(header))

    def rewind(self, header: JournalHeader, last: int) -> None:
        """Go on under `header`, of the same base, and take back the rounds after `last`.

        Raises ProtocolError, which changes nothing, and HistoryError, after which the device stands at an earlier round
        or at the base shard.
        """
        assert self._journal is not None
        if not header.base_round <= last <= self.applied_round:
            raise ProtocolError(
                f"rewind to round {last}, this device holds {header.base_round} to {self.applied_round}"
            )
        if dropped := self.applied_round - last:
            log.warning("the cloud went back to round %d; %d rounds are taken back", last, dropped)

        # Rounds that a full journal lacks cannot be gone back to: those before come from it, the others from the cloud.
        held = self._journal.last_round
        goal = last if last in (self.applied_round, min(last, held)) else held

        # The shorter journal first: a crash leaves the longer one, which the cloud will ask to rewind again.
        new = NewJournal(self._folder, header, self._journal.updates(last=goal))
        try:
            with self._changing():
                self._take_back(header, goal)
                if new.count != min(goal, held) - header.base_round:
                    raise JournalError(journal_path(self._folder), f"{new.count} of its updates are whole")
                self._journal.close()
                self._use(new.install())
        except (HoslError, OSError) as error:
            raise HistoryError(f"the rounds after {last} cannot be taken back ({error})") from error
        if goal < last:
            raise HistoryError(f"the rounds after {last} cannot be taken back: the journal ends at round {goal}")

    def _take_back(self, header: JournalHeader, last: int) -> None:
        assert self.weights is not None
        assert self._journal is not None
        try:
            if self._journal.last_round < self.weights.applied_round > last:
                raise IrreversibleError("the journal lacks the newest rounds")
            # From the newest on, in portions: a run may have more rounds than the memory holds updates.
            while (applied := self.weights.applied_round) > last:
                first = max(last, applied - REVERTED_ROUNDS) + 1
                self.weights.revert(list(self._journal.updates(first, applied)))
                if self.weights.applied_round == applied:
                    raise JournalError(self._journal.path, f"it lacks round {applied}")
        except IrreversibleError:
            # AdamW, a lattice that became coarser, or a full journal: from the base on, which takes longer and gives
            # the same bits.
            self.weights.close()
            self._shard.reset()
            self._load_base(header)
            self.weights.apply(self._journal.updates(last=last))

    def apply(self, updates: Sequence[UpdateRecord]) -> None:
        """Apply updates to the weights, in one pass where the optimizer allows it, then journal them."""
        assert self.weights is not None
        assert self._journal is not None
        known = len(self.weights.coarsenings)
        with self._changing():
            self._replay(updates)
            # After the weights: an update that they cannot take must not stand where each start would meet it again.
            self._journal.append(updates)

            for event in self.weights.coarsenings[known:]:
                log.info("round %d: %s moves to a lattice of steps %.2g", event.round, event.tensor, event.spacing)

    def _replay(self, updates: Iterable[UpdateRecord]) -> None:
        assert self.weights is not None
        assert self._journal is not None
        began, first = time.monotonic(), self.weights.applied_round
        self.weights.apply(updates)
        coefficients = (self.weights.applied_round - first) * self._journal.header.update_shape.coefficients
        if coefficients >= RATED_COEFFICIENTS:
            self.replay_s = (time.monotonic() - began) / coefficients

    def forget(self) -> None:
        """Go back to the base shard; the files stay on disk until others take their place."""
        # A shard that nobody wrote to is the base; to reset it would make all of it anonymous memory.
        is_changed = self.weights is not None
        self.close()
        self._journal = self.weights = None
        if is_changed:
            self._shard.reset()

    def close(self) -> None:
        """Leave everything durable."""
        if self._journal is not None:
            self._journal.close()
        if self.weights is not None:
            self.weights.close()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Let weights and journal say different things, within; what fails leaves neither."""
        try:
            yield
        except BaseException:
            self.forget()
            raise

    def _read_snapshot(self, header: JournalHeader) -> ClientState:
        """The state that the journal begins at. Raises SnapshotError."""
        path = snapshot_path(self._folder, header.base_sha256)
        facts, state = read_snapshot(path, header.base_sha256, self._manifest)
        if (facts.run, facts.round) != (header.run, header.base_round):
            raise SnapshotError(path, f"it is of run {facts.run}, round {facts.round}")
        return state

    def _load_base(self, header: JournalHeader) -> None:
        """Weights as the journal's base has them, over those of the shard. Raises SnapshotError."""
        self.weights = self._new_weights(header.settings)
        if header.base_sha256:
            self.weights.load_state(self._read_snapshot(header))

    def _use(self, journal: Journal) -> None:
        """Go on with this journal."""
        journal.sync_interval_s = self._sync_interval_s
        self._journal = journal

    def _new_weights(self, settings: RunSettings) -> ClientWeights:
        return make_client_weights(self._manifest, self._shard.weights, settings, self._threads)
