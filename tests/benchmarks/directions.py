"""Time the passes of a zeroth-order step over 82.7 M weights, against a plain in-place add over the same memory.

    python tests/benchmarks/directions.py [--elements N] [--repeats N] [--threads N] [--json]

Perturb: one direction. Move: restore one direction and perturb by the next. Update: 8 coefficients in one pass. Each
with the compiled kernel and with numpy; gaussian directions and plain seeded normals of numpy and torch for comparison.
All kinds of work take turns, so that what slows the machine slows all.
Targets, with the kernel: perturb at most 3 times, update at most 20 times the plain add.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hosl_protocol.arithmetic import kernel
from hosl_protocol.arithmetic.directions import CHUNK, Distribution
from hosl_protocol.arithmetic.perturbation import SEGMENT, LatticeTensor, Recipe, Term, add_directions

ELEMENTS = 82_700_000
"""Trainable parameters of the client half of OPT-125M, split 6, embeddings included."""

TARGETS = {"perturb": 3.0, "update": 20.0}

Weights = npt.NDArray[np.float32]


def plain_add(weights: Weights, executor: ThreadPoolExecutor) -> None:
    """The floor: weights += scalar, by the same segments and threads."""

    def add(start: int) -> None:
        part = weights[start : start + SEGMENT]
        np.add(part, np.float32(2.0**-10), out=part)

    for _ in executor.map(add, range(0, weights.size, SEGMENT)):
        pass


def add_terms(
    weights: Weights,
    executor: ThreadPoolExecutor,
    terms: int,
    distribution: Distribution = "rademacher",
    with_numpy: bool = False,
) -> None:
    """The product's own pass."""
    tensor = LatticeTensor("weights", 0, weights, -24)
    recipe = NumpyRecipe(1, distribution) if with_numpy else Recipe(1, distribution)
    signed = [Term(1, direction, [2.0**-10 * (-1) ** direction]) for direction in range(terms)]
    add_directions([tensor], signed, recipe, executor)


class NumpyRecipe(Recipe):
    """As if the kernel had not been compiled."""

    def add(
        self, values: Weights, tensor: LatticeTensor, start: int, terms: Sequence[Term], *, is_rounded: bool = True
    ) -> None:
        self._add_with_numpy(values, tensor, start, terms, is_rounded)


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


def measure(elements: int, repeats: int, threads: int) -> list[dict[str, Any]]:
    """One row for each kind of pass; a ratio is the median of its turns against the plain add of the same turn."""
    weights = np.zeros(elements, np.float32)
    with ThreadPoolExecutor(threads) as executor:
        works: dict[str, tuple[int, Callable[[], None]]] = {
            "plain add": (1, partial(plain_add, weights, executor)),
            "perturb": (1, partial(add_terms, weights, executor, 1)),
            "move": (2, partial(add_terms, weights, executor, 2)),
            "update": (8, partial(add_terms, weights, executor, 8)),
            "numpy perturb": (1, partial(add_terms, weights, executor, 1, with_numpy=True)),
            "numpy move": (2, partial(add_terms, weights, executor, 2, with_numpy=True)),
            "numpy update": (8, partial(add_terms, weights, executor, 8, with_numpy=True)),
            "gaussian": (1, partial(add_terms, weights, executor, 1, "gaussian")),
            "numpy normals": (1, partial(add_numpy_normals, weights)),
        }
        if kernel.load() is None:
            works = {name: work for name, work in works.items() if name not in ("perturb", "move", "update")}
        if torch_version() is not None:
            works["torch normals"] = 1, partial(add_torch_normals, weights)
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(repeats + 1):
            for name, (_, work) in works.items():
                start = time.perf_counter()
                work()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    floor = seconds["plain add"]
    return [
        {
            "work": name,
            "terms": terms,
            "median_ms": round(1e3 * statistics.median(seconds[name]), 1),
            "ns_per_parameter": round(1e9 * statistics.median(seconds[name]) / elements, 3),
            "ratio": round(statistics.median(a / b for a, b in zip(seconds[name], floor, strict=True)), 2),
        }
        for name, (terms, _) in works.items()
    ]


def print_table(machine: dict[str, Any], options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The figures for people."""
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    work = f"{options.elements / 1e6:.1f} M float32 weights, in place, {options.threads} threads"
    print(f"{work}; median of {options.repeats}\n")
    print(f"{'work':<16}{'terms':>6}{'ms':>10}{'ns/parameter':>15}{'x plain add':>13}")
    for row in rows:
        is_far = row["ratio"] > TARGETS.get(row["work"], float("inf"))
        print(
            f"{row['work']:<16}{row['terms']:>6}{row['median_ms']:>10.1f}{row['ns_per_parameter']:>15.3f}"
            f"{row['ratio']:>13.2f}{'  above target' if is_far else ''}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="weights; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="measured passes of each kind; default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    machine = describe_machine()
    rows = measure(options.elements, options.repeats, options.threads)
    if options.json:
        work = {name: getattr(options, name) for name in ("elements", "repeats", "threads")}
        print(json.dumps({"machine": machine, **work, "rows": rows}, indent=1))
    else:
        print_table(machine, options, rows)


if __name__ == "__main__":
    main()
