"""Running cells through `hosl-cloud simulate`, several at a time; one that is done is not run again."""

from __future__ import annotations

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from plan import Cell, Study, flattened, with_seed
from sources import export_bundle, prepare_data, trained_count


@dataclass(frozen=True)
class Workshop:
    """Where a study runs."""

    study: Study
    name: str
    data: Path
    work: Path
    jobs: int
    threads: int
    """Of each run."""

    @property
    def runs(self) -> Path:
        """Tables and summaries of the cells."""
        return self.work / "runs" / self.name


def run_cells(shop: Workshop, cells: list[Cell]) -> None:
    """Run what is missing."""
    shop.runs.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not (shop.runs / f"{cell.name}.json").exists()]
    print(f"{shop.name}: {len(cells)} runs, {len(missing)} to do", flush=True)
    for split, train in sorted({(cell.split, shop.study.methods[cell.method].train) for cell in missing}):
        export_bundle(shop.study, split, train, shop.data, shop.work)
    for cell in missing:
        prepare_data(shop.study.tasks[cell.task], cell, shop.data, shop.work)
    with ThreadPoolExecutor(shop.jobs) as pool:
        for _ in pool.map(lambda cell: run_cell(shop, cell), missing):
            pass


def run_cell(shop: Workshop, cell: Cell) -> None:
    """One run. Its own failure is a result: the summary then holds what it said."""
    bundle = export_bundle(shop.study, cell.split, shop.study.methods[cell.method].train, shop.data, shop.work)
    train, validation = prepare_data(shop.study.tasks[cell.task], cell, shop.data, shop.work)
    folder, table = shop.runs / f"{cell.name}.work", shop.runs / f"{cell.name}.csv"
    shutil.rmtree(folder, ignore_errors=True)
    settings = [f"--set={key}={as_toml(value)}" for key, value in flattened(with_seed(cell))]
    command = [
        *(sys.executable, "-m", "hosl_cloud", "simulate", "--bundle", bundle, "--data", train, "--eval", validation),
        *("--devices", shop.study.devices, "--per-round", shop.study.per_round, "--partition", cell.partition),
        *("--threads", shop.threads, "--set", f"tail.threads={shop.threads}", *settings),
        *("--data-dir", folder, "--csv", table, "--json"),
    ]
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": str(shop.threads), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([str(word) for word in command], text=True, capture_output=True, env=environment, check=False)
    shutil.rmtree(folder, ignore_errors=True)
    if done.returncode == 130:
        raise KeyboardInterrupt
    summary = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip().splitlines()[-1:]}
    summary |= {"trained": trained_count(bundle), "wall_seconds": round(time.monotonic() - began, 1)}
    (shop.runs / f"{cell.name}.json").write_text(json.dumps(summary), encoding="utf-8")
    score = summary.get("final_accuracy")
    outcome = f"{100 * score:.1f} %" if score is not None else summary.get("error", "no score")
    print(f"  {summary['wall_seconds']:6.0f} s  {cell.name}: {outcome}", flush=True)


def as_toml(value: Any) -> str:
    """`value` as `--set` takes it."""
    return json.dumps(value)


def summary_of(shop: Workshop, cell: Cell) -> dict[str, Any] | None:
    """What the run came to, or None where it has not run."""
    path = shop.runs / f"{cell.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table_of(shop: Workshop, cell: Cell) -> list[dict[str, float]]:
    """The run's rows, empty where it failed; numbers that are missing are left out."""
    path = shop.runs / f"{cell.name}.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def round_times(shop: Workshop, cells: Iterable[Cell]) -> dict[tuple[str, int, str], float]:
    """Median seconds of a round by task, split and method."""
    lasted: dict[tuple[str, int, str], list[float]] = {}
    for cell in cells:
        ends = [0.0, *(row["seconds"] for row in table_of(shop, cell) if "loss" in row)]
        lasted.setdefault((cell.task, cell.split, cell.method), []).extend(np.diff(ends).tolist())
    return {place: statistics.median(seconds) for place, seconds in lasted.items() if seconds}


def choose(shop: Workshop, cells: Iterable[Cell]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """For each task, split and method the candidate with the lowest loss on the examples put aside."""
    best: dict[tuple[str, int, str], tuple[float, dict[str, Any]]] = {}
    for cell in cells:
        summary, place = summary_of(shop, cell), (cell.task, cell.split, cell.method)
        if summary is None or summary.get("final_eval_loss") is None:
            continue
        if place not in best or summary["final_eval_loss"] < best[place][0]:
            best[place] = (summary["final_eval_loss"], dict(cell.choice or {}))
    return {place: choice for place, (_, choice) in best.items()}
