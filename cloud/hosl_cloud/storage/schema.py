"""The tables of the service's database, and what leads to them from those of older versions.

A change of the tables is one more entry of MIGRATIONS; none that has been released is ever changed, for databases that
went through it exist. A table's column has the default that suits the rows of older versions.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from hosl_cloud.exceptions import StoreError

_FIRST_SCHEMA = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY,
    created_at REAL NOT NULL,
    bundle TEXT NOT NULL,
    shard_digest TEXT NOT NULL,
    config TEXT NOT NULL,
    state TEXT NOT NULL,
    epoch INTEGER NOT NULL DEFAULT 0,
    round INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE devices (
    run TEXT NOT NULL REFERENCES runs (id),
    name TEXT NOT NULL,
    data_digest TEXT NOT NULL,
    train_examples INTEGER NOT NULL DEFAULT 0,
    eval_examples INTEGER NOT NULL DEFAULT 0,
    joined_at REAL NOT NULL,
    connections INTEGER NOT NULL DEFAULT 0,
    applied_round INTEGER NOT NULL DEFAULT 0,
    step_seconds REAL,
    peak_rss_bytes INTEGER,
    anonymous_bytes INTEGER,
    sent_bytes INTEGER,
    received_bytes INTEGER,
    PRIMARY KEY (run, name)
);
CREATE TABLE rounds (
    run TEXT NOT NULL REFERENCES runs (id),
    epoch INTEGER NOT NULL,
    round INTEGER NOT NULL,
    finished_at REAL NOT NULL,
    seconds REAL NOT NULL,
    loss REAL NOT NULL,
    devices TEXT NOT NULL,
    coefficients BLOB NOT NULL,
    learning_rate REAL NOT NULL,
    superseded INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (run, epoch, round)
);
CREATE TABLE evaluations (
    run TEXT NOT NULL REFERENCES runs (id),
    epoch INTEGER NOT NULL,
    round INTEGER NOT NULL,
    loss REAL NOT NULL,
    correct INTEGER NOT NULL,
    scored INTEGER NOT NULL,
    PRIMARY KEY (run, epoch, round)
);
"""


MIGRATIONS = (
    _FIRST_SCHEMA,
    "ALTER TABLE devices ADD COLUMN strikes INTEGER NOT NULL DEFAULT 0;"
    "ALTER TABLE rounds ADD COLUMN wire_bytes INTEGER NOT NULL DEFAULT 0;",
    "ALTER TABLE runs ADD COLUMN roster TEXT NOT NULL DEFAULT '[]';"
    "ALTER TABLE evaluations ADD COLUMN superseded INTEGER NOT NULL DEFAULT 0;"
    "CREATE TABLE cuts (run TEXT NOT NULL REFERENCES runs (id), epoch INTEGER NOT NULL, round INTEGER NOT NULL, "
    "made_at REAL NOT NULL, PRIMARY KEY (run, epoch));",
    "ALTER TABLE rounds ADD COLUMN checksum INTEGER;",
    "CREATE TABLE tokens (name TEXT PRIMARY KEY, digest BLOB NOT NULL, created_at REAL NOT NULL, revoked_at REAL, "
    "bundle TEXT NOT NULL DEFAULT '');",
    "ALTER TABLE runs ADD COLUMN reason TEXT NOT NULL DEFAULT '';"
    "ALTER TABLE runs ADD COLUMN queued_at REAL NOT NULL DEFAULT 0;"
    "UPDATE runs SET queued_at = created_at;"
    "ALTER TABLE devices ADD COLUMN last_seen REAL NOT NULL DEFAULT 0;"
    "UPDATE devices SET last_seen = joined_at;"
    "ALTER TABLE devices ADD COLUMN temperature_c REAL;"
    "CREATE TABLE events (id INTEGER PRIMARY KEY, run TEXT NOT NULL REFERENCES runs (id), at REAL NOT NULL, "
    "level TEXT NOT NULL, text TEXT NOT NULL);"
    "CREATE INDEX events_of_run ON events (run, id);",
    # Who began an older run is not known: one that somebody may have asked for is not stopped.
    "ALTER TABLE runs ADD COLUMN begun_by TEXT NOT NULL DEFAULT 'start';"
    # The digest was of training and held-out data together; each device is bound anew.
    "ALTER TABLE devices ADD COLUMN eval_digest TEXT NOT NULL DEFAULT ''; UPDATE devices SET data_digest = '';"
    "ALTER TABLE evaluations ADD COLUMN examples INTEGER NOT NULL DEFAULT 0;"
    "ALTER TABLE evaluations ADD COLUMN of_examples INTEGER NOT NULL DEFAULT 0;",
    "ALTER TABLE events ADD COLUMN is_ending INTEGER NOT NULL DEFAULT 0;"
    "ALTER TABLE evaluations ADD COLUMN held_out TEXT NOT NULL DEFAULT '';",
    "ALTER TABLE rounds ADD COLUMN codes BLOB NOT NULL DEFAULT x'';"
    "ALTER TABLE rounds ADD COLUMN is_pruned INTEGER NOT NULL DEFAULT 0;",
    "ALTER TABLE evaluations ADD COLUMN macro_f1 REAL;ALTER TABLE evaluations ADD COLUMN by_class BLOB;",
)
"""The scripts that lead from each version to the next, from none at all on."""

SCHEMA_VERSION = len(MIGRATIONS)


def migrate(database: sqlite3.Connection, path: Path) -> None:
    """Bring the tables up to this version. Raises StoreError where a newer hosl has made them."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise StoreError(f"{path} has schema {version}, this hosl reads up to {SCHEMA_VERSION}: use a newer hosl")
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        _apply(database, number, script)


def _apply(database: sqlite3.Connection, number: int, script: str) -> None:
    """Bring the tables to version `number`, in one transaction: a kill leaves the version before it, or this one."""
    database.execute("BEGIN IMMEDIATE")
    try:
        # Looked at again: a command beside a service that starts may have done it while this one waited.
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version < number:
            for statement in script.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {number}")
        database.execute("COMMIT")
    except BaseException:
        database.rollback()
        raise
