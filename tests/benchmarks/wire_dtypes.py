"""What half precision on the wire does to HO-SFL: the estimate of one round, and a short run.

python tests/benchmarks/wire_dtypes.py [--bundle BUNDLE --data train.jsonl --eval validation.jsonl --task PRESET]

Without options it takes what `make demo` left behind. The first round's projections of one device, with many
directions, are compared with those that float32 gives: their relative difference in length. Then a run of some rounds
is scored with each type.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from hosl_cloud.runs.run import Run
from hosl_cloud.settings import load_config
from hosl_cloud.simulation.partition import Partition
from hosl_cloud.simulation.virtual_devices import simulate
from hosl_cloud.storage.store import Store
from hosl_protocol.run.manifest import load_manifest

WORK = Path(__file__).parents[2] / "examples" / "reviews" / "work"
DTYPES = ("float32", "bfloat16", "float16")


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=WORK / "bundle")
    parser.add_argument("--data", type=Path, default=WORK / "data" / "device-1-train.jsonl")
    parser.add_argument("--eval", type=Path, default=WORK / "data" / "device-1-validation.jsonl")
    parser.add_argument("--task", default="reviews")
    parser.add_argument("--directions", type=int, default=64, help="of the compared round")
    parser.add_argument("--rounds", type=int, default=30, help="of the scored run, with P = 2 and 4 devices")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.bundle.exists():
        print(f"{options.bundle} is not there: run `make demo` first, or give --bundle, --data and --eval")
        return 0
    rows = measure(options)
    if options.json:
        print(json.dumps(rows))
        return 0
    print(f"{platform.machine()}, onnxruntime {onnxruntime.__version__}, torch {torch.__version__}; {options.bundle}")
    print(f"{'wire':<10} {'MB a round':>10} {'estimate differs by':>20} {'loss':>8} {'accuracy':>9}")
    for row in rows:
        print(
            f"{row['wire_dtype']:<10} {row['mb_a_round']:>10.2f} {row['relative_difference']:>20.2e} "
            f"{row['eval_loss']:>8.4f} {100 * row['accuracy']:>8.1f}%"
        )
    return 0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each type."""
    estimates: dict[str, np.ndarray] = {}
    rows = []
    for dtype in DTYPES:
        one = run(options, dtype, ["rounds=1", f"directions={options.directions}", "devices.start_with=1"])
        estimates[dtype] = one["update"].astype(np.float64)
        many = run(options, dtype, [f"rounds={options.rounds}", "directions=2", "devices.start_with=4"])
        reference = estimates["float32"]
        difference = np.linalg.norm(estimates[dtype] - reference) / np.linalg.norm(reference)
        rows.append(
            {
                "wire_dtype": dtype,
                "mb_a_round": many["wire_bytes"] / options.rounds / 1e6,
                "relative_difference": float(difference),
                "eval_loss": many["evaluation"].loss,
                "accuracy": many["evaluation"].accuracy,
            }
        )
    return rows


def run(options: argparse.Namespace, dtype: str, settings: list[str]) -> dict[str, Any]:
    """Simulate; the first update, the bytes and the last evaluation."""
    manifest = load_manifest(options.bundle)
    fixed = [f"wire_dtype={dtype}", "algorithm=ho-sfl", "evaluation.every=0", "client.learning_rate=1e-4"]
    config = load_config(None, manifest, [f"task.preset={options.task}", *fixed, *options.overrides, *settings])
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "hosl.sqlite")
        state = Run("run", config, manifest, options.bundle, Path(folder) / "run", store)
        store.create_run("run", options.bundle, manifest.shard_digest, config)
        asyncio.run(simulate(state, options.data, options.eval, Partition(), 2, lambda sentence: None))
        result = {
            "update": store.updates("run", 1, 1)[0].coefficients,
            "wire_bytes": sum(row.wire_bytes for row in store.rounds("run")),
            "evaluation": store.evaluations("run")[-1],
        }
        store.close()
    return result


if __name__ == "__main__":
    sys.exit(main())
