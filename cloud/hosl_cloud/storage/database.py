"""The service's SQLite file: transactions, and errors that say what to do.

One connection, which the threads take in turn by a lock: SQLite lets one write at a time anyway, and the journal is
synced at every commit, so that what was committed survives a power cut. A commit takes as long as the disk does; a call
on an event loop would hold up every device, and warns. One process trains with it, the one that has the folder's lock
(storage/data_folder.py); commands that only look may open it beside that.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hosl_cloud.exceptions import StoreError, StoreFull, is_disk_full
from hosl_cloud.storage.schema import migrate


class Database:
    """One file, and one connection to it."""

    def __init__(self, path: Path, *, reads_only: bool = False) -> None:
        """Open the file, or make it. One that `reads_only` writes nothing but the tables of this version."""
        self._path = path
        self._lock = threading.Lock()
        _warn_on_event_loop()

        with self._named_errors():
            # No isolation level: `_transaction` says itself where one begins. The threads share it, under the lock.
            self._database = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
            try:
                self._database.row_factory = sqlite3.Row
                self._check_file()  # before the next line writes to it
                self._database.execute("PRAGMA journal_mode = WAL")
                self._database.execute("PRAGMA synchronous = FULL")
                self._database.execute("PRAGMA foreign_keys = ON")
                migrate(self._database, path)
                if reads_only:
                    self._database.execute("PRAGMA query_only = ON")
            except BaseException:
                self._database.close()
                raise

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turn SQLite's errors into ours, by what can be done about them."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if is_disk_full(error):
                raise StoreFull(self._path, str(error)) from error
            raise StoreError(f"{self._path}: {error}: check that it is a file, may be written, and has room") from error
        except sqlite3.Error as error:
            # The class itself, and none below it, is what SQLite raises for a file that is no database or is broken.
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
        """Close the database, once other threads are through with what they do in it."""
        with self._lock:
            self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Write what is done within, all or nothing; on disk when it ends."""
        _warn_on_event_loop()
        with self._lock, self._named_errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                # SQLite ends the transaction by itself where the disk is full; what went wrong is to be heard of.
                with contextlib.suppress(sqlite3.Error):
                    self._database.rollback()
                raise

    def _query(self, sql: str, arguments: Sequence[Any] = ()) -> list[sqlite3.Row]:
        _warn_on_event_loop()
        with self._lock, self._named_errors():
            return self._database.execute(sql, arguments).fetchall()


def _warn_on_event_loop() -> None:
    """Make a call that could stop an event loop heard of; in tests it is an error."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    warnings.warn("the store is used on an event loop, which waits for the disk", RuntimeWarning, stacklevel=5)
