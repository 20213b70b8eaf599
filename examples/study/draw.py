"""A study's pictures: every run's accuracy, and the course of the training loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

if TYPE_CHECKING:
    from report import Row

MEGABYTES = "MB on the wire"
LEAST_SPAN = 5.0
"""Points of accuracy that a panel shows at least, so that a tenth of one does not look like much."""


def draw_accuracy(title: str, rows: Sequence[Row], path: Path) -> None:
    """One panel a task and split: a dot a run, a bar at the methods' means, a line at the frozen client's."""
    places = list(dict.fromkeys(row.place for row in rows))
    styles = _styles(rows)
    columns = min(2, len(places))
    lines = -(-len(places) // columns)
    counts = [len({row.cell.method for row in rows if row.place == place}) for place in places]
    heights = [0.3 * max(counts[columns * line : columns * (line + 1)]) + 1.1 for line in range(lines)]
    size = (6.6 * columns, sum(heights) + 0.5)
    ratios = {"height_ratios": heights}
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", gridspec_kw=ratios)
    for place, axis in zip(places, axes.flat, strict=False):
        methods = [method for method in styles if _scores(rows, place, method)]
        for height, method in enumerate(reversed(methods)):
            scores, color = _scores(rows, place, method), styles[method]["color"]
            mean = float(np.mean(scores))
            axis.plot(scores, [height] * len(scores), "o", color=color, alpha=0.6, markersize=5)
            axis.plot([mean, mean], [height - 0.35, height + 0.35], color=color, linewidth=2.5)
            if method.startswith("frozen"):
                axis.axvline(mean, color=color, linestyle=":", linewidth=1)
        first, last = axis.get_xlim()
        margin = max(0.0, LEAST_SPAN - (last - first)) / 2
        axis.set_xlim(first - margin, last + margin)
        axis.set_title(_name(place), fontsize=10)
        axis.set_yticks(range(len(methods)), reversed(methods), fontsize=8)
        axis.grid(axis="x", alpha=0.3)
        axis.set_xlabel("accuracy at the end, %", fontsize=8)
    for axis in list(axes.flat)[len(places) :]:
        axis.set_visible(False)
    figure.suptitle(f"{title}\na dot a seed, a bar at the mean, dotted: the frozen client", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _scores(rows: Sequence[Row], place: Any, method: str) -> list[float]:
    return [
        100 * row.summary["final_accuracy"]
        for row in rows
        if row.place == place and row.cell.method == method and row.summary.get("final_accuracy") is not None
    ]


def draw_curves(title: str, rows: Sequence[Row], seconds: str, path: Path) -> None:
    """One line of panels a task and split: training loss against rounds, megabytes and, where timed, `seconds`."""
    places = list(dict.fromkeys(row.place for row in rows))
    styles = _styles(rows)
    names = ("round", MEGABYTES, *((seconds,) if any(row.round_seconds is not None for row in rows) else ()))
    size = (4.6 * len(names), 2.9 * len(places) + 1.2)
    figure, axes = plt.subplots(len(places), len(names), figsize=size, squeeze=False, layout="constrained")
    legend: dict[str, Any] = {}
    for place, line in zip(places, axes, strict=True):
        for method, style in styles.items():
            group = [row for row in rows if row.place == place and row.cell.method == method and row.table]
            if group:
                legend[method] = _draw_method(line, group, style)
        for axis, name in zip(line, names, strict=True):
            axis.set_xlabel(name, fontsize=8)
            if name == MEGABYTES:
                axis.set_xscale("log")
                axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.xaxis.set_minor_formatter(NullFormatter())
            else:
                axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
        line[0].set_ylabel("training loss", fontsize=8)
        line[0].set_title(_name(place), fontsize=10, loc="left")
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=3, fontsize=9)
    what = "training loss, mean over seeds of a running mean over a tenth of the rounds"
    figure.suptitle(f"{title}\n{what}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_method(line: Sequence[Any], group: list[Row], style: dict[str, Any]) -> Any:
    """The line of the first panel."""
    curves = [[point for point in row.table if "loss" in point] for row in group]
    length = min(len(curve) for curve in curves)
    width = max(1, length // 10)
    losses = np.mean([_smooth([point["loss"] for point in curve[:length]], width) for curve in curves], axis=0)
    rounds = np.arange(width, length + 1)
    megabytes = np.mean(
        [[point["wire_bytes"] / 1e6 for point in curve[width - 1 : length]] for curve in curves], axis=0
    )
    places = [rounds, megabytes]
    if group[0].round_seconds is not None:
        places.append(rounds * group[0].round_seconds)
    drawn = [axis.plot(where, losses, **style)[0] for axis, where in zip(line, places, strict=False)]
    return drawn[0]


def _smooth(values: list[float], width: int) -> np.ndarray:
    return np.convolve(values, np.full(width, 1.0 / width), mode="valid")


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By method, all of them in order: frozen clients are grey, first-order ones black, torch's brown, the rest have
    colours. A second one of a kind is dashed, a third dotted."""
    palette = iter(
        (*plt.get_cmap("tab10").colors[:7], *plt.get_cmap("tab10").colors[8:], *plt.get_cmap("Dark2").colors)
    )
    fixed = {"frozen": "0.55", "first-order": "0.0", "torch": "saddlebrown"}
    seen: Counter[str] = Counter()
    styles = {}
    for method in dict.fromkeys(row.cell.method for row in sorted(rows, key=lambda row: row.order)):
        start = next((start for start in fixed if method.startswith(start)), "")
        color = fixed[start] if start else next(palette)
        styles[method] = {"color": color, "linestyle": ("-", "--", ":")[seen[start] % 3], "linewidth": 1.3}
        seen[start] += bool(start)
    return styles


def _name(place: tuple[str, int, str]) -> str:
    task, split, partition = place
    return f"{task}, split {split}" + (f", {partition}" if partition != "iid" else "")
