"""What a run writes to the cloud's disk, and what of it stays: updates in the store, the devices' part of checkpoints.

python tests/benchmarks/cloud/store_writes.py [--rounds 1000] [--numbers 368640] [--json]

A LoRA in tensors of 4608 numbers (rank 8 of SmolLM2), AdamW, a checkpoint every 50 rounds of which 2 stay, HO-SFL with
P = 2 beside it. Store, files and syncs are real; there is no tail, whose own part of a checkpoint comes on top.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from hosl_cloud.runs.run import Run
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.store import Store
from hosl_protocol.run.manifest import Manifest, TensorEntry
from hosl_protocol.run.settings import ClientOptimizer
from hosl_protocol.run.tasks import Task
from hosl_protocol.weights.client_weights import make_client_weights
from hosl_protocol.weights.estimates import UpdateRecord

ROWS: list[dict[str, Any]] = [
    {"algorithm": "ho-sfl"},
    *({"algorithm": "first-order", "gradient_bits": bits} for bits in (1, 4, 8, 32)),
]
CHECKPOINT_EVERY, CHECKPOINTS_KEPT, TENSOR = 50, 2, 4608


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--numbers", type=int, default=368_640)
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure (default: the temporary one)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measure(options, row) for row in ROWS]
    if options.json:
        print(json.dumps(rows))
        return 0
    columns = ("update_kb", "kept_updates", "store_mb", "states_mb", "written_mb", "add_round_ms")
    print(f"{options.rounds} rounds of {options.numbers} numbers")
    print(f"{'':>20} " + " ".join(f"{name:>13}" for name in columns))
    for row in rows:
        print(f"{row['name']:>20} " + " ".join(f"{row[name]:>13.4g}" for name in columns))
    return 0


def measure(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Store the rounds, and weigh what is there."""
    tensors = [
        TensorEntry(name=f"t{place}", shape=(TENSOR,), trainable=True, exponent=-24)
        for place in range(options.numbers // TENSOR)
    ]
    manifest = Manifest(
        model="m",
        family="llama",
        architecture="LlamaForCausalLM",
        split=1,
        blocks=2,
        width=576,
        max_length=128,
        pad_token_id=0,
        train="lora",
        tensors=tuple(tensors),
        files=(),
    )
    task = Task(name="t", kind="lm", template="{text}")
    config = RunConfig(task=task, client=ClientOptimizer(optimizer="adamw"), rounds=options.rounds, **settings)

    with tempfile.TemporaryDirectory(dir=options.dir) as place:
        folder = Path(place)
        store = Store(folder / "hosl.sqlite")
        store.create_run("r", folder, manifest.shard_digest, config)
        run = Run("r", config, manifest, folder, folder / "run", store)
        zeros = {entry.name: np.zeros(entry.shape, np.float32) for entry in tensors}
        run.mirror = make_client_weights(manifest, zeros, run.settings)
        run.folder.mkdir()
        before, seconds = _write_bytes(), _train(run, options.rounds)
        store.close()
        return {
            "name": " ".join(map(str, settings.values())),
            "update_kb": run.update_shape.size_bytes / 1e3,
            "kept_updates": run.kept_updates or options.rounds,
            "store_mb": (folder / "hosl.sqlite").stat().st_size / 1e6,
            "states_mb": sum(path.stat().st_size for path in run.folder.iterdir()) / 1e6,
            "written_mb": (_write_bytes() - before) / 1e6,
            "add_round_ms": 1e3 * seconds / options.rounds,
        }


def _train(run: Run, rounds: int) -> float:
    """Store so many rounds; the seconds in the store."""
    generator, shape, kept, seconds = np.random.default_rng(0), run.update_shape, run.kept_updates, 0.0
    for round_ in range(1, rounds + 1):
        codes = generator.integers(0, 256, shape.codes, np.uint8)
        update = UpdateRecord(round_, generator.random(shape.coefficients, np.float32), 1e-3, codes)
        pruned = 0 if kept is None else max(round_ - kept, 0)
        began = time.monotonic()
        run.store.add_round(run.id, 0, update, seconds=1.0, loss=1.0, devices=["a"], pruned=pruned)
        seconds += time.monotonic() - began
        if kept is not None and round_ % CHECKPOINT_EVERY == 0:
            run.write_state(run.folder / f"{round_:06}.safetensors")
            for path in sorted(run.folder.iterdir())[:-CHECKPOINTS_KEPT]:
                path.unlink()
    return seconds


def _write_bytes() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes:"))


if __name__ == "__main__":
    sys.exit(main())
