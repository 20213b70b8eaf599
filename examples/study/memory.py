"""Memory of the device's half by method, from processes of their own, next to what HOSL's paper states.

python examples/study/memory.py [--results DIR]

It runs tests/benchmarks/edge_step.py on the papers' models with random weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BENCHMARK = HERE.parents[1] / "tests" / "benchmarks" / "edge_step.py"
CASES = (
    ("OPT-125M", "norm", "16x128"),
    ("OPT-125M", "lora", "16x128"),
    ("OPT-125M", "blocks", "16x128"),
    ("OPT-125M", "blocks", "64x128"),
    ("OPT-1.3B", "lora", "16x128"),
    ("OPT-1.3B", "blocks", "16x128"),
)
METHODS = {
    "HO-SFL, P 2": "peak_rss_mb",
    "backpropagation in torch": "torch_fo_peak_rss_mb",
    "MeZO in torch": "torch_mezo_peak_rss_mb",
    "floor": "floor_rss_mb",
}
"""A method's name, and its figure in the benchmark's rows."""

PAPER = "1.38 to 3.7"
"""How many times less GPU memory HOSL's client needs than first-order split learning's (arXiv 2601.10940)."""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for case in CASES:
        rows.append(measure(*case))
        with (options.results / "memory.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["model", "trains", "batch", *METHODS])
            writer.writeheader()
            writer.writerows(rows)
        (options.results / "memory.md").write_text("\n".join(page(rows)) + "\n", encoding="utf-8")
    print("\n".join(page(rows)))


def measure(model: str, train: str, shape: str) -> dict[str, Any]:
    """One row: peak resident megabytes of each method."""
    asked = ("--models", model, "--splits", "6", "--trains", train, "--shapes", shape, "--repeats", "1", "--json")
    done = subprocess.run([sys.executable, str(BENCHMARK), *asked], check=True, text=True, stdout=subprocess.PIPE)
    (row,) = json.loads(done.stdout)
    figures = {name: round(row[key]) for name, key in METHODS.items()}
    print(model, train, shape, figures, flush=True)
    return {"model": model, "trains": train, "batch": shape, **figures}


def page(rows: list[dict[str, Any]]) -> list[str]:
    """The table as Markdown."""
    lines = [
        "# Memory of the device's half by method",
        "",
        "Peak resident megabytes of one training step, each method in a process of its own; 6 blocks, random weights",
        "(`memory.py`). The floor is the idle agent, the weights that a forward reads and the activations that the",
        f"algorithm must hold. HOSL's paper states client GPU memory {PAPER} times below first-order split learning's.",
        "",
        f"| model | trains | batch | {' | '.join(METHODS)} | first-order / hosl | MeZO / hosl |",
        "|---" * (5 + len(METHODS)) + "|",
    ]
    for row in rows:
        own, first, mezo, _ = (row[name] for name in METHODS)
        facts = (row["model"], row["trains"], row["batch"], *(row[name] for name in METHODS))
        lines.append("| " + " | ".join(map(str, facts)) + f" | {first / own:.1f} | {mezo / own:.1f} |")
    return lines


if __name__ == "__main__":
    main()
