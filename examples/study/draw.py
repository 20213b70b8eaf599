"""A study's pictures: every run's accuracy, and the course of the training loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

if TYPE_CHECKING:
    from report import Row

AXES = ("round", "MB on the wire", "seconds, alone on the machine")


def draw_accuracy(title: str, rows: Sequence[Row], path: Path) -> None:
    """One panel a task and split: a dot a run, a bar at the methods' means, a line at the frozen client's."""
    places = list(dict.fromkeys(row.place for row in rows))
    methods = list(dict.fromkeys(row.cell.method for row in rows))
    colors = _colors(methods)
    columns = min(3, len(places))
    lines = -(-len(places) // columns)
    size = (4.6 * columns, (0.28 * len(methods) + 1.1) * lines + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for place, axis in zip(places, axes.flat, strict=False):
        for height, method in enumerate(reversed(methods)):
            scores = _scores(rows, place, method)
            if scores:
                mean = float(np.mean(scores))
                axis.plot(scores, [height] * len(scores), "o", color=colors[method], alpha=0.6, markersize=5)
                axis.plot([mean, mean], [height - 0.35, height + 0.35], color=colors[method], linewidth=2.5)
            if method.startswith("frozen") and scores:
                axis.axvline(mean, color=colors[method], linestyle=":", linewidth=1)
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


def draw_curves(title: str, rows: Sequence[Row], path: Path) -> None:
    """One line of panels a task and split: training loss against rounds, megabytes and seconds."""
    places = list(dict.fromkeys(row.place for row in rows))
    methods = list(dict.fromkeys(row.cell.method for row in rows))
    colors = _colors(methods)
    size = (13, 2.9 * len(places) + 1.2)
    figure, axes = plt.subplots(len(places), len(AXES), figsize=size, squeeze=False, layout="constrained")
    for place, line in zip(places, axes, strict=True):
        for method in methods:
            group = [row for row in rows if row.place == place and row.cell.method == method and row.table]
            if group:
                _draw_method(line, group, method, colors[method])
        for axis, name in zip(line, AXES, strict=True):
            axis.set_xlabel(name, fontsize=8)
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
        line[0].set_ylabel("training loss", fontsize=8)
        line[0].set_title(_name(place), fontsize=10, loc="left")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9)
    what = "training loss, mean over seeds of a running mean over a tenth of the rounds"
    figure.suptitle(f"{title}: {what}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_method(line: Sequence[Any], group: list[Row], name: str, color: Any) -> None:
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
    for axis, where in zip(line, places, strict=False):
        axis.plot(where, losses, color=color, label=name, linewidth=1.3)


def _smooth(values: list[float], width: int) -> np.ndarray:
    return np.convolve(values, np.full(width, 1.0 / width), mode="valid")


def _colors(methods: list[str]) -> dict[str, Any]:
    """The frozen client is grey, first-order black; the rest have colours."""
    palette = iter(plt.get_cmap("tab10").colors)
    fixed = {"frozen": "0.55", "first-order": "0.0"}
    return {
        method: next((shade for start, shade in fixed.items() if method.startswith(start)), None) or next(palette)
        for method in methods
    }


def _name(place: tuple[str, int, str]) -> str:
    task, split, partition = place
    return f"{task}, split {split}" + (f", {partition}" if partition != "iid" else "")
