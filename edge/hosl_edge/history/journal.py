"""The journal: every update that the weights have taken, a few bytes a round, append-only, with checksums.

State = shard (or the snapshot that the header names) + journal. A record that a crash cut short, and all after it, is
dropped at the next start. Updates that are gradients are large, and a flash card wears out: of them the journal takes
the first MAX_GRADIENT_BYTES, and what came later comes again from the cloud where it is needed. Written in worker
threads, by one call at a time (history.py).
Layout: a header record (JSON), then update records; each is length u32, CRC-32 u32, payload, little-endian.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from hosl_edge.exceptions import JournalError
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.updates import UpdateShape
from hosl_protocol.weights.estimates import UpdateRecord

log = logging.getLogger(__name__)

SYNC_INTERVAL_S = 30.0
"""Longest time in which updates may be only in the kernel's memory; newer ones come again from the cloud."""

MAX_GRADIENT_BYTES = 4_000_000
"""Of a journal whose updates are gradients: a snapshot from the cloud, or the updates again, is as good."""

MAX_RECORD_BYTES = 16 * 1024 * 1024
_PIECE_BYTES = 64 * 1024

_FRAME = struct.Struct("<II")
_UPDATE = struct.Struct("<Qd")


class JournalHeader(msgspec.Struct, kw_only=True, frozen=True):
    """What the updates belong to."""

    run: str
    epoch: int
    shard_digest: str
    data_digest: str
    settings: RunSettings
    width: int
    update: UpdateShape | None = None
    """Sizes of an update; None in journals that were written when each had its directions alone."""
    base_round: int = 0
    """The round that the first update follows; 0 is the shard."""
    base_sha256: str = ""
    """Digest of the snapshot file of that round; empty with round 0."""

    def belongs_with(self, other: JournalHeader) -> bool:
        """Whether both are of one run, wherever their updates begin and in whichever epoch."""
        return self.rebased(other) == other

    def rebased(self, other: JournalHeader) -> JournalHeader:
        """This header with the base and the epoch of another."""
        return msgspec.structs.replace(
            self,
            epoch=other.epoch,
            base_round=other.base_round,
            base_sha256=other.base_sha256,
            update=other.update,
        )

    @property
    def update_shape(self) -> UpdateShape:
        """Sizes of an update."""
        if self.update is not None:
            return self.update
        return UpdateShape(coefficients=self.settings.directions if self.settings.traits.trains_client else 0)


# Made here, on import: threads that use a type for the first time at once crash msgspec.
_HEADER = msgspec.json.Decoder(JournalHeader)


