"""Catching up by replay against downloading a snapshot: what a device and a cloud weigh, and what either costs.

    python tests/benchmarks/catch_up.py [--bundle DIR] [--directions P] [--rounds N] [--threads N] [--mbit N ...]

The trainable tensors of a bundle, or without one of OPT-125M, split 6: whole blocks by SGD, LoRA's adapters by SGD and
by AdamW. A catch-up of that many rounds is applied at once, as a device does; "estimate" is what a device that has not
replayed yet says in its Hello. "Break-even" is how many missed rounds take as long as the download; the cloud offers a
snapshot beyond 1.5 times that. A snapshot's other costs: the copy of the mirror and the file on the cloud; its digest
and the loading on the device, besides the digest of the cached shard's file at every start.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from hosl_cloud.runs.snapshots import MARGIN, copy_state, write_snapshot
from hosl_edge.connection.catch_up_speed import measure_replay_s
from hosl_edge.history.snapshot import read_snapshot
from hosl_protocol.arithmetic.kernel import load
from hosl_protocol.arithmetic.lattice import exponent_for, round_to_lattice
from hosl_protocol.arithmetic.perturbation import LatticeTensor
from hosl_protocol.run.manifest import SHARD_WEIGHTS, Manifest, TensorEntry, load_manifest, sha256_of_file
from hosl_protocol.run.settings import ClientOptimizer, RunSettings
from hosl_protocol.run.tasks import Task
from hosl_protocol.weights.client_weights import ClientWeights
from hosl_protocol.weights.estimates import UpdateRecord

WIDTH, BLOCKS, LORA_RANK = 768, 6, 8
RECORD_BYTES = 8
"""Of a round in a CatchUp, besides 4 for each coefficient."""


def opt_shapes(train: str) -> list[tuple[int, ...]]:
    """What trains in OPT-125M's first six blocks."""
    if train == "lora":
        return BLOCKS * 2 * [(LORA_RANK, WIDTH), (WIDTH, LORA_RANK)]
    square, wide = (WIDTH, WIDTH), (4 * WIDTH, WIDTH)
    return BLOCKS * [*4 * [square, (WIDTH,)], wide, (4 * WIDTH,), wide[::-1], (WIDTH,), *4 * [(WIDTH,)]]


def make_manifest(train: str, shapes: list[tuple[int, ...]]) -> Manifest:
    """Of a shard that has these tensors alone."""
    tensors = tuple(
        TensorEntry(name=f"tensor{index}", shape=shape, dtype="float32", trainable=True, exponent=-24)
        for index, shape in enumerate(shapes)
    )
    facts: dict[str, Any] = {"model": "m", "family": "f", "architecture": "a", "split": 1, "blocks": 2, "width": WIDTH}
    return Manifest(**facts, max_length=8, pad_token_id=0, train=train, tensors=tensors, files=())


def make_weights(manifest: Manifest, optimizer: ClientOptimizer, threads: int) -> ClientWeights:
    """Random weights on their lattices."""
    generator = np.random.default_rng(0)
    tensors = []
    for index, entry in enumerate(manifest.trainable):
        values = 0.02 * generator.standard_normal(math.prod(entry.shape), np.float32)
        exponent = exponent_for(float(np.abs(values).max()))
        tensors.append(LatticeTensor(entry.name, index, round_to_lattice(values, exponent), exponent))
    return ClientWeights(tensors, seed=1, probe_step=1e-3, optimizer=optimizer, threads=threads)


