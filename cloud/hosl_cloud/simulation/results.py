"""The results of a run as a table: one row a round, as CSV, and a summary of it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import msgspec

from hosl_cloud.storage.evaluations import list_evaluations, show_evaluation
from hosl_cloud.storage.store import Store

_EVALUATION = ("accuracy", "right", "scored", "examples", "of_examples", "perplexity", "macro_f1")

COLUMNS = ("round", "seconds", "wire_bytes", "loss", "eval_loss", *_EVALUATION)
"""Seconds and bytes since the run's start; from `eval_loss` on only where the round was evaluated, round 0 included."""


def result_rows(store: Store, run: str) -> list[dict[str, Any]]:
    """Make the rows of the table."""
    evaluations = {evaluation.round: evaluation for evaluation in list_evaluations(store, run)}
    rows: list[dict[str, Any]] = []
    seconds, wire_bytes = 0.0, 0
    if 0 in evaluations:
        rows.append({"round": 0, "seconds": 0.0, "wire_bytes": 0, "loss": None})
    for row in store.rounds(run):
        seconds, wire_bytes = seconds + row.seconds, wire_bytes + row.wire_bytes
        rows.append({"round": row.round, "seconds": seconds, "wire_bytes": wire_bytes, "loss": row.loss})

    for entry in rows:
        evaluation = evaluations.get(entry["round"])
        entry["eval_loss"] = evaluation.loss if evaluation else None
        for name in _EVALUATION:
            entry[name] = getattr(evaluation, name) if evaluation else None
    return rows


def write_csv(store: Store, run: str, path: Path) -> None:
    """Write the table to a file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(result_rows(store, run))


def summarize(store: Store, run: str) -> dict[str, Any]:
    """Sum a run up in a few figures."""
    rows = result_rows(store, run)
    scored = [row for row in rows if row["accuracy"] is not None]
    last = rows[-1] if rows else {"round": 0, "seconds": 0.0, "wire_bytes": 0, "loss": None}
    evaluation = show_evaluation(store, run)

    return {
        "run": run,
        "state": store.run(run).state,
        "rounds": last["round"],
        "seconds": last["seconds"],
        "wire_bytes": last["wire_bytes"],
        "loss": last["loss"],
        "final_accuracy": scored[-1]["accuracy"] if scored else None,
        "best_accuracy": max(row["accuracy"] for row in scored) if scored else None,
        "final_eval_loss": scored[-1]["eval_loss"] if scored else None,
        "evaluation": None if evaluation is None else msgspec.to_builtins(evaluation),
    }
