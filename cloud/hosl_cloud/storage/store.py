"""The service's memory: runs, devices, rounds and updates in SQLite.

What a device is sent is durable here before: a method returns when its transaction is on disk (storage/database.py). It
may be called from any thread but that of an event loop; the threads take turns. Each method is one transaction, so that
a kill between two methods is all that a caller has to think of.

Of each round of a run one update is in force. Updates that a resume drops are marked superseded, never deleted, and
`cuts` remembers to which round: devices of a former epoch are led back by it (`lowest_rewind`). Those of first-order
training are large: `add_round` drops the numbers of one that nobody will replay (`Run.kept_updates`), and keeps its
figures.
"""

from __future__ import annotations

import dataclasses
import itertools
import sqlite3
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hosl_cloud.exceptions import RunNotFound
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.class_counts import ClassCounts
from hosl_cloud.storage.database import Database
from hosl_cloud.storage.records import (
    UNENDED,
    BegunBy,
    CurvePoint,
    DeviceRow,
    Evaluation,
    EventRow,
    NewEvent,
    RoundRow,
    RunRow,
    TokenRow,
)
from hosl_cloud.storage.stored_settings import read_stored
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.messages import Report

MOST_EVENTS = 10_000
"""Newest sentences of a run's log that stay; beside them as many that say how the run ended."""

_PRUNE_EVERY = 500
"""Sentences of a run between two looks at how many there are."""

_EVALUATION = tuple(field.name for field in dataclasses.fields(Evaluation) if field.name != "by_class")
"""An evaluation's columns, but for the one that is large."""

PORTION = 4096
"""Updates that a replay holds in memory."""


