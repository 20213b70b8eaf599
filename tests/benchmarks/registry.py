"""What a million registered devices cost the service: its database, its start, a look-up, a list, a round's sample.

    python tests/benchmarks/registry.py [--devices N] [--json]

The store, the tokens and the draw are the service's own. The first devices are added as `device add` does, one by one,
and timed; the rest go into the same tables in one transaction each, for that would take hours.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from hosl_cloud.service.access import DeviceTokens
from hosl_cloud.service.devices_api import device_operations
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.store import Store
from hosl_protocol.run.ordering import sample_devices

TRIES = 200
TASK = {"name": "t", "kind": "lm", "template": "{text}"}


def milliseconds(work: Callable[[int], object], tries: int = TRIES) -> float:
    """Median time of `work`."""
    taken = []
    for number in range(tries):
        began = time.perf_counter()
        work(number)
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken)


def memory_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


def fill(store: Store, count: int) -> None:
    """Tokens and joined devices, in the service's own tables."""
    with store._transaction() as database:
        database.executemany(
            "INSERT INTO tokens VALUES (?, ?, ?, NULL, '')",
            ((name(place), hashlib.sha256(name(place).encode()).digest(), time.time()) for place in range(count)),
        )
    with store._transaction() as database:
        database.executemany(
            "INSERT INTO devices (run, name, data_digest, joined_at, last_seen, connections) VALUES (?, ?, ?, 0, 0, 1)",
            (("r", name(place), "0" * 64) for place in range(count)),
        )


def name(place: int) -> str:
    return f"device-{place:07}"


def measure(folder: Path, count: int) -> dict[str, Any]:
    """All figures."""
    store = Store(folder / "hosl.sqlite")
    store.create_run("r", folder, "0" * 64, msgspec.convert({"task": TASK}, RunConfig))
    fill(store, count)
    before, began = memory_mib(), time.perf_counter()
    access = DeviceTokens(store)
    figures: dict[str, Any] = {"start_s": time.perf_counter() - began, "start_mib": memory_mib() - before}
    tokens = [access.add(f"new-{number}") for number in range(TRIES)]
    figures["add_ms"] = milliseconds(lambda number: access.add(f"newer-{number}"))
    figures["token_ms"] = milliseconds(lambda number: access.authenticate(tokens[number]))
    figures["join_ms"] = milliseconds(lambda number: store.add_device("r", name(number * 997 % count)))
    figures["look_up_ms"] = milliseconds(lambda number: store.device("r", name(number * 991 % count)))
    listing = device_operations(access, lambda *_: None, lambda _: True, lambda *_: "")[0]
    began = time.perf_counter()
    answer = msgspec.json.encode(asyncio.run(listing.handle(None)))  # type: ignore[arg-type]
    figures |= {"list_s": time.perf_counter() - began, "list_bytes": len(answer)}
    began = time.perf_counter()
    store.devices("r")
    figures["devices_of_run_s"] = time.perf_counter() - began
    for connected in (400, 4096, count):
        names = [name(place) for place in range(connected)]
        figures[f"sample_of_{connected}_ms"] = milliseconds(
            lambda number, n=names: sample_devices(1, number, n, 200), 5
        )
    store.close()
    figures["file_bytes"] = sum(path.stat().st_size for path in folder.iterdir())
    return figures


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10**6)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.devices)
    if options.json:
        print(json.dumps(figures))
        return
    print(f"{options.devices} devices; {platform.machine()}, Python {platform.python_version()}")
    for key, value in figures.items():
        print(f"{key:24} {value:12.3f}")


if __name__ == "__main__":
    main()
