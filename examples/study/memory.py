"""Memory of the device's half by method, from processes of their own, next to what HOSL's paper states.

python examples/study/memory.py [--results DIR] [--chart FILE.svg]

It runs tests/benchmarks/edge_step.py on the papers' models with random weights. With --chart it only draws what was
measured, OPT-125M with LoRA.
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
    "floor": "floor_rss_mb",
    "HO-SFL, P 2": "peak_rss_mb",
    "first-order": "first_order_peak_rss_mb",
    "MeZO in torch": "torch_mezo_peak_rss_mb",
    "backpropagation in torch": "torch_fo_peak_rss_mb",
}
"""A method's name, and its figure in the benchmark's rows."""

CHARTED = {
    "floor": "what a forward needs",
    "HO-SFL, P 2": "hosl, ho-sfl",
    "first-order": "hosl, first-order",
    "MeZO in torch": "MeZO in torch",
    "backpropagation in torch": "backpropagation in torch",
}
"""Bars of the chart, from above, and their names there."""

PAPER = "1.38 to 3.7"
"""How many times less GPU memory HOSL's client needs than first-order split learning's (arXiv 2601.10940)."""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--chart", type=Path, help="draw the rows of memory.csv to this file, and measure nothing")
    options = parser.parse_args()
    if options.chart is not None:
        with (options.results / "memory.csv").open(encoding="utf-8") as file:
            rows_by_case = {(row["model"], row["trains"], row["batch"]): row for row in csv.DictReader(file)}
        options.chart.write_text(chart(rows_by_case["OPT-125M", "lora", "16x128"]), encoding="utf-8")
        return
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


def chart(row: dict[str, str]) -> str:
    """An SVG of horizontal bars, which follows the reader's light or dark theme."""
    most = max(int(row[name]) for name in CHARTED)
    width, height, left = 860, 44 * len(CHARTED) + 74, 230
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\">",
        "<title>Peak memory of one training step of the device's half</title>",
        "<style>",
        ".ink { fill: #1f2328 } .faint { fill: #59636e } .own { fill: #2563c4 } .other { fill: #a3adb8 }",
        "@media (prefers-color-scheme: dark) {",
        ".ink { fill: #e6edf3 } .faint { fill: #9aa5b1 } .own { fill: #79b0ff } .other { fill: #57606a } }",
        "</style>",
        '<text class="ink" x="12" y="24" font-size="16" font-weight="600">Peak memory of one training step</text>',
    ]
    for place, (name, label) in enumerate(CHARTED.items()):
        y, length = 48 + 44 * place, (width - left - 90) * int(row[name]) / most
        kind = "own" if label.startswith("hosl") else "other"
        lines += [
            f'<text class="ink" x="{left - 14}" y="{y + 20}" font-size="15" text-anchor="end">{label}</text>',
            f'<rect class="{kind}" x="{left}" y="{y}" width="{length:.0f}" height="30" rx="3"/>',
            f'<text class="ink" x="{left + length + 10:.0f}" y="{y + 20}" font-size="15">{row[name]} MB</text>',
        ]
    what = "OPT-125M, 6 of 12 blocks on the device, LoRA, a batch of 16 x 128 tokens; whole processes, torch's too"
    lines += [f'<text class="faint" x="12" y="{height - 8}" font-size="13">{what}</text>', "</svg>", ""]
    return "\n".join(lines)


def page(rows: list[dict[str, Any]]) -> list[str]:
    """The table as Markdown."""
    lines = [
        "# Memory of the device's half by method",
        "",
        "Peak resident megabytes of one training step, each method in a process of its own; 6 blocks, random weights",
        "(`memory.py`). The floor is the idle agent, the weights that a forward reads and the activations that the",
        f"algorithm must hold. HOSL's paper states client GPU memory {PAPER} times below first-order split learning's.",
        "",
        f"| model | trains | batch | {' | '.join(METHODS)} | torch / HO-SFL | torch / first-order |",
        "|---" * (5 + len(METHODS)) + "|",
    ]
    for row in rows:
        _, estimated, exact, _, torch = (row[name] for name in METHODS)
        facts = (row["model"], row["trains"], row["batch"], *(row[name] for name in METHODS))
        lines.append("| " + " | ".join(map(str, facts)) + f" | {torch / estimated:.1f} | {torch / exact:.1f} |")
    return lines


if __name__ == "__main__":
    main()