def make_updates(first: int, rounds: int, directions: int) -> list[UpdateRecord]:
    """Coefficients of both signs, large enough to be no 0 on the lattice."""
    generator = np.random.default_rng(first)
    coefficients = 1e-5 * generator.choice(np.array([-1.0, 1.0], np.float32), (rounds, directions))
    return [UpdateRecord(first + row, coefficients[row], 1e-7) for row in range(rounds)]


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(
    manifest: Manifest, optimizer: ClientOptimizer, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """One row."""
    sizes = [math.prod(entry.shape) for entry in manifest.trainable]
    settings = RunSettings(
        task=Task(name="lm", kind="lm", template="{text}"), directions=options.directions, client=optimizer
    )
    weights = make_weights(manifest, optimizer, options.threads)
    weights.apply(make_updates(1, 4, options.directions))  # the first touch of memory is no part of it
    updates = make_updates(5, options.rounds, options.directions)
    round_s = seconds(lambda: weights.apply(updates)) / options.rounds
    estimate_s = options.directions * measure_replay_s(sizes, settings, options.threads)
    path, shapes = folder / "snapshot", {entry.name: entry.shape for entry in manifest.trainable}
    state = weights.state()
    row = {
        "train": manifest.train,
        "optimizer": optimizer.optimizer,
        "parameters": weights.elements,
        "replay_s_per_1000": 1000 * round_s,
        "estimate_s_per_1000": 1000 * estimate_s,
        "copy_s": seconds(lambda: copy_state(state)),
        "write_s": seconds(lambda: write_snapshot(path, "r", 0, state, shapes)),
    }
    row["snapshot_mb"] = path.stat().st_size / 1e6
    sha256 = sha256_of_file(path)
    row["load_s"] = seconds(lambda: weights.load_state(read_snapshot(path, sha256, manifest)[1]))
    weights.close()
    return {**row, "links": [weigh(row, mbit, options.directions) for mbit in options.mbit]}


def weigh(row: dict[str, Any], mbit: float, directions: int) -> dict[str, float]:
    """Replay and its own bytes on a link of that speed, against the download."""
    bytes_per_s = mbit * 1e6 / 8
    download_s = row["snapshot_mb"] * 1e6 / bytes_per_s
    round_s = row["replay_s_per_1000"] / 1000
    return {
        "mbit": mbit,
        "download_s": download_s,
        "break_even_rounds": math.ceil(download_s / (round_s + (4 * directions + RECORD_BYTES) / bytes_per_s)),
        "offered_beyond_rounds": math.floor(MARGIN * download_s / round_s),
    }


def measure_digest(path: Path | None, folder: Path) -> dict[str, float]:
    """What checking a cached shard's file costs a start, its pages cached or not."""
    if path is None:
        path = folder / "shard"
        path.write_bytes(np.random.default_rng(0).bytes(170_000_000))
    cached_s = min(seconds(lambda: sha256_of_file(path)) for _ in range(3))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {
        "size_mb": path.stat().st_size / 1e6,
        "uncached_s": seconds(lambda: sha256_of_file(path)),
        "cached_s": cached_s,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="what hosl-export wrote; default: OPT-125M's shapes")
    parser.add_argument("--directions", type=int, default=2, help="P; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=128, help="applied at once; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--mbit", type=float, nargs="+", default=[2.0, 20.0, 100.0, 1000.0], help="links, Mbit/s")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sgd, adamw = ClientOptimizer(), ClientOptimizer(optimizer="adamw")
    if options.bundle is not None:
        works = [(load_manifest(options.bundle), optimizer) for optimizer in (sgd, adamw)]
    else:
        blocks, lora = (make_manifest(train, opt_shapes(train)) for train in ("blocks", "lora"))
        works = [(blocks, sgd), (lora, sgd), (lora, adamw)]
    with tempfile.TemporaryDirectory() as name:
        report = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
            "versions": {name: version(name) for name in ("hosl", "numpy")},
            "kernel": "numpy" if load() is None else "compiled",
            "work": {name: getattr(options, name) for name in ("directions", "rounds", "threads")},
            "shard_digest": measure_digest(options.bundle and options.bundle / SHARD_WEIGHTS, Path(name)),
            "rows": [measure(manifest, optimizer, options, Path(name)) for manifest, optimizer in works],
        }
    print(json.dumps(report) if options.json else describe(report))


def describe(report: dict[str, Any]) -> str:
    """The report as a table."""
    work, digest = report["work"], report["shard_digest"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"{report['machine']}; {versions}, {report['kernel']} kernel",
        f"P = {work['directions']}, {work['rounds']} rounds at once, {work['threads']} threads",
        f"digest of the shard's file, {digest['size_mb']:.0f} MB: {digest['cached_s']:.2f} s from the page cache, "
        f"{digest['uncached_s']:.2f} s from disk",
    ]
    for row in report["rows"]:
        lines += [
            "",
            f"{row['train']}, {row['optimizer']}: {row['parameters'] / 1e6:.2f} M parameters, 1,000 rounds take "
            f"{row['replay_s_per_1000']:.2f} s (estimate {row['estimate_s_per_1000']:.2f} s)",
            f"snapshot of {row['snapshot_mb']:.1f} MB: copy {row['copy_s']:.2f} s, file {row['write_s']:.2f} s; "
            f"check and load {row['load_s']:.2f} s",
            f"{'link':>12}{'download':>12}{'break-even':>19}{'offered beyond':>21}",
        ]
        lines += [
            f"{link['mbit']:>7g} Mb/s{link['download_s']:>10.2f} s{link['break_even_rounds']:>12} rounds"
            f"{link['offered_beyond_rounds']:>14} rounds"
            for link in row["links"]
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
