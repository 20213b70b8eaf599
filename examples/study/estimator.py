"""How much of the device's gradient an estimate holds: P projections against the gradient that torch computes.

python examples/study/estimator.py examples/study/settings/smollm2.toml --data DIR [--directions 32]

One batch of the training data at the weights where training begins, for each task, split and set of trained weights of
a settings file. An estimate from P directions has the cosine sqrt(P / (d_c + P - 1)) with the gradient if nothing but
the dimension stands in its way; what is missing to it is the finite step μ, and float32.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan import Cell, merge, read_study
from sources import export_bundle, prepare_data

from hosl_cloud.settings import parse_config
from hosl_cloud.simulation.virtual_devices import load_first_order, open_data
from hosl_cloud.tail.trainer import TailTrainer
from hosl_edge.model.shard import Shard
from hosl_export.model.lora import plain_name
from hosl_protocol.arithmetic.directions import direction
from hosl_protocol.run.manifest import load_manifest
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.weights.client_weights import ClientWeights, ProbePoint, make_client_weights

HERE = Path(__file__).parent
GROUPS = (1, 2, 8, 32, 128)
TENSORS = ("task", "split", "trains", "tensor", "numbers", "mean_square")
COLUMNS = (
    "task",
    "split",
    "trains",
    "trained",
    "gradient_norm",
    "rms",
    "step",
    "correlation",
    "directions",
    "cosine",
    "limit",
)


@dataclass(frozen=True)
class Site:
    """One batch, the device's half that probes, and the gradient that the probes estimate."""

    shard: Shard
    weights: ClientWeights
    batch: Any
    settings: RunSettings
    lambda_TD: np.ndarray
    gradient: np.ndarray
    """∂loss/∂θ_c [d_c], tensor after tensor in the order of directions."""

    def direction(self, number: int) -> np.ndarray:
        """u_p [d_c]."""
        parts = self.shard.manifest.trainable
        return np.concatenate(
            [
                direction(self.settings.seed, 1, number, place, int(np.prod(part.shape)))
                for place, part in enumerate(parts)
            ]
        )

    def by_tensor(self) -> Iterator[dict[str, Any]]:
        """Mean squared gradient of a number of each tensor."""
        parts = self.shard.manifest.trainable
        ends = np.cumsum([int(np.prod(part.shape)) for part in parts])
        for part, values in zip(parts, np.split(self.gradient, ends[:-1]), strict=True):
            yield {"tensor": part.name, "numbers": values.size, "mean_square": float(np.mean(values**2))}

    def slope(self, number: int) -> float:
        """⟨λ, f(θ + μu_p) − f(θ − μu_p)⟩ / 2μ, as a device with the midpoint anchor measures it."""
        values = []
        for sign in (+1, -1):
            self.weights.probe(ProbePoint(1, number, sign))
            set_TD = self.shard.activations(self.batch, np.empty_like(self.lambda_TD))
            values.append(float(np.vdot(self.lambda_TD, set_TD)))
        self.weights.probe(None)
        return (values[0] - values[1]) / (2.0 * self.settings.probe_step)


def open_site(bundle: Path, data: Path, run: dict[str, Any], place: int = 0) -> Site:
    """Load both halves, and compute the gradient of the data's batch at `place`."""
    manifest, threads = load_manifest(bundle), torch.get_num_threads()
    config = parse_config(run, manifest)
    settings = config.wire_settings()
    shard = Shard(bundle, manifest, threads)
    weights = make_client_weights(manifest, shard.weights, settings, threads)
    shard.open()
    shard.max_length, shard.rows = settings.max_length, settings.batch_size
    dataset = open_data(bundle, manifest, settings, data)
    batch = dataset.batch(settings.batch_size * place + np.arange(settings.batch_size))
    clean_TD = shard.activations(batch, np.empty((batch.tokens, manifest.width), np.float32))
    result = TailTrainer(bundle, manifest, config).forward_backward(clean_TD, batch.lengths_B, batch.labels_N)
    assert result.cut_gradient_TD is not None
    client = load_first_order(bundle, config, shard)
    client.backward(batch, result.cut_gradient_TD)
    found = {plain_name(name): value.grad for name, value in client.half.model.named_parameters()}
    parts = [found[entry.name] for entry in manifest.trainable]
    gradient = np.concatenate([part.numpy().reshape(-1) for part in parts if part is not None])
    return Site(shard, weights, batch, settings, result.cut_gradient_TD, gradient)


