"""What is where in a service's data folder, and the lock that keeps others out.

The lock is the kernel's, on the file `lock`: it is gone with the process however that ends, while `service.json`, which
says where the service is, stays behind after a kill. Who wants to know whether a service runs asks for the lock.
"""

from __future__ import annotations

import argparse
import fcntl
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from hosl_cloud.exceptions import ServiceError
from hosl_cloud.storage.store import Store
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.program.terminal import default_folder

DATABASE = "hosl.sqlite"
BUNDLES = "bundles"
RUNS = "runs"
CACHE = "cache"
SERVICE_FILE = "service.json"
"""Says where the service is, while it runs."""

LOCK_PAUSES_S = (0.05, 0.1)
"""Between tries for the folder's lock: a command that asks `is_locked` holds it for an instant, and keeps no service
from its start by that."""


def default_data_dir() -> Path:
    """Choose where the data is unless somebody says otherwise. Raises SettingsError for a user without a home."""
    return default_folder("XDG_DATA_HOME", ".local/share", "--data-dir") / "hosl-cloud"


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--data-dir`."""
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="database, tokens, checkpoints (default: $XDG_DATA_HOME/hosl-cloud, or ~/.local/share/hosl-cloud)",
    )


def settle_data_dir(options: argparse.Namespace) -> None:
    """Put the default where `--data-dir` was not given. Raises SettingsError where there is none."""
    if vars(options).get("data_dir", ...) is None:
        options.data_dir = default_data_dir()


def make_data_dir(data_dir: Path) -> None:
    """Make the folder where it is missing, for its user alone, with the folders of bundles and checkpoints."""
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    data_dir.mkdir(mode=0o700, exist_ok=True)
    for name in (BUNDLES, RUNS):
        (data_dir / name).mkdir(exist_ok=True)


def hint(command: str, data_dir: Path) -> str:
    """Write a command of hosl-cloud as somebody can type it: with the data folder, where that is not the default."""
    try:
        is_default = data_dir.absolute() == default_data_dir().absolute()
    except SettingsError:
        is_default = False
    return f"hosl-cloud {command}" + ("" if is_default else f" --data-dir {shlex.quote(str(data_dir))}")


def run_folder(data_dir: Path, run: str) -> Path:
    """Name the folder of a run's checkpoints, snapshots and figures."""
    return data_dir / RUNS / run


def cache_folder(run_folder: Path) -> Path:
    """Name the folder of kept activations, beside that of all runs."""
    return run_folder.parent.parent / CACHE


def new_run_id(name: str, store: Store) -> str:
    """Make a run id that no run has, of the settings' name and the time."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    known = set(store.run_ids())
    return next(run for run in (stem, *(f"{stem}-{n}" for n in range(2, 10**6))) if run not in known)


def is_locked(data_dir: Path) -> bool:
    """Tell whether a service, or a simulation, uses the folder."""
    try:
        lock(data_dir, pauses_s=()).close()
    except ServiceError:
        return True
    return False


def lock(data_dir: Path, pauses_s: Sequence[float] = LOCK_PAUSES_S) -> TextIO:
    """Take the folder for this process, as long as the file that is returned stays open. Raises ServiceError."""
    # Never deleted: another process could hold the lock of a file that has no name any more.
    file = (data_dir / "lock").open("w", encoding="ascii")
    left_s = list(pauses_s)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if not left_s:
                file.close()
                remedy = "stop it, or choose another --data-dir"
                raise ServiceError(f"another hosl-cloud uses {data_dir}: {remedy}") from error
            time.sleep(left_s.pop(0))
