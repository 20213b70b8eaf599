"""What a study came to: a table of runs (CSV), a page (Markdown) and pictures (PNG)."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Workshop, choose, round_times, summary_of, table_of
from draw import draw_accuracy, draw_curves
from plan import Cell, untried_rates

COLUMNS = (
    *("task", "split", "partition", "method", "trains", "trained", "seed", "rounds", "final_accuracy"),
    *("best_accuracy", "eval_loss", "train_loss", "megabytes", "round_seconds", "error"),
)


@dataclass(frozen=True)
class Row:
    """One run and what it came to."""

    cell: Cell
    summary: dict[str, Any]
    table: list[dict[str, float]]
    round_seconds: float | None
    """Median time of a round; None where nothing was timed."""
    order: int
    """The method's place in the settings."""

    @property
    def place(self) -> tuple[str, int, str]:
        """Task, split and partition: runs of one place are compared with each other."""
        return self.cell.task, self.cell.split, self.cell.partition

    @property
    def train_loss(self) -> float | None:
        """Mean over the last tenth of the rounds."""
        losses = [row["loss"] for row in self.table if "loss" in row]
        return statistics.fmean(losses[-max(1, len(losses) // 10) :]) if losses else None


def write_results(shop: Workshop, tuning: list[Cell], cells: list[Cell], timing: list[Cell], folder: Path) -> None:
    """Write what there is so far."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_tuning(shop, tuning, folder / f"{shop.name}-tuning.csv")
    alone = round_times(shop, timing)
    times = alone or round_times(shop, cells)
    order = {method: place for place, method in enumerate(shop.study.methods)}
    rows = [
        Row(cell, summary, table_of(shop, cell), times.get((cell.task, cell.split, cell.method)), order[cell.method])
        for cell in cells
        if (summary := summary_of(shop, cell))
    ]
    if not rows:
        print(f"{shop.name}: nothing has run yet")
        return
    _write_csv(shop, rows, folder / f"{shop.name}.csv")
    draw_accuracy(shop.study.title, rows, folder / f"{shop.name}-accuracy.png")
    where = "alone on the machine" if alone else "beside other runs, one a core"
    draw_curves(shop.study.title, rows, f"seconds, {where}", folder / f"{shop.name}-curves.png")
    page = folder / f"{shop.name}.md"
    page.write_text("\n".join(_page(shop, rows, len(cells), where)) + "\n", encoding="utf-8")
    print(f"{shop.name}: {len(rows)} of {len(cells)} runs are in {page}")


def _write_csv(shop: Workshop, rows: list[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            cell, summary = row.cell, row.summary
            writer.writerow(
                {
                    **{name: getattr(cell, name) for name in ("task", "split", "partition", "method", "seed")},
                    "trains": shop.study.methods[cell.method].train,
                    "trained": summary["trained"],
                    "rounds": summary.get("rounds"),
                    "final_accuracy": _rounded(summary.get("final_accuracy")),
                    "best_accuracy": _rounded(summary.get("best_accuracy")),
                    "eval_loss": _rounded(summary.get("final_eval_loss")),
                    "train_loss": _rounded(row.train_loss),
                    "megabytes": _rounded(summary.get("wire_bytes", 0) / 1e6, 1),
                    "round_seconds": _rounded(row.round_seconds, 3),
                    "error": " ".join(summary.get("error", [])),
                }
            )


def _write_tuning(shop: Workshop, cells: list[Cell], path: Path) -> None:
    chosen = choose(shop, cells)
    done = [(cell, summary) for cell in cells if (summary := summary_of(shop, cell))]
    if not done:
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("task", "split", "method", "candidate", "rounds", "eval_loss", "accuracy", "chosen", "error"))
        for cell, summary in done:
            is_chosen = chosen.get((cell.task, cell.split, cell.method)) == dict(cell.choice or {})
            figures = [_rounded(summary.get(key)) for key in ("final_eval_loss", "final_accuracy")]
            facts = (cell.task, cell.split, cell.method, json.dumps(cell.choice), summary.get("rounds"))
            writer.writerow((*facts, *figures, "yes" if is_chosen else "", " ".join(summary.get("error", []))))


def _rounded(value: float | None, digits: int = 5) -> float | str:
    return "" if value is None else round(value, digits)


def _page(shop: Workshop, rows: list[Row], planned: int, where: str) -> Iterator[str]:
    study = shop.study
    yield f"# {study.title}"
    yield ""
    fleet = f"{study.devices} virtual devices, {study.per_round or study.devices} a round" if study.devices > 1 else ""
    done = f"{len(rows)} of {planned} runs" if len(rows) < planned else f"{planned} runs"
    yield f"Written by `study.py {shop.name}.toml`: {done}. " + (f"{fleet}. " if fleet else "")
    yield "Accuracies are in percent, mean ± standard deviation over seeds (how many); *vs frozen* is the difference"
    yield f"from the frozen client of the same seed. Seconds of a round are medians, {where}."
    for line in untried_rates(study):
        yield ""
        yield f"- {line}."
    for place in dict.fromkeys(row.place for row in rows):
        task, split, partition = place
        yield ""
        yield f"## {task}, split {split}" + (f", {partition}" if partition != "iid" or study.devices > 1 else "")
        yield ""
        yield "| method | d_c | final | best | vs frozen | eval loss | loss vs frozen | train loss | MB | s a round |"
        yield "|---|---|---|---|---|---|---|---|---|---|"
        here = [row for row in rows if row.place == place]
        for method in sorted({row.cell.method for row in here}, key=list(study.methods).index):
            control = [row for row in here if row.cell.method == study.methods[method].control]
            yield _line(method, [row for row in here if row.cell.method == method], control)
    yield ""
    yield f"![accuracy of every run]({shop.name}-accuracy.png)"
    yield ""
    yield f"![training loss against rounds, megabytes and seconds]({shop.name}-curves.png)"


def _line(method: str, rows: list[Row], control: list[Row]) -> str:
    good = [row for row in rows if row.summary.get("final_accuracy") is not None]
    d_c = 0 if rows[0].cell.run.get("algorithm") == "frozen" else rows[0].summary["trained"]
    if not good:
        return f"| {method} | {d_c:,} | failed: {' '.join(rows[0].summary.get('error', []))} | | | | | | | |"
    cells = (
        method,
        f"{d_c:,}",
        spread(100 * row.summary["final_accuracy"] for row in good),
        spread(100 * row.summary["best_accuracy"] for row in good),
        "" if rows == control else spread(_gains(good, control, "final_accuracy", 100), sign="+"),
        spread((row.summary["final_eval_loss"] for row in good), 3),
        "" if rows == control else spread(_gains(good, control, "final_eval_loss"), 3, sign="+"),
        spread((row.train_loss for row in good if row.train_loss is not None), 3),
        f"{statistics.fmean(row.summary['wire_bytes'] for row in good) / 1e6:.0f}",
        "" if rows[0].round_seconds is None else f"{rows[0].round_seconds:.2f}",
    )
    return "| " + " | ".join(cells) + " |"


def _gains(rows: list[Row], control: list[Row], figure: str, scale: float = 1) -> Iterator[float]:
    frozen = {row.cell.seed: row.summary.get(figure) for row in control}
    for row in rows:
        other = frozen.get(row.cell.seed)
        if other is not None:
            yield scale * (row.summary[figure] - other)


def spread(values: Iterable[float], digits: int = 1, sign: str = "") -> str:
    """`83.2 ± 0.4 (3)`."""
    known = list(values)
    if not known:
        return ""
    mean = f"{statistics.fmean(known):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f} ({len(known)})" if len(known) > 1 else f"{mean} (1)"
