"""What a frozen run's cache saves: a device's processor time and upload, and how fast the service's rounds are.

python tests/benchmarks/activation_cache.py --bundle BUNDLE --data train.jsonl --eval validation.jsonl --task PRESET
                                            [--examples N] [--held-out N] [--passes N] [--batch N]
                                            [--set KEY=VALUE] [--json]

Service and device are real processes on loopback. The same strict run without a cache and with one, and then, with the
cache and another rate of the tail, without any device. Without options it takes what `make demo` left behind. The
bundle should train nothing on the device (`hosl-export --train none`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from hosl_cloud.storage.data_folder import DATABASE
from hosl_cloud.storage.store import Store

WORK = Path(__file__).parents[2] / "examples" / "reviews" / "work"
NEVER_CACHED = 'cache.bytes="0"'


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=WORK / "bundle")
    parser.add_argument("--data", type=Path, default=WORK / "data" / "device-1-train.jsonl")
    parser.add_argument("--eval", type=Path, default=WORK / "data" / "device-1-validation.jsonl")
    parser.add_argument("--task", default="reviews")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.bundle.exists():
        print(f"{options.bundle} is not there: run `make demo` first, or give --bundle, --data and --eval")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    if options.json:
        print(json.dumps(rows))
        return 0
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, onnxruntime "
        f"{onnxruntime.__version__}, torch {torch.__version__}; {options.bundle.name}, {rows[0]['rounds']} rounds"
    )
    print(f"{'run':<22} {'sent MB':>8} {'device CPU s':>13} {'rounds/s':>9} {'accuracy':>9} {'loss':>10}")
    for row in rows:
        print(
            f"{row['run']:<22} {row['sent_bytes'] / 1e6:>8.2f} {row['device_cpu_s']:>13.1f} "
            f"{row['rounds_per_s']:>9.2f} {100 * row['accuracy']:>8.1f}% {row['eval_loss']:>10.6f}"
        )
    return 0


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Do the three runs; a row for each. The first two are to have the same bits."""
    for name, source, count in (("train", options.data, options.examples), ("eval", options.eval, options.held_out)):
        with source.open(encoding="utf-8") as file:
            (folder / f"{name}.jsonl").write_text("".join(itertools.islice(file, count)), encoding="utf-8")
    cached = 'cache.bytes="4G"'
    rows = [
        run(options, folder, "without", "without a cache", [NEVER_CACHED]),
        run(options, folder, "with", "with the cache", [cached]),
        run(options, folder, "with", "again, no device", [cached, "tail.learning_rate=2e-5"], with_device=False),
    ]
    rows[1]["has_same_bits"] = all(rows[0][each] == rows[1][each] for each in ("losses", "eval_loss"))
    for row in rows:
        del row["losses"]
    return rows


def run(
    options: argparse.Namespace, folder: Path, site: str, name: str, settings: list[str], *, with_device: bool = True
) -> dict[str, Any]:
    """Train once in a data folder of its own; what it took."""
    rounds = options.passes * options.examples // options.batch
    given = [
        'algorithm="frozen"',
        "strict=true",
        f"rounds={rounds}",
        f"batch_size={options.batch}",
        f"evaluation.every={max(1, rounds // options.passes)}",
        *settings,
        *options.overrides,
    ]
    serve = [sys.executable, "-m", "hosl_cloud", "serve", "--bundle", options.bundle, "--task", options.task, "--once"]
    serve += ["--port", "0", "--data-dir", folder / site, *(f"--set={each}" for each in given)]
    with subprocess.Popen([*map(str, serve)], stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        place = next(
            found for line in service.stdout if (found := re.search(r"--server (\S+) --token-file (\S+)", line))
        )
        summary = attend(folder, site, *place.groups()) if with_device else {}
        service.stdout.read()
    assert service.returncode == 0
    return {"run": name, "rounds": rounds, **figures(folder / site, summary)}


def attend(folder: Path, site: str, server: str, token: str) -> dict[str, Any]:
    """Take part as a device does; its summary."""
    edge = [sys.executable, "-m", "hosl_edge", "--server", server, "--token-file", token, "--name", "pi", "--json"]
    edge += ["--data", folder / "train.jsonl", "--eval", folder / "eval.jsonl"]
    edge += ["--state-dir", folder / f"state-{site}", "--cache-dir", folder / f"shards-{site}"]
    done = subprocess.run([*map(str, edge)], stdout=subprocess.PIPE, text=True, check=True)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def figures(data_dir: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Read what the newest run came to."""
    store = Store(data_dir / DATABASE, reads_only=True)
    try:
        id_ = store.run_ids()[-1]
        rows, evaluation = store.rounds(id_), store.evaluations(id_)[-1]
    finally:
        store.close()
    later = [row.seconds for row in rows[len(rows) // 3 :]]  # after the first pass
    return {
        "sent_bytes": summary.get("sent_bytes", 0),
        "device_cpu_s": summary.get("cpu_seconds", 0.0),
        "rounds_per_s": 1.0 / statistics.median(later),
        "accuracy": evaluation.accuracy,
        "eval_loss": evaluation.loss,
        "losses": [row.loss for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main())
