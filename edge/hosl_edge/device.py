"""What the device is between connections: its shard, its history, its data.

One session at a time uses it, from worker threads: what computes or reads files must stay off the event loop. Two calls
never overlap, because a session handles one message after the other. Only `close` is called on the event loop, when no
session is left that could wait for it. A lock on the state folder keeps other agents
out for as long as the device is open; without it two would write one journal.
"""

from __future__ import annotations

import fcntl
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

import msgspec
import numpy as np

from hosl_edge.connection.catch_up_speed import CatchUpSpeed, load_link, measure_replay_s, save_link
from hosl_edge.data.consent import check_consent
from hosl_edge.data.datasets import Batch, Dataset, TextBatch
from hosl_edge.data.images import blank_images, load_images
from hosl_edge.data.records import digest_of_data
from hosl_edge.data.texts import load_texts, opened_tokenizer
from hosl_edge.data.token_cache import Splits, load_or_tokenize, tokens_key
from hosl_edge.exceptions import ConnectionLost, RefusedError, SnapshotError, UnservedError
from hosl_edge.history.history import FetchSnapshot, History
from hosl_edge.history.journal import JournalHeader
from hosl_edge.history.snapshot import check_size, snapshot_path
from hosl_edge.model.graph import describe_computer
from hosl_edge.model.memory import plan_memory, release_unused
from hosl_edge.model.prefix_cache import NO_FROZEN_BLOCKS, open_cache, remove_cache
from hosl_edge.model.shard import Shard
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import HoslError, ProtocolError, SettingsError
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.settings import RunSettings, check_run
from hosl_protocol.weights.client_weights import ClientWeights
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.messages import Snapshot, Welcome

log = logging.getLogger(__name__)


