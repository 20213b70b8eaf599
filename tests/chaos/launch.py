"""What runs in a process of the chaos test: a command, with shorter waits, and points at which it can be told to die.

The order file, looked for whenever a point is passed, holds "POINT before|half|after SKIP": the process kills itself
(kill -9) there, when it has passed SKIP times. It deletes the order first, so that the next start gets through.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHORTER = {
    "hosl_edge": {
        "hosl_edge.agent.LONGEST_PAUSE_S": 1.0,  # 20
        "hosl_edge.connection.link.HEARTBEAT_S": 2.0,  # 15
        "hosl_edge.connection.fetch.TIMEOUT_S": 3.0,  # 30
        "hosl_edge.device.measure_replay_s": lambda *_: 1.0,  # beside a known link: a snapshot is always faster
    },
    "hosl_cloud": {
        "hosl_cloud.service.server.HEARTBEAT_S": 2.0,  # 15
        "hosl_cloud.runs.admission.JOIN_DEADLINE_S": 20.0,  # 600
        "hosl_cloud.runs.run.KEPT_STATES": 0,  # 3
        "hosl_cloud.runs.run.LEAST_KEPT": 6,  # 16: updates of first-order training that devices can replay
    },
}
"""Waits, and a length, that are constants of the product; what they are there stands behind."""

POINTS = {
    "hosl_edge": {
        "journal-append": "hosl_edge.history.journal.Journal.append",
        "journal-create": "hosl_edge.history.history.NewJournal",
        "journal-install": "hosl_edge.history.journal.NewJournal.install",
        "rewind": "hosl_edge.history.history.History.rewind",
        "journal-open": "hosl_edge.history.history.open_journal",
        "weights-apply": "hosl_edge.history.history.History._replay",
        "join": "hosl_edge.device.Device.join",
        "batch": "hosl_edge.session.batch_indices",
        "snapshot-fetch": "hosl_edge.session.fetch_snapshot",
        "snapshot-read": "hosl_edge.history.history.read_snapshot",
    },
    "hosl_cloud": {
        "store-roster": "hosl_cloud.storage.store.Store.set_roster",
        "store-rewind": "hosl_cloud.storage.store.Store.rewind_run",
        "store-round": "hosl_cloud.storage.store.Store.add_round",
        "store-evaluation": "hosl_cloud.storage.store.Store.add_evaluation",
        "store-state": "hosl_cloud.storage.store.Store.set_state",
        "store-updates": "hosl_cloud.storage.store.Store.updates",
        "checkpoint-file": "hosl_cloud.tail.checkpoint._put",
        "checkpoint-prune": "hosl_cloud.runs.checkpointer.prune_checkpoints",
        "tail-step": "hosl_cloud.tail.trainer.TailTrainer.step",
        "mirror-apply": "hosl_cloud.runs.run.Run.apply",
        "snapshot-write": "hosl_cloud.runs.snapshots.write_snapshot",
    },
}
"""Where a process can be told to die."""


def run(order: Path, log: Path, module: str, arguments: list[str]) -> None:
    """Run `python -m module arguments` as this process; it prints to `log`."""
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    faulthandler.register(signal.SIGUSR1)
    gc.freeze()  # a device has no torch that the collector would look at

    for place, value in SHORTER[module].items():
        owner, name = _find(place)
        assert hasattr(owner, name), place
        setattr(owner, name, value)
    for point, place in POINTS[module].items():
        owner, name = _find(place)
        setattr(owner, name, _mortal(point, getattr(owner, name), order))

    sys.exit(importlib.import_module(f"{module}.__main__").main(arguments))


def _find(place: str) -> tuple[Any, str]:
    """What holds a module's, or a class's, name."""
    path, name = place.rsplit(".", 1)
    try:
        return importlib.import_module(path), name
    except ModuleNotFoundError:
        module, class_ = path.rsplit(".", 1)
        return getattr(importlib.import_module(module), class_), name


def _mortal(point: str, function: Callable[..., Any], order: Path) -> Callable[..., Any]:
    """Wrap a function so that the process kills itself before, after or half way through it, where it is ordered to."""
    passed = {"before": 0, "half": 0, "after": 0}

    def is_due(when: str) -> bool:
        try:
            ordered = order.read_text(encoding="ascii").split()
        except FileNotFoundError:
            return False
        if ordered[:2] != [point, when]:
            return False
        passed[when] += 1
        if passed[when] <= int(ordered[2]):
            return False
        order.unlink()  # before it dies: the next start must get through
        return True

    def die() -> None:
        print(f"launch: dies at {point}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(function)
    def mortal(*arguments: Any, **named: Any) -> Any:
        if is_due("before"):
            die()
        if is_due("half"):
            _tear(*arguments)
            die()
        result = function(*arguments, **named)
        if is_due("after"):
            die()
        return result

    return mortal


def _tear(journal: Any, updates: Any) -> None:
    """Half of what Journal.append would write."""
    from hosl_edge.history.journal import _encode_update, _record

    data = b"".join(_record(_encode_update(update)) for update in updates)
    journal._file.write(data[: len(data) // 2])
    journal._file.flush()
