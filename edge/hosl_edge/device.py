"""What the device is between connections: its shard, its weights, its journal, its data."""

from __future__ import annotations

import fcntl
import gc
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import msgspec
import numpy as np
from tokenizers import Tokenizer

from hosl_edge.data import AnyBatch, AnyDataset, Batch, check_consent, digest_of_data, load_dataset
from hosl_edge.exceptions import ConnectionLost, RefusedError, SnapshotError
from hosl_edge.fetch import part_of
from hosl_edge.images import blank_images, load_images
from hosl_edge.journal import Journal, JournalHeader, create_journal, open_journal
from hosl_edge.memory import choose_micro_batch, preferred_rows, read_memory, release_unused, spare_bytes
from hosl_edge.pace import RATED_COEFFICIENTS, Pace, load_link, measure_replay_s, save_link
from hosl_edge.settings import EdgeSettings
from hosl_edge.shard import Shard
from hosl_edge.snapshot import check_offer, drop_others, read_snapshot, snapshot_path
from hosl_edge.step import useful_sets
from hosl_edge.tokens import Splits, load_or_tokenize, tokens_key
from hosl_protocol import (
    BundleError,
    ClientState,
    ClientWeights,
    HoslError,
    IrreversibleError,
    Manifest,
    ProtocolError,
    RunSettings,
    SettingsError,
    Snapshot,
    UpdateRecord,
    Welcome,
    check_run,
    make_client_weights,
)
from hosl_protocol.manifest import SHARD_TOKENIZER

log = logging.getLogger(__name__)

FetchSnapshot = Callable[[Snapshot, Path], None]
"""Downloads a snapshot to a path."""


