"""What each method costs the device: processor seconds of a round and peak memory, from real clouds and devices.

python examples/study/cost.py examples/study/settings/first-order-images.toml --task darken --split 2 --data DIR

Each method runs twice, a few rounds and some more: the difference is what a round costs. First-order training runs once
more with no more memory than HO-SFL's.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plan import MethodEntry, Study, flattened, merge, read_study, study_cells
from sources import export_bundle, prepare_data

sys.path.append(str(Path(__file__).parents[1]))
from running import cloud, tool

HERE = Path(__file__).parent
FEW, MORE = 3, 9
"""Rounds of the two runs."""
MB = 1_000_000


@dataclass(frozen=True)
class Cost:
    """What a round of a method costs the device."""

    method: str
    cpu_seconds: float
    """Processor seconds of a round, all threads together."""
    peak_rss_mb: float
    anonymous_mb: float
    wire_mb: float
    """Megabytes of a round, up and down."""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="one of settings/*.toml")
    parser.add_argument("--data", type=Path, required=True, help="folder with the tasks' data, one folder a task")
    parser.add_argument("--task", required=True)
    parser.add_argument("--split", type=int, required=True)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="bundles, runs (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the table (default: %(default)s)")
    options = parser.parse_args()
    study = read_study(options.settings)

    costs = []
    for name, method in study.methods.items():
        if "baseline" in method.run or (method.tasks and options.task not in method.tasks):
            continue
        costs.append(measure(study, name, options))
        print(costs[-1], flush=True)
    for name, method in study.methods.items():
        is_limited = method.run.get("algorithm") == "first-order" and (not method.tasks or options.task in method.tasks)
        if is_limited:
            costs.append(measure(study, name, options, least_budget(study, costs, method)))
            print(costs[-1], flush=True)
    path = options.results / f"{options.settings.stem}-{options.task}-{options.split}-cost.md"
    path.write_text("\n".join(page(study, options, costs)) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


def least_budget(study: Study, costs: list[Cost], method: MethodEntry) -> int:
    """Whole megabytes, in bytes: the peak of HO-SFL that trains the same weights, or of any, where none does."""
    others = {cost.method: cost.peak_rss_mb for cost in costs if cost.method.startswith("HO-SFL")}
    alike = [peak for name, peak in others.items() if study.methods[name].train == method.train]
    return math.ceil(min(alike or others.values())) * MB


def measure(study: Study, method: str, options: argparse.Namespace, budget: int = 0) -> Cost:
    """Two runs of the method; `budget` in bytes is the device's `--memory-budget`."""
    few, more = (run_device(study, method, options, rounds, budget) for rounds in (FEW, MORE))
    rounds = MORE - FEW
    wire = sum(more[key] - few[key] for key in ("sent_bytes", "received_bytes"))
    return Cost(
        method=f"{method}, --memory-budget {budget // MB}M" if budget else method,
        cpu_seconds=(more["cpu_seconds"] - few["cpu_seconds"]) / rounds,
        peak_rss_mb=more["peak_rss_bytes"] / MB,
        anonymous_mb=more["anonymous_bytes"] / MB,
        wire_mb=wire / rounds / MB,
    )


def run_device(study: Study, method: str, options: argparse.Namespace, rounds: int, budget: int) -> dict[str, Any]:
    """A cloud and a device for some rounds; the device's summary."""
    bundle = export_bundle(study, options.split, study.methods[method].train, options.data, options.work)
    cell = next(
        cell
        for cell in study_cells(study, {})
        if (cell.task, cell.split, cell.method) == (options.task, options.split, method)
    )
    train, _ = prepare_data(study.tasks[options.task], cell, options.data, options.work)
    folder = options.work / "cost"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = folder / "run.toml"
    short = {"rounds": rounds, "seed": 1, "evaluation": {"every": 0, "start": False}}
    lines = [f"{key} = {json.dumps(value)}" for key, value in flattened(merge(cell.run, short))]
    config.write_text("\n".join(lines), encoding="utf-8")
    with cloud(bundle, config, folder / "cloud") as (server, token_file):
        command = tool(
            *("hosl-edge", "--server", server, "--token-file", token_file, "--data", train, "--json", "--share-text"),
            *("--threads", 1, "--state-dir", folder / "state", "--cache-dir", folder / "cache"),
            *(("--memory-budget", budget) if budget else ()),
        )
        done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def page(study: Study, options: argparse.Namespace, costs: list[Cost]) -> list[str]:
    """The table as Markdown."""
    frozen = next(cost.cpu_seconds for cost in costs if cost.method == "frozen")
    lines = [
        f"# What a round costs the device: {options.task}, split {options.split}",
        "",
        f"{study.title}. Written by `cost.py {options.settings.name} --task {options.task} --split {options.split}`:",
        f"real clouds and devices, one thread; the difference of {MORE} rounds and {FEW}. Memory is the",
        "whole process's.",
        "",
        "| method | processor seconds | of frozen | peak MB | anonymous MB at the end | MB on the wire |",
        "|---|---|---|---|---|---|",
    ]
    for cost in costs:
        lines.append(
            f"| {cost.method} | {cost.cpu_seconds:.2f} | {cost.cpu_seconds / frozen:.1f} | {cost.peak_rss_mb:.0f} | "
            f"{cost.anonymous_mb:.0f} | {cost.wire_mb:.2f} |"
        )
    return lines


if __name__ == "__main__":
    main()