class Journal:
    """One run's journal, open for appending.

    What a full disk does not take waits in memory for room: a device that ends before gets it from the cloud again.
    """

    def __init__(self, path: Path, header: JournalHeader, header_bytes: int, count: int) -> None:
        self.path = path
        self.header = header
        self._header_bytes = header_bytes
        self._count = count
        self.sync_interval_s = SYNC_INTERVAL_S
        # Unbuffered: what a write takes is in the kernel's memory, which outlives the process.
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        self._is_refused = False
        self._is_full = False
        self._synced_at = time.monotonic()

    @property
    def last_round(self) -> int:
        """The last round that it holds; a device may stand at a later one, where the journal is full."""
        return self.header.base_round + self._count

    def append(self, updates: Sequence[UpdateRecord]) -> None:
        """Add updates, as many as it may take; synced to disk at most `sync_interval_s` later."""
        taken = updates
        if self.header.settings.traits.sends_gradient:
            size = _FRAME.size + _update_bytes(self.header)
            taken = updates[: max(0, MAX_GRADIENT_BYTES // size - self._count)]
        if len(taken) < len(updates) and not self._is_full:
            last = self.last_round + len(taken)
            log.info("%s is full: a start goes on at round %d, and gets the rest from the cloud", self.path, last)
            self._is_full = True

        self._count += len(taken)
        self._unwritten += b"".join(_record(_encode_update(update)) for update in taken)
        self._flush(syncs=time.monotonic() - self._synced_at >= self.sync_interval_s)

    def updates(self, first: int = 0, last: int | None = None) -> Iterator[UpdateRecord]:
        """Read the updates of rounds `first` to `last`, by default all; also what no disk has taken yet."""
        # Records have one size, so that the first wanted one is found without reading those before it.
        skipped = max(0, first - self.header.base_round - 1)
        start = self._header_bytes + skipped * (_FRAME.size + _update_bytes(self.header))
        for _, payload in _records(self._pieces(start)):
            update = _decode_update(payload, self.header.update_shape)
            if last is not None and update.round > last:
                return
            yield update

    def _pieces(self, start: int) -> Iterator[bytes]:
        written = self.path.stat().st_size
        yield from _read(self.path, start)
        yield self._unwritten[max(0, start - written) :]

    def close(self) -> None:
        """Sync and close."""
        if not self._file.closed:
            self._flush(syncs=True)
            self._file.close()

    def _flush(self, *, syncs: bool) -> None:
        try:
            # A full disk may take a part, and the rest once there is room.
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

            if syncs:
                os.fsync(self._file.fileno())
                self._synced_at = time.monotonic()
        # The weights have the update already, and the cloud has it: training goes on.
        except OSError as error:
            if not self._is_refused:
                log.warning("%s cannot be written (%s); what is not in it comes again from the cloud", self.path, error)
            self._is_refused = True
        else:
            self._is_refused = False


class NewJournal:
    """A journal that is written, and takes the place of any other once it is wanted."""

    def __init__(self, folder: Path, header: JournalHeader, updates: Iterable[UpdateRecord] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._header = journal_path(folder), header
        first = _record(msgspec.json.encode(header))
        self._header_bytes = len(first)
        self.count = 0
        """How many updates it holds."""

        try:
            with self._new.open("wb") as file:
                file.write(first)
                for update in updates:
                    file.write(_record(_encode_update(update)))
                    self.count += 1
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            self._new.unlink(missing_ok=True)
            raise

    @property
    def _new(self) -> Path:
        return self._path.with_suffix(".new")

    def install(self) -> Journal:
        """Put it in the place of the journal; atomic."""
        self._new.replace(self._path)
        return Journal(self._path, self._header, self._header_bytes, self.count)


def create_journal(folder: Path, header: JournalHeader, updates: Iterable[UpdateRecord] = ()) -> Journal:
    """Make a journal with these updates, in place of any other; atomic."""
    return NewJournal(folder, header, updates).install()


def open_journal(folder: Path) -> Journal | None:
    """Open the journal in `folder`, its torn tail cut off; None where there is none that can be used.

    One that is damaged, and not only torn, is kept as `journal.damaged`: nothing of it is needed, for the cloud has it
    all. Raises JournalError where it cannot be read.
    """
    path = journal_path(folder)

    try:
        return _open(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(path, error.strerror or str(error)) from error


def _open(path: Path) -> Journal | None:
    records = _records(_read(path, 0))
    header_bytes, payload = next(records, (0, b""))
    header = _decode_header(payload)
    if header is None:
        _keep_damaged(path, "no readable header")
        return None

    update_bytes, good_bytes, count = _update_bytes(header), header_bytes, 0
    for end, payload in records:
        if len(payload) != update_bytes:  # no update of this run
            break
        good_bytes, count = end, count + 1

    # A crash cuts one record short at most: where more follows the last good one, the disk has lost something.
    if _end_of_data(path, good_bytes) - good_bytes > _FRAME.size + update_bytes:
        _keep_damaged(path, f"a damaged record after update {count}")
    if good_bytes < path.stat().st_size:
        os.truncate(path, good_bytes)
    return Journal(path, header, header_bytes, count)


def _update_bytes(header: JournalHeader) -> int:
    return _UPDATE.size + header.update_shape.size_bytes


def _end_of_data(path: Path, start: int) -> int:
    """Find where the zeros begin that a power cut may leave at the end."""
    end = place = start
    for piece in _read(path, start):
        if data := piece.rstrip(b"\0"):
            end = place + len(data)
        place += len(piece)
    return end


def _decode_header(payload: bytes) -> JournalHeader | None:
    try:
        return _HEADER.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _keep_damaged(path: Path, problem: str) -> None:
    """Keep a copy of what is about to be cut or replaced."""
    kept = path.with_suffix(".damaged")
    shutil.copyfile(path, kept)
    log.warning("%s has %s; it is kept as %s, and what is missing comes again from the cloud", path, problem, kept.name)


def journal_path(folder: Path) -> Path:
    """Where the journal is."""
    return folder / "journal"


def _record(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _read(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _records(pieces: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield end offset and payload of every whole record, up to the first that is not."""
    data, place, passed = b"", 0, 0  # what is at hand, how far into it we are, and what came before it

    for piece in pieces:
        data, place, passed = data[place:] + piece, 0, passed + place
        while place + _FRAME.size <= len(data):
            length, checksum = _FRAME.unpack_from(data, place)
            # Zeros, which a power cut may leave at the end, would be records without payload.
            if not 0 < length <= MAX_RECORD_BYTES:
                return
            payload = data[place + _FRAME.size : place + _FRAME.size + length]
            if len(payload) < length:
                break
            if zlib.crc32(payload) != checksum:
                return
            place += _FRAME.size + length
            yield passed + place, payload


def _encode_update(update: UpdateRecord) -> bytes:
    numbers = update.coefficients.astype("<f4").tobytes() + update.codes.tobytes()
    return _UPDATE.pack(update.round, update.learning_rate) + numbers


def _decode_update(payload: bytes, shape: UpdateShape) -> UpdateRecord:
    round_, learning_rate = _UPDATE.unpack_from(payload)
    coefficients = np.frombuffer(payload, "<f4", shape.coefficients, _UPDATE.size)
    codes = np.frombuffer(payload, np.uint8, offset=_UPDATE.size + 4 * shape.coefficients)
    return UpdateRecord(round_, coefficients, learning_rate, codes)
