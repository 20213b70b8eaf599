"""100 virtual devices on CIFAR-10, 10 a round: HO-SFL against first-order training and a frozen client.

python examples/fleet/run.py --data DIR [--rounds 300]

DIR holds train.npz and validation.npz (images uint8 [N, 32, 32, 3], labels). A run that is done is not repeated.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WORK = HERE / "work"
PARTITIONS = ("iid", "dirichlet:0.5")
METHODS: dict[str, list[str]] = {
    "first-order": ["--baseline", "first-order"],
    "HO-SFL": [],
    "frozen client": ["--set", "algorithm=frozen"],
}
COLORS = {"first-order": "tab:blue", "HO-SFL": "tab:red", "frozen client": "tab:gray"}


def main() -> int:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz and validation.npz")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--train", default="norm", choices=("norm", "blocks"), help="what the devices train")
    options = parser.parse_args()
    bundle = prepare_bundle(options.data, options.train)
    tables = {
        (partition, method): simulate(bundle, options, partition, method)
        for partition in PARTITIONS
        for method in METHODS
    }
    draw(tables, WORK / f"curves-{options.train}.png")
    report(tables)
    return 0


def prepare_bundle(data: Path, train: str) -> Path:
    """The model cut after its first stage."""
    bundle, model = WORK / f"bundle-{train}", WORK / "model"
    if not model.exists():
        call(HERE / "model.py", "--data", data, "--out", model)
    if not bundle.exists():
        cut = ("--split", 1, "--train", train, "--image-size", 64)
        call("-m", "hosl_export", "--model", model, *cut, "--out", bundle)
    return bundle


def simulate(bundle: Path, options: argparse.Namespace, partition: str, method: str) -> list[dict[str, Any]]:
    """The rows of a run's table."""
    name = f"{options.train}-{partition.replace(':', '-')}-{method.replace(' ', '-')}-{options.rounds}"
    table = WORK / f"{name}.csv"
    if not table.exists():
        print(f"== {partition}, {method}", flush=True)
        call(
            *("-m", "hosl_cloud", "simulate", "--bundle", bundle, "--config", HERE / "fleet.toml"),
            *("--data", options.data / "train.npz", "--eval", options.data / "validation.npz"),
            *("--devices", 100, "--per-round", 10, "--partition", partition, "--set", f"rounds={options.rounds}"),
            *("--data-dir", WORK / "data", "--csv", table, *METHODS[method]),
        )
    with table.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def call(*arguments: object) -> None:
    """Run Python on this; stop where it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def scored(rows: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """Round, megabytes on the wire and percent right of every evaluation."""
    return [
        (int(row["round"]), float(row["wire_bytes"]) / 1e6, 100 * float(row["accuracy"]))
        for row in rows
        if row["accuracy"]
    ]


def draw(tables: dict[tuple[str, str], list[dict[str, Any]]], path: Path) -> None:
    """Accuracy against rounds, one panel a partition."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PARTITIONS), figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, partition in zip(axes, PARTITIONS, strict=True):
        for method in METHODS:
            points = scored(tables[partition, method])
            axis.plot([p[0] for p in points], [p[2] for p in points], label=method, color=COLORS[method])
        axis.set_title(f"{partition}: 100 devices, 10 a round")
        axis.set_xlabel("round")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on 1,000 test images, %")
    axes[0].legend()
    figure.savefig(path, dpi=150)
    print(f"curves are in {path}")


def report(tables: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Final accuracies and traffic."""
    print(f"{'partition':<14} {'method':<14} {'final %':>8} {'best %':>8} {'MB on the wire':>15}")
    for (partition, method), rows in tables.items():
        points = scored(rows)
        best = max(point[2] for point in points)
        print(f"{partition:<14} {method:<14} {points[-1][2]:>8.1f} {best:>8.1f} {points[-1][1]:>15.0f}")


if __name__ == "__main__":
    sys.exit(main())