def measure(site: Site, count: int) -> Iterator[dict[str, float]]:
    """Correlation of `count` measured slopes with the true ones, and cosines of estimates from some."""
    d_c, norm = len(site.gradient), float(np.linalg.norm(site.gradient))
    facts = {"trained": d_c, "gradient_norm": norm, "rms": norm / d_c**0.5, "step": site.settings.probe_step}
    slopes = np.array([site.slope(number) for number in range(count)])
    true = np.array([float(site.gradient @ site.direction(number)) for number in range(count)])
    correlation = float(np.corrcoef(slopes, true)[0, 1])
    for size in (size for size in GROUPS if size <= count):
        cosines = [
            _cosine(site, slopes[first : first + size], true[first : first + size], first)
            for first in range(0, count - size + 1, size)
        ]
        limit = (size / (d_c + size - 1)) ** 0.5
        yield facts | {
            "correlation": correlation,
            "directions": size,
            "cosine": float(np.mean(cosines)),
            "limit": limit,
        }


def _cosine(site: Site, slopes: np.ndarray, true: np.ndarray, first: int) -> float:
    """Of Σ slope_p u_p with the gradient."""
    estimate = np.zeros_like(site.gradient)
    for number, slope in enumerate(slopes, first):
        estimate += np.float32(slope) * site.direction(number)
    return float(slopes @ true / (np.linalg.norm(estimate) * np.linalg.norm(site.gradient)))


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """What a script that measures gradients is told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="settings/*.toml")
    parser.add_argument("--data", type=Path, required=True, help="folder with the tasks' data")
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--batch", type=int, default=64, help="examples (default: %(default)s)")
    return parser


def main() -> None:
    """Measure every task, split and set of weights."""
    parser = make_parser(__doc__)
    parser.add_argument("--directions", type=int, default=32, help="probed in all (default: %(default)s)")
    parser.add_argument("--steps", type=float, nargs="+", default=[1e-3], help="μ (default: %(default)s)")
    parser.add_argument("--splits", type=int, nargs="+", help="of the settings (default: all)")
    parser.add_argument("--tasks", nargs="+", help="of the settings (default: all)")
    options = parser.parse_args()
    study = read_study(options.settings)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{options.settings.stem}-estimator.csv"
    trains = dict.fromkeys(method.train for method in study.methods.values() if method.train != "none")
    cells = itertools.product(options.tasks or study.tasks, options.splits or study.splits, trains)
    slopes, gradients = Table(path, COLUMNS), Table(path.with_name(f"{options.settings.stem}-gradient.csv"), TENSORS)
    for task, split, train in cells:
        bundle = export_bundle(study, split, train, options.data, options.work)
        run = merge(study.run, study.tasks[task].run, {"batch_size": options.batch})
        data, _ = prepare_data(study.tasks[task], Cell(task, split, "", "", 0, run), options.data, options.work)
        facts = {"task": task, "split": split, "trains": train}
        for step in options.steps:
            site = open_site(bundle, data, merge(run, {"probe_step": step}))
            if step == options.steps[0]:
                gradients.write(facts | row for row in site.by_tensor())
            slopes.write(facts | row for row in measure(site, options.directions))
            site.weights.close()
    print(f"the table is {path}")


class Table:
    """A CSV file that grows, and is shown as it does."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(columns)

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows; four digits are enough."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            for row in rows:
                short = {
                    key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()
                }
                csv.DictWriter(file, self.columns).writerow(short)
                print(" ".join(f"{key} {value}" for key, value in short.items()), flush=True)


if __name__ == "__main__":
    main()
