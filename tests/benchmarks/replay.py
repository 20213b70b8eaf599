"""Replaying updates from scalars against copying the weights over a link.

    python tests/benchmarks/replay.py [--width N] [--blocks N] [--mbit N] [--rounds N] [--repeats N] [--json]

Trainable tensors of the geometry (default: OPT-125M, split 6) without a model: SGD on whole blocks with one and two
threads, AdamW on LoRA's adapters. A catch-up of that many rounds of P = 2 is applied at once, as a device does.
"Break-even" is how many rounds a device can have missed before copying what trains would have been faster, the
rounds' own bytes on the link included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np

from hosl_protocol.arithmetic.kernel import load
from hosl_protocol.arithmetic.lattice import exponent_for, round_to_lattice
from hosl_protocol.arithmetic.perturbation import LatticeTensor
from hosl_protocol.run.settings import ClientOptimizer
from hosl_protocol.weights.client_weights import ClientWeights
from hosl_protocol.weights.estimates import UpdateRecord

DIRECTIONS = 2
RECORD_BYTES = 4 * DIRECTIONS + 8
"""Of a round in a CatchUp: float32 coefficients and a float64 rate."""
LORA_RANK = 8


@dataclass(frozen=True)
class Work:
    """One row."""

    train: str
    optimizer: Literal["sgd", "adamw"]
    threads: int


WORKS = (Work("blocks", "sgd", 1), Work("blocks", "sgd", 2), Work("lora", "sgd", 1), Work("lora", "adamw", 1))


def block_sizes(train: str, width: int) -> list[int]:
    """Elements of what trains in one block of OPT: adapters of q and v, or attention, feed-forward and norms."""
    if train == "lora":
        return 4 * [LORA_RANK * width]
    return [*4 * [width * width, width], 4 * width * width, 4 * width, 4 * width * width, width, *4 * [width]]


def make_tensors(train: str, width: int, blocks: int) -> list[LatticeTensor]:
    """Random weights on their lattices."""
    generator = np.random.default_rng(0)
    tensors = []
    for index, size in enumerate(blocks * block_sizes(train, width)):
        values = 0.02 * generator.standard_normal(size, np.float32)
        exponent = exponent_for(float(np.abs(values).max()))
        tensors.append(LatticeTensor(f"tensor{index}", index, round_to_lattice(values, exponent), exponent))
    return tensors


def make_weights(work: Work, tensors: list[LatticeTensor]) -> ClientWeights:
    """As a device holds them."""
    optimizer = ClientOptimizer(optimizer=work.optimizer)
    return ClientWeights(tensors, seed=1, probe_step=1e-3, optimizer=optimizer, threads=work.threads)


def make_updates(first: int, rounds: int) -> list[UpdateRecord]:
    """Coefficients of both signs, large enough to be no 0 on the lattice."""
    generator = np.random.default_rng(first)
    coefficients = 1e-5 * generator.choice(np.array([-1.0, 1.0], np.float32), (rounds, DIRECTIONS))
    return [UpdateRecord(first + row, coefficients[row], 1e-7) for row in range(rounds)]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows; the works take turns."""
    tensors = {train: make_tensors(train, options.width, options.blocks) for train in ("blocks", "lora")}
    seconds: dict[Work, list[float]] = {work: [] for work in WORKS}
    weights = {work: make_weights(work, tensors[work.train]) for work in WORKS}
    for turn in range(options.repeats + 1):
        for work, own in weights.items():
            updates = make_updates(own.applied_round + 1, options.rounds)
            start = time.perf_counter()
            own.apply(updates)
            if turn:
                seconds[work].append((time.perf_counter() - start) / options.rounds)
    for own in weights.values():
        own.close()
    return [make_row(work, weights[work].elements, statistics.median(seconds[work]), options.mbit) for work in WORKS]


def make_row(work: Work, parameters: int, round_s: float, mbit: float) -> dict[str, Any]:
    """The figures and what follows from them."""
    bytes_per_s = mbit * 1e6 / 8
    copy_s = 4 * parameters / bytes_per_s
    return {
        "train": work.train,
        "optimizer": work.optimizer,
        "threads": work.threads,
        "parameters": parameters,
        "rounds_per_s": 1.0 / round_s,
        "coefficients_per_s": DIRECTIONS / round_s,
        "copy_mb": 4 * parameters / 1e6,
        "copy_s": copy_s,
        "break_even_rounds": int(copy_s / (round_s + RECORD_BYTES / bytes_per_s)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="default: %(default)s, OPT-125M")
    parser.add_argument("--blocks", type=int, default=6, help="blocks on the device; default: %(default)s")
    parser.add_argument("--mbit", type=float, default=20.0, help="speed of the link in Mbit/s; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=64, help="applied at once; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {name: version(name) for name in ("hosl", "numpy")},
        "kernel": "numpy" if load() is None else "compiled",
        "work": {name: getattr(options, name) for name in ("width", "blocks", "mbit", "rounds", "repeats")},
        "rows": measure(options),
    }
    print(json.dumps(report) if options.json else describe(report))


def describe(report: dict[str, Any]) -> str:
    """The report as a table."""
    work = report["work"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"{report['machine']}; {versions}, {report['kernel']} kernel",
        f"{work['blocks']} blocks of width {work['width']}, P = {DIRECTIONS}, {work['rounds']} rounds at once; "
        f"median of {work['repeats']}; link of {work['mbit']:g} Mbit/s",
        f"{'train':<8}{'optimizer':>10}{'threads':>9}{'parameters':>12}{'rounds/s':>11}{'coefficients/s':>16}"
        f"{'copy':>10}{'takes':>9}{'break-even':>18}",
    ]
    for row in report["rows"]:
        lines.append(
            f"{row['train']:<8}{row['optimizer']:>10}{row['threads']:>9}{row['parameters'] / 1e6:>10.2f} M"
            f"{row['rounds_per_s']:>11.1f}{row['coefficients_per_s']:>16.1f}"
            f"{row['copy_mb']:>7.1f} MB{row['copy_s']:>7.1f} s{row['break_even_rounds']:>11} rounds"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
