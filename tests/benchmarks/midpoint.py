"""What the midpoint anchor changes: the tail's gradient and the projections there, against those at the clean weights.

    python tests/benchmarks/midpoint.py [--bundle DIR] [--config run.toml] [--data train.jsonl] [--batches N] [--json]

Without options it takes what `make demo` left behind. For several probe steps ε, on real batches of a real bundle: how
far the midpoint's activations and the tail's gradient are from the clean ones, and how far HO-SFL's forward and central
differences are from each other. The spread of the clean gradient over batches stands beside it: a step's own noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from hosl_cloud.settings import RunConfig, load_config
from hosl_cloud.simulation.virtual_devices import open_data
from hosl_cloud.tail.trainer import TailTrainer
from hosl_edge.data.datasets import TextBatch
from hosl_edge.model.shard import Shard
from hosl_protocol.run.manifest import Manifest, load_manifest
from hosl_protocol.weights.client_weights import ClientWeights, ProbePoint, make_client_weights

REVIEWS = Path(__file__).parents[2] / "examples" / "reviews"
STEPS = (1e-4, 1e-3, 1e-2)


class Halves:
    """Both halves in one process."""

    def __init__(self, bundle: Path, manifest: Manifest, config: RunConfig) -> None:
        self.shard = Shard(bundle, manifest, threads=torch.get_num_threads())
        self.shard.open()
        self.shard.rows, self.shard.max_length = 4, config.max_length
        self.trainer = TailTrainer(bundle, manifest, config)
        self.manifest, self.config = manifest, config

    def client(self, step: float) -> ClientWeights:
        settings = msgspec.structs.replace(self.config.wire_settings(), probe_step=step)
        return make_client_weights(self.manifest, self.shard.weights, settings)

    def activations(self, client: ClientWeights, batch: TextBatch, sign: int) -> np.ndarray:
        client.probe(ProbePoint(1, 0, sign) if sign else None)
        return self.shard.activations(batch, np.empty((batch.tokens, self.manifest.width), np.float32))

    def gradient(self, activations: np.ndarray, batch: TextBatch) -> tuple[np.ndarray, np.ndarray]:
        """λ, and the tail's gradient as one vector."""
        result = self.trainer.forward_backward(activations, batch.lengths_B, batch.labels_N)
        parts = [value.grad.flatten() for value in self.trainer.parameters.values() if value.grad is not None]
        gradient = torch.cat(parts).numpy().copy()
        self.trainer.discard()
        assert result.cut_gradient_TD is not None
        return result.cut_gradient_TD, gradient


def compare(halves: Halves, batches: list[TextBatch], step: float) -> dict[str, float]:
    """Medians over the batches."""
    client = halves.client(step)
    rows = []
    for batch in batches:
        plus, minus, clean = (halves.activations(client, batch, sign) for sign in (+1, -1, 0))
        middle = (plus + minus) / 2
        (lambda_clean, gradient), (lambda_middle, moved) = (halves.gradient(h, batch) for h in (clean, middle))
        forward, central = np.vdot(lambda_clean, plus - clean), np.vdot(lambda_middle, plus - minus) / 2
        rows.append(
            {
                "activations": distance(middle, clean),
                "probe": distance(plus, clean),
                "gradient": distance(moved, gradient),
                "projection": abs(float(forward - central)) / abs(float(central)),
            }
        )
    return {"step": step, **{name: statistics.median(row[name] for row in rows) for name in rows[0]}}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def spread(halves: Halves, batches: list[TextBatch]) -> float:
    """Median distance of a batch's gradient from the mean of all."""
    client = halves.client(STEPS[0])
    gradients = [halves.gradient(halves.activations(client, batch, 0), batch)[1] for batch in batches]
    mean = np.mean(gradients, axis=0)
    return statistics.median(distance(gradient, mean) for gradient in gradients)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=REVIEWS / "work" / "bundle")
    parser.add_argument("--config", type=Path, default=REVIEWS / "hosl.toml")
    parser.add_argument("--data", type=Path, default=REVIEWS / "work" / "data" / "device-1-train.jsonl")
    parser.add_argument("--batches", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.bundle.exists():
        print(f"{options.bundle} is not there: run `make demo` first, or give --bundle, --config and --data")
        return
    manifest = load_manifest(options.bundle)
    config = load_config(options.config, manifest)
    data = open_data(options.bundle, manifest, config.wire_settings(), options.data)
    size = config.batch_size
    batches = [data.batch(np.arange(n * size, (n + 1) * size)) for n in range(options.batches)]
    halves = Halves(options.bundle, manifest, config)
    rows: list[dict[str, Any]] = [compare(halves, batches, step) for step in STEPS]
    report = {"batches": options.batches, "batch_size": size, "gradient_spread": spread(halves, batches), "rows": rows}
    print(json.dumps(report) if options.json else describe(report))


def describe(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [
        f"{report['batches']} batches of {report['batch_size']}; relative distances, medians",
        f"{'ε':>8} {'probe':>10} {'midpoint':>10} {'tail gradient':>14} {'projection':>11}",
    ]
    for row in report["rows"]:
        lines.append(
            f"{row['step']:8.0e} {row['probe']:10.1e} {row['activations']:10.1e} {row['gradient']:14.1e} "
            f"{row['projection']:11.1e}"
        )
    lines.append(f"a batch's tail gradient is {report['gradient_spread']:.2f} away from the mean of all")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
