"""The service's memory: runs, devices, rounds and updates in SQLite. What a device is sent is durable here before.

Updates that a resume drops are marked superseded, never deleted.
"""

from __future__ import annotations

import dataclasses
import itertools
import sqlite3
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hosl_cloud.exceptions import RunNotFound, StoreError
from hosl_cloud.records import UNENDED, BegunBy, DeviceRow, Evaluation, EventRow, RoundRow, RunRow, TokenRow
from hosl_cloud.schema import migrate
from hosl_cloud.settings import RunConfig
from hosl_protocol import Report, UpdateRecord

# Made here, on import: threads that use a type for the first time at once crash msgspec.
_CONFIG = msgspec.json.Decoder(RunConfig)

PORTION = 4096
"""Updates that a replay holds in memory."""


class Store:
    """One database file; its methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with self._named_errors():
            self._database = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
            try:
                self._database.row_factory = sqlite3.Row
                self._check_file()
                self._database.execute("PRAGMA journal_mode = WAL")
                self._database.execute("PRAGMA synchronous = FULL")
                self._database.execute("PRAGMA foreign_keys = ON")
                migrate(self._database, path)
            except BaseException:
                self._database.close()
                raise

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StoreError(f"{self._path}: {error}: check that it is a file, may be written, and has room") from error
        except sqlite3.Error as error:
            if type(error) is sqlite3.DatabaseError:
                raise self._damaged(str(error)) from error
            raise StoreError(f"{self._path}: {error}") from error

    def _damaged(self, problem: str) -> StoreError:
        remedy = "restore it from a copy, or begin anew in another --data-dir"
        return StoreError(f"{self._path} is damaged ({problem}): {remedy}; it was left as it is")

    def _check_file(self) -> None:
        """Refuse, before anything is written, what is damaged or is not ours."""
        names = {row["name"] for row in self._database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if names and "runs" not in names:
            raise StoreError(f"{self._path} is a database of something else: choose another --data-dir")
        if not names and any((self._path.parent / "runs").glob("*/epoch-*")):
            raise self._damaged("it is empty, and there are checkpoints of runs beside it")
        (verdict,) = self._database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._damaged(" ".join(verdict.split()))

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._named_errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                self._database.execute("ROLLBACK")
                raise

    def _query(self, sql: str, arguments: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._lock, self._named_errors():
            return self._database.execute(sql, arguments).fetchall()

    def create_run(
        self, run: str, bundle: Path, shard_digest: str, config: RunConfig, begun_by: BegunBy = "start"
    ) -> None:
        """Add a pending run."""
        with self._transaction() as database:
            now, text = time.time(), msgspec.json.encode(config).decode()
            database.execute(
                "INSERT INTO runs (id, created_at, queued_at, bundle, shard_digest, config, begun_by, state) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, 'pending')",
                (run, now, now, str(bundle), shard_digest, text, begun_by),
            )

    def run(self, run: str) -> RunRow:
        """A run by id. Raises RunNotFound."""
        rows = self._query("SELECT * FROM runs WHERE id = ?", (run,))
        if not rows:
            raise RunNotFound(run, self.run_ids())
        row = rows[0]
        try:
            config = _CONFIG.decode(row["config"])
        except (msgspec.DecodeError, TypeError) as error:
            raise self._damaged(f"settings of run {run}: {error}") from error
        return RunRow(
            id=row["id"],
            bundle=Path(row["bundle"]),
            shard_digest=row["shard_digest"],
            config=config,
            state=row["state"],
            epoch=row["epoch"],
            round=row["round"],
            reason=row["reason"],
            created_at=row["created_at"],
            begun_by=row["begun_by"],
        )

    def run_ids(self) -> list[str]:
        """All runs, oldest first."""
        return [row["id"] for row in self._query("SELECT id FROM runs ORDER BY created_at")]

    def set_state(self, run: str, state: str, reason: str = "") -> None:
        """pending, running, paused, completed, failed or stopped."""
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
            for table in ("events", "cuts", "evaluations", "rounds", "devices"):
                database.execute(f"DELETE FROM {table} WHERE run = ?", (run,))
            database.execute("DELETE FROM runs WHERE id = ?", (run,))

    def add_event(self, run: str, level: str, text: str) -> None:
        """A sentence for the run's log."""
        with self._transaction() as database:
            database.execute(
                "INSERT INTO events (run, at, level, text) VALUES (?, ?, ?, ?)", (run, time.time(), level, text)
            )

    def events(self, run: str, after: int = 0, most: int = 1000) -> list[EventRow]:
        """The run's log after an event's id, `most` sentences of it."""
        rows = self._query(
            "SELECT id, at, level, text FROM events WHERE run = ? AND id > ? ORDER BY id LIMIT ?", (run, after, most)
        )
        return [EventRow(**dict(row)) for row in rows]

    def states(self) -> dict[str, int]:
        """How many runs are in each state."""
        rows = self._query("SELECT state, count(*) AS count FROM runs GROUP BY state")
        return {row["state"]: row["count"] for row in rows}

    def unfinished_runs(self) -> list[str]:
        """Runs that a service left open when it stopped, oldest first."""
        rows = self._query("SELECT id FROM runs WHERE state IN (?, ?, ?) ORDER BY queued_at, rowid", UNENDED)
        return [row["id"] for row in rows]

    def cut_run(self, run: str, round_: int) -> int:
        """Go on with a run after `round_`: what came later is marked superseded, and a new epoch begins.

        Where nothing came later the epoch stays. The epoch; all in one transaction.
        """
        with self._transaction() as database:
            later = "run = ? AND round > ? AND NOT superseded"
            (count,) = database.execute(f"SELECT count(*) FROM rounds WHERE {later}", (run, round_)).fetchone()
            (epoch,) = database.execute("SELECT epoch FROM runs WHERE id = ?", (run,)).fetchone()
            database.execute(f"UPDATE rounds SET superseded = 1 WHERE {later}", (run, round_))
            database.execute(f"UPDATE evaluations SET superseded = 1 WHERE {later}", (run, round_))
            if count:
                epoch += 1
                database.execute(
                    "INSERT INTO cuts (run, epoch, round, made_at) VALUES (?, ?, ?, ?)",
                    (run, epoch, round_, time.time()),
                )
            database.execute("UPDATE runs SET epoch = ?, round = ? WHERE id = ?", (epoch, round_, run))
        return int(epoch)

    def lowest_cut(self, run: str, epoch: int) -> int | None:
        """The lowest round at which the run was cut since `epoch`; None where it was not."""
        (row,) = self._query("SELECT min(round) AS round FROM cuts WHERE run = ? AND epoch > ?", (run, epoch))
        return None if row["round"] is None else int(row["round"])

    def set_roster(self, run: str, devices: Sequence[str]) -> None:
        """The devices with which a strict run began."""
        with self._transaction() as database:
            names = msgspec.json.encode(list(devices)).decode()
            database.execute("UPDATE runs SET roster = ? WHERE id = ?", (names, run))

    def roster(self, run: str) -> list[str]:
        """The devices with which a strict run began; empty before."""
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
    ) -> None:
        """A finished round, its update, and what it took on the wire; durable when this returns."""
        coefficients = update.coefficients.astype("<f4").tobytes()
        names = msgspec.json.encode(list(devices)).decode()
        with self._transaction() as database:
            database.execute(
                "INSERT INTO rounds (run, epoch, round, finished_at, seconds, loss, devices, coefficients, "
                "learning_rate, wire_bytes, checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
                    _checksum(update.round, update.learning_rate, coefficients),
                ),
            )
            database.execute("UPDATE runs SET round = ? WHERE id = ?", (update.round, run))

    def updates(self, run: str, first: int, last: int) -> list[UpdateRecord]:
        """The updates in force of rounds `first` to `last`. Raises StoreError for one that is not as it was written."""
        rows = self._query(
            "SELECT round, coefficients, learning_rate, checksum FROM rounds "
            "WHERE run = ? AND round BETWEEN ? AND ? AND NOT superseded ORDER BY round",
            (run, first, last),
        )
        for round_, coefficients, rate, checksum in rows:
            # Updates that were written before there were checksums have none.
            if checksum is not None and _checksum(round_, rate, coefficients) != checksum:
                raise self._damaged(f"the update of round {round_}")
        return [
            UpdateRecord(row["round"], np.frombuffer(row["coefficients"], "<f4"), row["learning_rate"]) for row in rows
        ]

    def replay(self, run: str, last: int) -> Iterator[UpdateRecord]:
        """The updates in force of rounds 1 to `last`, read a portion at a time. Raises StoreError for what is not there
        or not as it was written."""
        for first in range(1, last + 1, PORTION):
            wanted = range(first, min(first + PORTION, last + 1))
            updates = self.updates(run, wanted[0], wanted[-1])
            for round_, update in itertools.zip_longest(wanted, updates):
                if update is None or update.round != round_:
                    raise self._damaged(f"the update of round {round_} is missing")
                yield update

    def rounds(self, run: str, after: int = 0, most: int = -1) -> list[RoundRow]:
        """The rounds in force after a round; `most` of them, below zero all."""
        rows = self._query(
            "SELECT round, loss, seconds, wire_bytes, finished_at FROM rounds "
            "WHERE run = ? AND round > ? AND NOT superseded ORDER BY round LIMIT ?",
            (run, after, most),
        )
        return [RoundRow(**dict(row)) for row in rows]

    def add_evaluation(self, run: str, epoch: int, evaluation: Evaluation) -> None:
        """The result of an evaluation round; a repeat at the same round replaces it."""
        with self._transaction() as database:
            database.execute(
                "UPDATE evaluations SET superseded = 1 WHERE run = ? AND round = ? AND epoch < ?",
                (run, evaluation.round, epoch),
            )
            database.execute(
                "INSERT OR REPLACE INTO evaluations "
                "(run, epoch, round, loss, correct, scored, examples, of_examples) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (run, epoch, *dataclasses.astuple(evaluation)),
            )

    def evaluations(self, run: str) -> list[Evaluation]:
        """All evaluations in order."""
        rows = self._query(
            "SELECT round, loss, correct, scored, examples, of_examples FROM evaluations "
            "WHERE run = ? AND NOT superseded ORDER BY round",
            (run,),
        )
        return [Evaluation(**row) for row in map(dict, rows)]

    def add_device(self, run: str, name: str) -> int:
        """A device says Hello: note it; how many connections it has made."""
        with self._transaction() as database:
            database.execute(
                "INSERT INTO devices (run, name, data_digest, joined_at, last_seen, connections) "
                "VALUES (:run, :name, '', :now, :now, 1) ON CONFLICT (run, name) "
                "DO UPDATE SET connections = connections + 1, last_seen = :now",
                {"run": run, "name": name, "now": time.time()},
            )
            row = database.execute("SELECT connections FROM devices WHERE run = ? AND name = ?", (run, name)).fetchone()
        return int(row["connections"])

    def device(self, run: str, name: str) -> DeviceRow | None:
        """A device that has joined the run; None for a new one."""
        sql = "SELECT data_digest, eval_digest, strikes FROM devices WHERE run = ? AND name = ?"
        rows = self._query(sql, (run, name))
        return DeviceRow(**dict(rows[0])) if rows else None

    def set_token(self, row: TokenRow) -> None:
        """A device's token, in place of the one before."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?, ?, ?)", dataclasses.astuple(row))

    def tokens(self) -> list[TokenRow]:
        """Every token, also the revoked ones."""
        return [TokenRow(**dict(row)) for row in self._query("SELECT * FROM tokens ORDER BY name")]

    def add_strike(self, run: str, name: str) -> int:
        """Count a fault against a device; how many there are now."""
        with self._transaction() as database:
            database.execute("UPDATE devices SET strikes = strikes + 1 WHERE run = ? AND name = ?", (run, name))
            row = database.execute("SELECT strikes FROM devices WHERE run = ? AND name = ?", (run, name)).fetchone()
        return int(row["strikes"]) if row else 0

    def set_data(self, run: str, name: str, train: int, held_out: int, digest: str, eval_digest: str) -> None:
        """How much data a device has that is ready, and the digests of both parts: from here on it is bound to them."""
        with self._transaction() as database:
            database.execute(
                "UPDATE devices SET train_examples = ?, eval_examples = ?, data_digest = ?, eval_digest = ? "
                "WHERE run = ? AND name = ?",
                (train, held_out, digest, eval_digest, run, name),
            )

    def set_reports(self, reports: Mapping[str, Report]) -> None:
        """Devices' newest reports by name."""
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
        """The run's devices with their newest figures."""
        return [dict(row) for row in self._query("SELECT * FROM devices WHERE run = ? ORDER BY name", (run,))]


def _checksum(round_: int, learning_rate: float, coefficients: bytes) -> int:
    """CRC-32 of an update: SQLite would not notice a bit that has changed on disk."""
    return zlib.crc32(coefficients, zlib.crc32(struct.pack("<qd", round_, learning_rate)))
