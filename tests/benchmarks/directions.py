"""Time one pass of directions over 82.7 M parameters against normal numbers of numpy and torch.

    python tests/benchmarks/directions.py [--elements N] [--repeats N] [--json]

A pass adds `terms` directions to float32 weights in place; the normals do the same in chunks of 65536.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hosl_protocol import LatticeTensor, Recipe, Term, add_directions
from hosl_protocol.directions import CHUNK

ELEMENTS = 82_700_000
"""Trainable parameters of the client half of OPT-125M, split 6, embeddings included."""

Weights = npt.NDArray[np.float32]


def add_signs(weights: Weights, terms: int, executor: ThreadPoolExecutor | None) -> None:
    """The product's own pass."""
    tensor = LatticeTensor("weights", 0, weights, -24)
    add_directions([tensor], [Term(1, direction, [2.0**-10]) for direction in range(terms)], Recipe(1), executor)


def add_numpy_normals(weights: Weights) -> None:
    """One direction of numpy's ziggurat, Philox bits, one thread."""
    generator, chunk = np.random.Generator(np.random.Philox(1)), np.empty(CHUNK, np.float32)
    for start in range(0, weights.size, CHUNK):
        part = weights[start : start + CHUNK]
        z = chunk[: part.size]
        generator.standard_normal(out=z, dtype=np.float32)
        z *= np.float32(2.0**-10)
        part += z


def add_torch_normals(weights: Weights) -> None:
    """One direction of torch's normals, one thread: torch draws them in one whatever it is told."""
    import torch

    torch.set_num_threads(1)
    generator, chunk, tensor = torch.Generator().manual_seed(1), torch.empty(CHUNK), torch.from_numpy(weights)
    for part in tensor.split(CHUNK):
        z = chunk[: part.numel()]
        z.normal_(generator=generator)
        part.add_(z, alpha=2.0**-10)


def median_ms(work: Callable[[], None], repeats: int) -> float:
    """Median duration after one unmeasured call."""
    work()
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        durations.append(time.perf_counter() - start)
    return 1e3 * statistics.median(durations)


def torch_version() -> str | None:
    """None where torch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return str(torch.__version__)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, load and versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch_version(),
    }


def measure(elements: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each kind of pass."""
    weights = np.zeros(elements, np.float32)
    rows = []
    for terms in (1, 2):
        for threads in (1, 2):
            with ThreadPoolExecutor(threads) as executor:
                work = partial(add_signs, weights, terms, executor if threads > 1 else None)
                rows.append(("hosl signs", terms, threads, median_ms(work, repeats)))
    rows.append(("numpy normals", 1, 1, median_ms(partial(add_numpy_normals, weights), repeats)))
    if torch_version() is not None:
        rows.append(("torch normals", 1, 1, median_ms(partial(add_torch_normals, weights), repeats)))
    return [
        {"work": work, "terms": terms, "threads": threads, "median_ms": round(ms, 1)}
        for work, terms, threads, ms in rows
    ]


def print_table(machine: dict[str, Any], elements: int, repeats: int, rows: list[dict[str, Any]]) -> None:
    """The figures for people."""
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{elements / 1e6:.1f} M float32 weights, in place; median of {repeats}\n")
    print(f"{'work':<16}{'terms':>6}{'threads':>9}{'ms':>10}{'ns/weight/term':>17}")
    for row in rows:
        per_weight = 1e6 * row["median_ms"] / elements / row["terms"]
        print(f"{row['work']:<16}{row['terms']:>6}{row['threads']:>9}{row['median_ms']:>10.1f}{per_weight:>17.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="weights; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="measured passes of each kind; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    machine = describe_machine()
    rows = measure(options.elements, options.repeats)
    if options.json:
        report = {"machine": machine, "elements": options.elements, "repeats": options.repeats, "rows": rows}
        print(json.dumps(report, indent=1))
    else:
        print_table(machine, options.elements, options.repeats, rows)


if __name__ == "__main__":
    main()