class Device:
    """State that outlives a connection. Its methods compute and read files: call them off the event loop."""

    def __init__(self, settings: EdgeSettings, folder: Path, manifest: Manifest) -> None:
        self.settings = settings
        self.manifest = manifest
        self.shard = Shard(folder, manifest, settings.compute_threads)
        train, held_out = self._data_paths
        self.data_digest = digest_of_data(train)
        self.eval_digest = digest_of_data(held_out) if held_out else ""
        self.weights: ClientWeights | None = None
        self.train: AnyDataset | None = None
        self.eval: AnyDataset | None = None
        self.held_sets = 0
        """Activation sets beyond the necessary one that the memory budget lets a round hold."""
        self._folder = folder
        self._state = Path(settings.state_dir) / settings.name
        self._lock = _lock(self._state)
        self._journal: Journal | None = None
        self._loaded_for: RunSettings | None = None
        """What the data is tokenized for, and the micro-batches are chosen for."""
        self._takes_snapshots = True
        self._pace = Pace(link_bytes_per_s=load_link(self._state))
        try:
            self._recover()
        except BaseException:
            self._lock.close()
            raise

    @property
    def _data_paths(self) -> tuple[Path, Path | None]:
        return Path(self.settings.data), Path(self.settings.eval) if self.settings.eval else None

    @property
    def header(self) -> JournalHeader | None:
        """The run that the weights belong to."""
        return self._journal.header if self._journal else None

    @property
    def applied_round(self) -> int:
        """The last round in the weights."""
        return self.weights.applied_round if self.weights else 0

    def digest(self) -> str:
        """Digest of the weights; empty before a run is joined."""
        return self.weights.digest() if self.weights else ""

    def pace(self) -> Pace:
        """How fast this device catches up; nothing is known where it cannot take a snapshot."""
        if not self._takes_snapshots:
            return Pace()
        if not self._pace.replay_s:
            settings = self.header.settings if self.header else None
            sizes = [math.prod(entry.shape) for entry in self.manifest.trainable]
            self._pace.replay_s = measure_replay_s(sizes, settings, self.settings.compute_threads)
        return self._pace

    def note_link(self, link_bytes_per_s: float) -> None:
        """Remember how fast a download came."""
        self._pace.link_bytes_per_s = link_bytes_per_s
        save_link(self._state, link_bytes_per_s)

    def _recover(self) -> None:
        """Shard (or snapshot) + journal = the state before the last stop."""
        found = open_journal(self._state)
        if found is None:
            return
        journal, updates = found
        header = journal.header
        if header.shard_digest != self.manifest.shard_digest:
            log.warning("the journal in %s is of another shard; starting at the base shard", self._state)
            journal.close()
            return
        self._keep(journal)
        try:
            self._load_base(header)
            self._replay(updates)
        except HoslError as error:
            log.warning("the journal in %s cannot be replayed (%s); starting at the base shard", self._state, error)
            self._forget()

    def _read_snapshot(self, header: JournalHeader) -> ClientState:
        """The state that the journal begins at. Raises SnapshotError."""
        path = snapshot_path(self._state, header.base_sha256)
        facts, state = read_snapshot(path, header.base_sha256, self.manifest)
        if (facts.run, facts.round) != (header.run, header.base_round):
            raise SnapshotError(path, f"it is of run {facts.run}, round {facts.round}")
        return state

    def _forget(self) -> None:
        """Back to the base shard; the journal stays on disk until another takes its place."""
        if self._journal is not None:
            self._journal.close()
            self.shard.reset()
        if self.weights is not None:
            self.weights.close()
        self._journal = self.weights = None

    def join(self, welcome: Welcome, fetch: FetchSnapshot) -> None:
        """Take on the run of a Welcome: journal, weights, data, micro-batches. Raises DataError, ConsentError,
        SettingsError, MemoryBudgetError, SnapshotError, and what `fetch` raises where the cloud is away."""
        check_run(welcome.settings, self.manifest)
        check_consent(welcome.settings.task, self.settings.fields, share_text=self.settings.share_text)
        header = JournalHeader(
            run=welcome.run,
            epoch=welcome.epoch,
            shard_digest=self.manifest.shard_digest,
            data_digest=self.data_digest,
            settings=welcome.settings,
            width=welcome.width,
        )
        is_loaded = self._loaded_for == welcome.settings
        if not is_loaded:
            self._load_data(welcome.settings)  # first: data that cannot be used must not cost the journal
        if welcome.plan == "snapshot":
            self._rebase(header, welcome.snapshot, fetch)
        elif welcome.plan == "rebuild" or self.header is None or not self.header.belongs_with(header):
            self._restart(header)
        elif welcome.plan == "rewind" or self.header.epoch != header.epoch:
            self._rewind(header.rebased(self.header), welcome)
        if not is_loaded:
            self._open_shard(welcome.settings)
            self._loaded_for = welcome.settings

    def _rebase(self, header: JournalHeader, snapshot: Snapshot | None, fetch: FetchSnapshot) -> None:
        """Go on from a snapshot. Until it is here and whole, weights and journal stay as they are."""
        if snapshot is None:
            raise ProtocolError("welcome with the plan snapshot and no snapshot")
        check_offer(snapshot, self.manifest)
        header = msgspec.structs.replace(header, base_round=snapshot.round, base_sha256=snapshot.sha256)
        path = snapshot_path(self._state, snapshot.sha256)
        base = self.header.base_sha256 if self.header else ""
        drop_others(self._state, path, part_of(path), snapshot_path(self._state, base))
        try:
            fetch(snapshot, path)
            self._restart(header, self._read_snapshot(header))
        except (ConnectionLost, RefusedError):
            raise
        except HoslError as error:
            self._takes_snapshots = False
            if isinstance(error, SnapshotError):
                raise
            raise SnapshotError(path, str(error)) from error

    def _rewind(self, header: JournalHeader, welcome: Welcome) -> None:
        """Go over to the Welcome's epoch, and take back what the cloud has lost. Raises ProtocolError."""
        assert self.weights is not None
        assert self._journal is not None
        last = welcome.rewind_to if welcome.plan == "rewind" else self.applied_round
        if not header.base_round <= last <= self.applied_round:
            raise ProtocolError(
                f"rewind to round {last}, this device holds {header.base_round} to {self.applied_round}"
            )
        updates = self._journal.updates()
        kept = [update for update in updates if update.round <= last]
        dropped = updates[len(kept) :]
        if dropped:
            log.warning("the cloud went back to round %d; %d rounds are taken back", last, len(dropped))
        try:
            self.weights.revert(dropped)
        except IrreversibleError:
            self.weights.close()
            self.shard.reset()
            self._load_base(header)
            self.weights.apply(kept)
        self._journal.close()
        self._keep(create_journal(self._state, msgspec.structs.replace(header, epoch=welcome.epoch), kept))

    def _load_base(self, header: JournalHeader) -> None:
        """Weights as the journal's base has them, over those of the shard. Raises SnapshotError."""
        self.weights = self._new_weights(header.settings)
        if header.base_sha256:
            self.weights.load_state(self._read_snapshot(header))

    def _keep(self, journal: Journal) -> None:
        """Go on with this journal."""
        journal.sync_interval_s = self.settings.sync_interval_s
        self._journal = journal

    def _restart(self, header: JournalHeader, state: ClientState | None = None) -> None:
        """An empty journal, and the weights of the base shard or of a snapshot."""
        self._forget()
        weights = self._new_weights(header.settings)
        if state is not None:
            weights.load_state(state)
        self._keep(create_journal(self._state, header))
        self.weights = weights
        self._pace.replay_s = 0.0  # of another run
        drop_others(self._state, snapshot_path(self._state, header.base_sha256))

    def _new_weights(self, settings: RunSettings) -> ClientWeights:
        return make_client_weights(self.manifest, self.shard.weights, settings, self.settings.compute_threads)

    def _load_data(self, settings: RunSettings) -> None:
        if self.manifest.image is not None:
            image, positions = self.manifest.image, self.manifest.max_length
            train, held_out = self._data_paths
            self.train = load_images(train, settings.task, image, positions)
            self.eval = load_images(held_out, settings.task, image, positions) if held_out else None
            return
        shard = f"{self.manifest.shard_digest} {self.manifest.pad_token_id}"
        key = tokens_key(shard, self.data_digest + self.eval_digest, settings)
        splits = load_or_tokenize(self._state, key, self.manifest.pad_token_id, lambda: self._tokenize(settings))
        self.train, self.eval = splits["train"], splits.get("eval")
        # A vocabulary of 49,000 tokens is 30 MB that training has no use for.
        gc.collect()
        release_unused()

    def _tokenize(self, settings: RunSettings) -> Splits:
        tokenizer = _load_tokenizer(self._folder / SHARD_TOKENIZER)
        paths = dict(zip(("train", "eval"), self._data_paths, strict=True))
        return {
            split: load_dataset(path, settings.task, tokenizer, settings.max_length, self.manifest)
            for split, path in paths.items()
            if path is not None
        }

    def _open_shard(self, settings: RunSettings) -> None:
        self.shard.open()
        self.shard.max_length = settings.max_length
        set_bytes = settings.max_tokens * self.manifest.width * 4
        # A round holds the anchor's set, λ and with central differences the first of them (HO-SFL), or the set being
        # sent (HOSL); one more is in transit.
        held = (3 if settings.anchor == "midpoint" else 2) if settings.algorithm == "ho-sfl" else 1
        necessary = (held + 1) * set_bytes
        if self.manifest.prefix is not None:
            necessary += self.manifest.prefix.set_bytes(settings.batch_size, settings.max_length)
        trainable = sum(4 * int(np.prod(entry.shape)) for entry in self.manifest.trainable)
        untouched = 0 if self.applied_round else trainable
        budget = self.settings.memory_budget_bytes
        before = read_memory().anonymous
        self.shard.rows = choose_micro_batch(
            lambda rows: self._forward_rows(rows, settings.max_length),
            preferred_rows(settings, self.manifest.image),
            necessary + untouched,
            budget,
        )
        self.held_sets = useful_sets(settings)
        if budget is not None:
            anonymous = read_memory().anonymous
            free = budget - anonymous - spare_bytes(anonymous - before) - necessary - untouched
            # A central difference takes two sets to make, and one to keep.
            spare = free // set_bytes - (settings.anchor == "midpoint" and settings.algorithm == "ho-sfl")
            self.held_sets = max(0, min(self.held_sets, spare))
        log.info("micro-batch %d x %d tokens, %d held sets", self.shard.rows, settings.max_length, self.held_sets)

    def _forward_rows(self, rows: int, length: int) -> None:
        self.shard.rows = rows
        for _ in self.shard.forward(self._blank_batch(rows, length)):
            pass

    def _blank_batch(self, rows: int, length: int) -> AnyBatch:
        """Examples of full length that mean nothing."""
        if self.manifest.image is not None:
            return blank_images(rows, self.manifest.image, length)
        return Batch(np.zeros((rows, length), np.int64), np.full(rows, length, np.int32), np.zeros(rows, np.int32))

    def apply(self, updates: Sequence[UpdateRecord]) -> None:
        """Apply updates to the weights, in one pass where the optimizer allows it, then journal them."""
        assert self.weights is not None
        assert self._journal is not None
        known = len(self.weights.coarsenings)
        self._replay(updates)
        for event in self.weights.coarsenings[known:]:
            log.info("round %d: %s moves to a lattice of steps %.2g", event.round, event.tensor, event.spacing)
        self._journal.append(updates)

    def _replay(self, updates: Sequence[UpdateRecord]) -> None:
        assert self.weights is not None
        began = time.monotonic()
        self.weights.apply(updates)
        coefficients = sum(update.coefficients.size for update in updates)
        if coefficients >= RATED_COEFFICIENTS:
            self._pace.replay_s = (time.monotonic() - began) / coefficients

    def close(self) -> None:
        """Leave everything durable."""
        self._lock.close()
        if self._journal is not None:
            self._journal.close()
        if self.weights is not None:
            self.weights.close()


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing finer
        raise BundleError(f"{path} cannot be used ({error}): delete it and start again to fetch it") from error


def _lock(folder: Path) -> TextIO:
    """Only one agent may use a device's state; the lock is held as long as the file is open."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise SettingsError("name", folder.name, "another hosl-edge runs under it; choose another --name") from error
    return file