class Store(Database):
    """All that the service knows, by run."""

    def __init__(self, path: Path, *, reads_only: bool = False) -> None:
        super().__init__(path, reads_only=reads_only)
        self._unpruned: Counter[str] = Counter()
        """Sentences by run since its log was pruned."""

    def create_run(
        self, run: str, bundle: Path, shard_digest: str, config: RunConfig, begun_by: BegunBy = "start"
    ) -> None:
        """Add a pending run, at the end of the line."""
        now, text = time.time(), msgspec.json.encode(config).decode()
        with self._transaction() as database:
            database.execute(
                "INSERT INTO runs (id, created_at, queued_at, bundle, shard_digest, config, begun_by, state) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, 'pending')",
                (run, now, now, str(bundle), shard_digest, text, begun_by),
            )

    def run(self, run: str) -> RunRow:
        """Find a run by id. Raises RunNotFound."""
        found = self.find_run(run)
        if found is None:
            raise RunNotFound(run, self.run_ids())
        return found

    def find_run(self, run: str) -> RunRow | None:
        """Find a run by id; None where there is none."""
        rows = self._query("SELECT * FROM runs WHERE id = ?", (run,))
        return _run_row(rows[0]) if rows else None

    def runs(self) -> list[RunRow]:
        """List all runs, oldest first."""
        return [_run_row(row) for row in self._query("SELECT * FROM runs ORDER BY created_at, rowid")]

    def run_ids(self) -> list[str]:
        """List all runs' ids, oldest first."""
        return [row["id"] for row in self._query("SELECT id FROM runs ORDER BY created_at, rowid")]

    def set_state(self, run: str, state: str, reason: str = "") -> None:
        """Set a run's state: pending, running, paused, completed, failed or stopped."""
        with self._transaction() as database:
            database.execute("UPDATE runs SET state = ?, reason = ? WHERE id = ?", (state, reason, run))

    def queue_run(self, run: str) -> None:
        """Put a run that has stopped at the end of the line."""
        with self._transaction() as database:
            database.execute(
                "UPDATE runs SET state = 'pending', reason = '', queued_at = ? WHERE id = ?", (time.time(), run)
            )

    def remove_run(self, run: str) -> None:
        """Delete a run and all that is known of it."""
        with self._transaction() as database:
            # The run last: the others refer to it.
            for table in ("events", "cuts", "evaluations", "rounds", "devices"):
                database.execute(f"DELETE FROM {table} WHERE run = ?", (run,))
            database.execute("DELETE FROM runs WHERE id = ?", (run,))

    def add_events(self, events: Sequence[NewEvent]) -> None:
        """Add sentences to the runs' logs, in their order; the oldest make room. Those of a deleted run are dropped."""
        with self._transaction() as database:
            database.executemany(
                "INSERT INTO events (run, at, level, text, is_ending) "
                "SELECT :run, :at, :level, :text, :is_ending WHERE EXISTS (SELECT 1 FROM runs WHERE id = :run)",
                [dataclasses.asdict(event) for event in events],
            )

            for run, count in Counter(event.run for event in events).items():
                # The first look at a run is due at once: how many an earlier service left is not known.
                self._unpruned[run] = self._unpruned.get(run, _PRUNE_EVERY) + count
                if self._unpruned[run] > _PRUNE_EVERY:
                    _prune_events(database, run)
                    self._unpruned[run] = 0

    def events(self, run: str, after: int = 0, most: int = 1000) -> list[EventRow]:
        """Read a run's log after an event's id, `most` sentences of it."""
        rows = self._query(
            "SELECT id, at, level, text FROM events WHERE run = ? AND id > ? ORDER BY id LIMIT ?", (run, after, most)
        )
        return [EventRow(**dict(row)) for row in rows]

    def states(self) -> dict[str, int]:
        """Count the runs in each state."""
        rows = self._query("SELECT state, count(*) AS count FROM runs GROUP BY state")
        return {row["state"]: row["count"] for row in rows}

    def unfinished_runs(self) -> list[str]:
        """List runs that are to go on, in the order in which they have their turn."""
        rows = self._query("SELECT id FROM runs WHERE state IN (?, ?, ?) ORDER BY queued_at, rowid", UNENDED)
        return [row["id"] for row in rows]

    def line(self, shard_digest: str) -> list[str]:
        """List unfinished runs of one shard, in the order in which they have their turn."""
        sql = "SELECT id FROM runs WHERE shard_digest = ? AND state IN (?, ?, ?) ORDER BY queued_at, rowid"
        return [row["id"] for row in self._query(sql, (shard_digest, *UNENDED))]

    def rewind_run(self, run: str, round_: int) -> int:
        """Go on with a run after `round_`: what came later is marked superseded, and a new epoch begins; the epoch.

        Where nothing came later the epoch stays.
        """
        with self._transaction() as database:
            later = "run = ? AND round > ? AND NOT superseded"
            (count,) = database.execute(f"SELECT count(*) FROM rounds WHERE {later}", (run, round_)).fetchone()
            (epoch,) = database.execute("SELECT epoch FROM runs WHERE id = ?", (run,)).fetchone()

            # All that depends on the later rounds goes with them.
            database.execute(f"UPDATE rounds SET superseded = 1 WHERE {later}", (run, round_))
            database.execute(f"UPDATE evaluations SET superseded = 1 WHERE {later}", (run, round_))

            # Without rounds dropped no device is ahead, and all may go on in their epoch.
            if count:
                epoch += 1
                database.execute(
                    "INSERT INTO cuts (run, epoch, round, made_at) VALUES (?, ?, ?, ?)",
                    (run, epoch, round_, time.time()),
                )
            database.execute("UPDATE runs SET epoch = ?, round = ? WHERE id = ?", (epoch, round_, run))
        return int(epoch)

    def lowest_rewind(self, run: str, epoch: int) -> int | None:
        """Find the lowest round to which a run was rewound since `epoch`; None where it was not."""
        (row,) = self._query("SELECT min(round) AS round FROM cuts WHERE run = ? AND epoch > ?", (run, epoch))
        return None if row["round"] is None else int(row["round"])

    def set_roster(self, run: str, devices: Sequence[str]) -> None:
        """Store the devices with which a strict run began."""
        with self._transaction() as database:
            names = msgspec.json.encode(list(devices)).decode()
            database.execute("UPDATE runs SET roster = ? WHERE id = ?", (names, run))

    def roster(self, run: str) -> list[str]:
        """Read the devices with which a strict run began; empty before."""
        (row,) = self._query("SELECT roster FROM runs WHERE id = ?", (run,))
        names: list[str] = msgspec.json.decode(row["roster"])
        return names

    def add_round(
        self,
        run: str,
        epoch: int,
        update: UpdateRecord,
        *,
        seconds: float,
        loss: float,
        devices: Sequence[str],
        wire_bytes: int = 0,
        pruned: int = 0,
    ) -> None:
        """Add a finished round, its update, and what it took on the wire; durable when this returns.

        The numbers of the update of round `pruned` are dropped; 0 drops none.
        """
        # One row holds the update and its figures, and the run's round moves with it, in one transaction.
        coefficients, codes = update.coefficients.astype("<f4").tobytes(), update.codes.tobytes()
        names = msgspec.json.encode(list(devices)).decode()

        with self._transaction() as database:
            database.execute(
                "INSERT INTO rounds (run, epoch, round, finished_at, seconds, loss, devices, coefficients, "
                "learning_rate, wire_bytes, checksum, codes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    run,
                    epoch,
                    update.round,
                    time.time(),
                    seconds,
                    loss,
                    names,
                    coefficients,
                    update.learning_rate,
                    wire_bytes,
                    _checksum(update.round, update.learning_rate, coefficients, codes),
                    codes,
                ),
            )
            database.execute("UPDATE runs SET round = ? WHERE id = ?", (update.round, run))
            if pruned > 0:
                # Also that of a former epoch: its pages are written over by later ones.
                database.execute(
                    "UPDATE rounds SET coefficients = x'', codes = x'', is_pruned = 1 WHERE run = ? AND round = ?",
                    (run, pruned),
                )

    def updates(self, run: str, first: int, last: int) -> list[UpdateRecord]:
        """Read the updates in force of rounds `first` to `last`, but for those whose numbers were dropped.

        Raises StoreError for one that has changed on disk.
        """
        rows = self._query(
            "SELECT round, coefficients, learning_rate, checksum, codes FROM rounds "
            "WHERE run = ? AND round BETWEEN ? AND ? AND NOT superseded AND NOT is_pruned ORDER BY round",
            (run, first, last),
        )

        for round_, coefficients, rate, checksum, codes in rows:
            # Updates that were written before there were checksums have none.
            if checksum is not None and _checksum(round_, rate, coefficients, codes) != checksum:
                raise self._damaged(f"the update of round {round_}")

        return [
            UpdateRecord(
                row["round"],
                np.frombuffer(row["coefficients"], "<f4"),
                row["learning_rate"],
                np.frombuffer(row["codes"], np.uint8),
            )
            for row in rows
        ]

    def pruned_to(self, run: str) -> int:
        """Find the last round in force whose update has lost its numbers; 0 where none has."""
        sql = "SELECT max(round) AS round FROM rounds WHERE run = ? AND is_pruned AND NOT superseded"
        (row,) = self._query(sql, (run,))
        return int(row["round"] or 0)

    def replay(self, run: str, last: int, after: int = 0) -> Iterator[UpdateRecord]:
        """Yield the updates in force of the rounds after `after` up to `last`, read a portion at a time.

        Raises StoreError for what is not there or has changed on disk: a replay with a gap would end in other weights.
        """
        # A portion at a time, so that memory does not grow with the run.
        for first in range(after + 1, last + 1, PORTION):
            wanted = range(first, min(first + PORTION, last + 1))
            updates = self.updates(run, wanted[0], wanted[-1])

            for round_, update in itertools.zip_longest(wanted, updates):
                if update is None or update.round != round_:
                    raise self._damaged(f"the update of round {round_} is missing")
                yield update

    def rounds(self, run: str, after: int = 0, most: int = -1) -> list[RoundRow]:
        """Read the rounds in force after a round; `most` of them, below zero all."""
        rows = self._query(
            "SELECT round, loss, seconds, wire_bytes, finished_at FROM rounds "
            "WHERE run = ? AND round > ? AND NOT superseded ORDER BY round LIMIT ?",
            (run, after, most),
        )
        return [RoundRow(**dict(row)) for row in rows]

    def curve(self, run: str, after: int, width: int) -> list[CurvePoint]:
        """Read the rounds in force after a round, each `width` of them as one point: 1 to `width`, and so on."""
        rows = self._query(
            "SELECT max(round) AS round, count(*) AS rounds, avg(loss) AS loss, min(loss) AS low, max(loss) AS high, "
            "avg(seconds) AS seconds, avg(wire_bytes) AS wire_bytes FROM rounds "
            "WHERE run = ? AND round > ? AND NOT superseded GROUP BY (round - 1) / ? ORDER BY 1",
            (run, after, width),
        )
        return [CurvePoint(**dict(row)) for row in rows]

    def add_evaluation(self, run: str, epoch: int, evaluation: Evaluation) -> None:
        """Add the result of an evaluation; a repeat at the same round replaces it."""
        by_class = None if evaluation.by_class is None else evaluation.by_class.encode()
        with self._transaction() as database:
            # The same round may have been scored before a resume; one score of a round is in force.
            database.execute(
                "UPDATE evaluations SET superseded = 1 WHERE run = ? AND round = ? AND epoch < ?",
                (run, evaluation.round, epoch),
            )

            database.execute(
                f"INSERT OR REPLACE INTO evaluations (run, epoch, {', '.join(_EVALUATION)}, by_class) "
                f"VALUES (?, ?, {', '.join('?' * len(_EVALUATION))}, ?)",
                (run, epoch, *(getattr(evaluation, name) for name in _EVALUATION), by_class),
            )

    def evaluations(self, run: str, newest: int = -1) -> list[Evaluation]:
        """Read the evaluations in force, in order, without counts by class; the `newest` of them, below zero all."""
        rows = self._query(
            f"SELECT {', '.join(_EVALUATION)} FROM evaluations "
            "WHERE run = ? AND NOT superseded ORDER BY round DESC LIMIT ?",
            (run, newest),
        )
        return [Evaluation(**dict(row)) for row in reversed(rows)]

    def evaluation(self, run: str, round_: int) -> Evaluation | None:
        """Read the evaluation in force of a round, with its counts by class; None where there is none.

        Raises StoreError for counts that have changed on disk.
        """
        rows = self._query(
            f"SELECT {', '.join(_EVALUATION)}, by_class FROM evaluations "
            "WHERE run = ? AND round = ? AND NOT superseded",
            (run, round_),
        )
        for row in rows:
            figures = {name: row[name] for name in _EVALUATION}
            try:
                by_class = None if row["by_class"] is None else ClassCounts.decode(row["by_class"])
            except ValueError as error:
                raise self._damaged(f"the counts by class of round {round_}") from error
            return Evaluation(**figures, by_class=by_class)
        return None

    def add_device(self, run: str, name: str) -> int:
        """Note a device that says Hello; how many connections it has made."""
        with self._transaction() as database:
            database.execute(
                "INSERT INTO devices (run, name, data_digest, joined_at, last_seen, connections) "
                "VALUES (:run, :name, '', :now, :now, 1) ON CONFLICT (run, name) "
                "DO UPDATE SET connections = connections + 1, last_seen = :now",
                {"run": run, "name": name, "now": time.time()},
            )
            # In the same transaction: two connections of one device at once count apart.
            row = database.execute("SELECT connections FROM devices WHERE run = ? AND name = ?", (run, name)).fetchone()
        return int(row["connections"])

    def add_kept_device(self, run: str, name: str, train: int, held_out: int, digest: str, eval_digest: str) -> None:
        """Note a device that takes part without being there; nothing changes where it is known."""
        with self._transaction() as database:
            database.execute(
                "INSERT INTO devices (run, name, data_digest, joined_at, last_seen, connections) "
                "VALUES (:run, :name, :digest, :now, :now, 0) ON CONFLICT (run, name) DO NOTHING",
                {"run": run, "name": name, "digest": digest, "now": time.time()},
            )
            database.execute(
                "UPDATE devices SET train_examples = ?, eval_examples = ?, eval_digest = ? "
                "WHERE run = ? AND name = ? AND connections = 0",
                (train, held_out, eval_digest, run, name),
            )

    def device(self, run: str, name: str) -> DeviceRow | None:
        """Find a device that has joined the run; None for a new one."""
        sql = "SELECT data_digest, eval_digest, strikes FROM devices WHERE run = ? AND name = ?"
        rows = self._query(sql, (run, name))
        return DeviceRow(**dict(rows[0])) if rows else None

    def held_out(self, run: str) -> dict[str, int]:
        """Count the held-out examples that each device had when it was ready last, but for those at fault."""
        sql = "SELECT name, eval_examples FROM devices WHERE run = ? AND eval_examples > 0 AND strikes = 0"
        rows = self._query(sql, (run,))
        return {row["name"]: row["eval_examples"] for row in rows}

    def set_token(self, row: TokenRow) -> None:
        """Store a device's token, in place of the one before."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?, ?, ?)", dataclasses.astuple(row))

    def tokens(self) -> list[TokenRow]:
        """List every token, also the revoked ones."""
        return [TokenRow(**dict(row)) for row in self._query("SELECT * FROM tokens ORDER BY name")]

    def add_strike(self, run: str, name: str) -> int:
        """Count a fault against a device; how many there are now."""
        with self._transaction() as database:
            database.execute("UPDATE devices SET strikes = strikes + 1 WHERE run = ? AND name = ?", (run, name))
            row = database.execute("SELECT strikes FROM devices WHERE run = ? AND name = ?", (run, name)).fetchone()
        return int(row["strikes"]) if row else 0

    def set_data(self, run: str, name: str, train: int, held_out: int, digest: str, eval_digest: str) -> None:
        """Note the data of a device that is ready, and the digests of both parts: it is bound to them from here on."""
        with self._transaction() as database:
            database.execute(
                "UPDATE devices SET train_examples = ?, eval_examples = ?, data_digest = ?, eval_digest = ? "
                "WHERE run = ? AND name = ?",
                (train, held_out, digest, eval_digest, run, name),
            )

    def set_reports(self, reports: Mapping[str, Report]) -> None:
        """Store devices' newest reports by name, all in one transaction."""
        with self._transaction() as database:
            database.executemany(
                "UPDATE devices SET applied_round = ?, step_seconds = ?, peak_rss_bytes = ?, anonymous_bytes = ?, "
                "sent_bytes = ?, received_bytes = ?, temperature_c = ?, last_seen = ? WHERE run = ? AND name = ?",
                [
                    (
                        report.applied_round,
                        report.step_seconds,
                        report.peak_rss_bytes,
                        report.anonymous_bytes,
                        report.sent_bytes,
                        report.received_bytes,
                        report.temperature_c,
                        time.time(),
                        report.run,
                        name,
                    )
                    for name, report in reports.items()
                ],
            )

    def devices(self, run: str) -> list[dict[str, Any]]:
        """Read the run's devices with their newest figures."""
        return [dict(row) for row in self._query("SELECT * FROM devices WHERE run = ? ORDER BY name", (run,))]


def _run_row(row: sqlite3.Row) -> RunRow:
    return RunRow(
        id=row["id"],
        bundle=Path(row["bundle"]),
        shard_digest=row["shard_digest"],
        settings=read_stored(row["config"]),
        state=row["state"],
        epoch=row["epoch"],
        round=row["round"],
        reason=row["reason"],
        created_at=row["created_at"],
        begun_by=row["begun_by"],
    )


def _prune_events(database: sqlite3.Connection, run: str) -> None:
    """Delete a run's oldest sentences; those that say how it ended are counted apart."""
    for is_ending in (0, 1):
        rows = "SELECT id FROM events WHERE run = :run AND is_ending = :is_ending"
        database.execute(
            f"DELETE FROM events WHERE id IN ({rows} ORDER BY id DESC LIMIT -1 OFFSET :most)",
            {"run": run, "is_ending": is_ending, "most": MOST_EVENTS},
        )


def _checksum(round_: int, learning_rate: float, coefficients: bytes, codes: bytes) -> int:
    """Make the CRC-32 of an update: SQLite would not notice a bit that has changed on disk."""
    return zlib.crc32(codes, zlib.crc32(coefficients, zlib.crc32(struct.pack("<qd", round_, learning_rate))))