class Device:
    """State that outlives a connection. Its methods compute and read files: all but `close` want a worker thread."""

    def __init__(self, settings: EdgeSettings, folder: Path, manifest: Manifest) -> None:
        self.settings = settings
        self.manifest = manifest
        self.shard = Shard(folder, manifest, settings.compute_threads)
        train, held_out = self._data_paths

        self.data_digest = digest_of_data(train)
        self.eval_digest = digest_of_data(held_out) if held_out else ""
        self.train: Dataset | None = None
        self.eval: Dataset | None = None
        self.held_sets = 0
        """Activation sets beyond the necessary one that the memory budget lets a round hold."""

        self.cache_sentence = ""
        """For people: what is kept of the frozen blocks, or why nothing is; empty where nobody asked for it."""
        self._cache_written = 0
        """Bytes that former caches wrote."""

        self._folder = folder
        self._state = Path(settings.state_dir) / settings.name
        self._lock = _lock(self._state)
        self._history = History(self._state, self.shard, manifest, settings.compute_threads, settings.sync_interval_s)
        self._loaded_for: RunSettings | None = None
        """What the data is tokenized for, and the micro-batches are chosen for."""
        self._takes_snapshots = True
        self._link_bytes_per_s = load_link(self._state)

        try:
            self._history.recover()
        # Nobody gets this object to close it: the next try must find the folder unlocked.
        except BaseException:
            self._lock.close()
            raise

    @property
    def _data_paths(self) -> tuple[Path, Path | None]:
        return Path(self.settings.data), Path(self.settings.eval) if self.settings.eval else None

    @property
    def header(self) -> JournalHeader | None:
        """The run that the weights belong to."""
        return self._history.header

    @property
    def weights(self) -> ClientWeights | None:
        """None before a run is joined."""
        return self._history.weights

    @property
    def applied_round(self) -> int:
        """The last round in the weights."""
        return self._history.applied_round

    def digest(self) -> str:
        """Digest of the weights; empty before a run is joined."""
        return self.weights.digest() if self.weights else ""

    def catch_up_speed(self) -> CatchUpSpeed:
        """Tell how fast this device catches up; nothing is known where it cannot take a snapshot."""
        if not self._takes_snapshots:
            return CatchUpSpeed()
        # The last long replay tells it best; before the first one a sample must do.
        if not self._history.replay_s:
            settings = self.header.settings if self.header else None
            sizes = [math.prod(entry.shape) for entry in self.manifest.trainable]
            self._history.replay_s = measure_replay_s(sizes, settings, self.settings.compute_threads)
        return CatchUpSpeed(replay_s=self._history.replay_s, link_bytes_per_s=self._link_bytes_per_s)

    def note_link(self, link_bytes_per_s: float) -> None:
        """Remember how fast a download came."""
        self._link_bytes_per_s = link_bytes_per_s
        save_link(self._state, link_bytes_per_s)

    def join(self, welcome: Welcome, fetch: FetchSnapshot) -> None:
        """Take on the run of a Welcome: history, data, micro-batches.

        Raises DataError, ConsentError, UnservedError, SettingsError, MemoryBudgetError, SnapshotError, HistoryError,
        and what `fetch` raises where the cloud is away.
        """
        try:
            check_run(welcome.settings, self.manifest)
        except SettingsError as error:
            raise UnservedError(error) from error
        own = self.settings
        check_consent(welcome.settings.task, own.fields, share_text=own.share_text, share_fields=own.share_fields)

        header = JournalHeader(
            run=welcome.run,
            epoch=welcome.epoch,
            shard_digest=self.manifest.shard_digest,
            data_digest=self.data_digest,
            settings=welcome.settings,
            width=welcome.width,
            update=welcome.update,
        )

        is_loaded = self._loaded_for == welcome.settings
        if not is_loaded:
            self._loaded_for = None  # until all is ready, for data and micro-batches change one after the other
            self._load_data(welcome.settings)  # first: data that cannot be used must not cost the journal
            self._open_cache(welcome.settings)

        if welcome.plan == "snapshot":
            self._go_on_from(header, welcome.snapshot, fetch)
        # A journal of another run, or of other data, has nothing to go on from, whatever the cloud believes.
        elif welcome.plan == "rebuild" or self.header is None or not self.header.belongs_with(header):
            self._history.restart(header)
        # The epoch may grow without a round taken back; the journal must say which one it is of.
        elif welcome.plan == "rewind" or self.header.epoch != header.epoch:
            last = welcome.rewind_to if welcome.plan == "rewind" else self.applied_round
            header = msgspec.structs.replace(header.rebased(self.header), epoch=welcome.epoch)
            self._history.rewind(header, last)

        # Last: what the plan measures depends on whether the weights have been written yet.
        if not is_loaded:
            self._open_shard(welcome.settings)
            self._loaded_for = welcome.settings

    def _go_on_from(self, header: JournalHeader, snapshot: Snapshot | None, fetch: FetchSnapshot) -> None:
        """Go on from a snapshot. Until it is here and whole, weights and journal stay as they are.

        Raises SnapshotError for one that cannot be used: from then on this device replays.
        """
        if snapshot is None:
            raise ProtocolError("welcome with the plan snapshot and no snapshot")
        check_size(snapshot, self.manifest)

        try:
            self._history.rebase(header, snapshot, fetch)
        except (ConnectionLost, RefusedError):
            raise  # says nothing of the snapshot itself
        except HoslError as error:
            self._takes_snapshots = False
            if isinstance(error, SnapshotError):
                raise
            raise SnapshotError(snapshot_path(self._state, snapshot.sha256), str(error)) from error

    def _load_data(self, settings: RunSettings) -> None:
        if self.manifest.image is not None:
            image, positions = self.manifest.image, self.manifest.max_length
            train, held_out = self._data_paths
            facts = (settings.task, image, positions)
            load = partial(load_images, skip_broken=self.settings.skip_broken)
            self.train, self.eval = load(train, *facts), load(held_out, *facts) if held_out else None
            return

        shard = f"{self.manifest.shard_digest} {self.manifest.pad_token_id}"
        key = tokens_key(shard, self.data_digest + self.eval_digest, settings)
        splits = load_or_tokenize(self._state, key, self.manifest.pad_token_id, lambda: self._tokenize(settings))
        self.train, self.eval = splits["train"], splits.get("eval")

        # A vocabulary of 49,000 tokens is 30 MB that training has no use for.
        release_unused()

    def _tokenize(self, settings: RunSettings) -> Splits:
        files = dict(zip(("train", "eval"), self._data_paths, strict=True))
        with opened_tokenizer(self._folder, settings.task) as (tokenizer, text_form):
            return {
                split: load_texts(file, settings.task, tokenizer, settings.max_length, self.manifest, text_form)
                for split, file in files.items()
                if file is not None
            }

    def _open_cache(self, settings: RunSettings) -> None:
        """Let the shard keep what its frozen blocks compute, if the device's owner wants it and the shard has such."""
        self._close_cache()
        budget_bytes = self.settings.cache_budget_bytes
        if not budget_bytes:
            if budget_bytes == 0:
                remove_cache(self._state)
            return
        if self.manifest.prefix is None:
            self.cache_sentence = f"cache_budget keeps nothing: {NO_FROZEN_BLOCKS}"
            return

        assert self.train is not None
        digests = self.data_digest, self.eval_digest
        computer = describe_computer(self.settings.compute_threads)
        opened = open_cache(
            self._state, budget_bytes, self.manifest, settings, digests, computer, self.train, self.eval
        )
        self.shard.cache, self.train, self.eval = opened.cache, opened.train, opened.held_out
        self.cache_sentence = opened.sentence

    def _close_cache(self) -> None:
        if self.shard.cache is not None:
            self._cache_written += self.shard.cache.written_bytes
            self.shard.cache.close()
        self.shard.cache, self.cache_sentence = None, ""

    @property
    def cache_written_bytes(self) -> int:
        """Bytes written to the cache of frozen blocks since this device was opened."""
        return self._cache_written + (self.shard.cache.written_bytes if self.shard.cache is not None else 0)

    def _open_shard(self, settings: RunSettings) -> None:
        self.shard.open(with_gradients=settings.traits.sends_gradient)
        self.shard.max_length = settings.max_length
        trainable_bytes = sum(4 * math.prod(entry.shape) for entry in self.manifest.trainable)
        # Trainable pages are copied when they are first written, which an update has done and a fresh shard has not.
        untouched_bytes = 0 if self.applied_round else trainable_bytes

        def forward_rows(rows: int) -> None:
            self.shard.rows = rows
            self.shard.rehearse(self._blank_batch(rows, settings.max_length))

        plan = plan_memory(
            settings,
            self.manifest,
            forward_rows,
            untouched_bytes,
            self.settings.memory_budget_bytes,
            self.shard.kept_bytes(settings.batch_size, settings.max_length),
        )
        self.shard.rows, self.held_sets = plan.rows, plan.held_sets
        log.info("micro-batch %d x %d tokens, %d held sets", self.shard.rows, settings.max_length, self.held_sets)

    def _blank_batch(self, rows: int, length: int) -> Batch:
        """Make examples of full length that mean nothing."""
        if self.manifest.image is not None:
            return blank_images(rows, self.manifest.image, length)
        return TextBatch(np.zeros((rows, length), np.int64), np.full(rows, length, np.int32), np.zeros(rows, np.int32))

    def apply(self, updates: Sequence[UpdateRecord]) -> None:
        """Apply updates to the weights, then journal them."""
        self._history.apply(updates)

    def close(self) -> None:
        """Leave everything durable."""
        self._close_cache()
        self._history.close()
        self._lock.close()


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
