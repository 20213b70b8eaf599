"""Forward of a ResNet's client half by what trains, against an ordinary export with constant weights.

    python tests/benchmarks/resnet_forward.py [--repeats N] [--threads N] [--json]

Random weights. What trains is a graph input, all else a constant of the graph: `all` and `blocks` make convolutions
inputs, `norm` only the norms between them, `none` nothing. The ordinary export is torch's own with optimize=True, its
weights inside. All run in turn, batch by batch, in one process; a ratio is the median of those of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime as ort
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from hosl_export.bundle.graph import OPSET, write_graph
from hosl_export.model.halves import ClientHalf, client_half
from hosl_export.model.trainable import put_on_lattice
from hosl_protocol.run.manifest import ImageEntry, TrainMode

GEOMETRIES: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "ResNet-18": ({"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}, 224, (1, 4)),
    "ResNet-20": ({"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [3, 3, 3]}, 32, (1, 16, 64)),
}
"""What the config says, the images' size, and the batches."""

SPLIT = 2
TRAINS = tuple(mode for mode in get_args(TrainMode) if mode != "lora")[::-1]
WAYS = (*TRAINS, "constants")

Run = Callable[[np.ndarray], float]


def make_half(config: dict[str, Any], size: int) -> ClientHalf:
    """The client half of a random model whose batch-norms do something."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(**config, layer_type="basic")).eval()
    for name, tensor in model.state_dict().items():
        if "normalization" in name and tensor.ndim == 1:
            tensor.add_(0.1 * torch.rand_like(tensor))
    image = ImageEntry(channels=3, height=size, width=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    return client_half(model, SPLIT, image)


def export_constants(half: ClientHalf, size: int, path: Path) -> None:
    """An ordinary optimized export, its weights inside."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            half,
            (),
            kwargs={"pixel_values": torch.ones(2, 3, size, size)},
            dynamo=True,
            optimize=True,
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=["activations"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim.DYNAMIC}},
            verbose=False,
        )
        program.save(path)


def make_run(path: Path, weights: dict[str, np.ndarray], threads: int, outputs: dict[str, np.ndarray]) -> Run:
    """A session as the device opens it, weights bound once; a call binds a batch, runs, and gives its seconds."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in weights.items():
        binding.bind_cpu_input(name, array)

    def run(pixels: np.ndarray) -> float:
        binding.bind_cpu_input("pixel_values", pixels)
        binding.bind_output("activations")
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        seconds = time.perf_counter() - start
        outputs["last"] = binding.copy_outputs_to_cpu()[0]
        return seconds

    return run


def make_runs(
    config: dict[str, Any], size: int, folder: Path, threads: int
) -> dict[str, tuple[Run, dict[str, np.ndarray]]]:
    """The ways to run one geometry, each with the place of its last output."""
    runs = {}
    for way in WAYS:
        half, path = make_half(config, size), folder / f"{size}-{way}.onnx"
        weights: dict[str, np.ndarray] = {}
        if way == "constants":
            export_constants(half, size, path)
        else:
            entries, _ = put_on_lattice(half, way)
            write_graph(half, path, {entry.name for entry in entries if entry.constant})
            state = {name: tensor.numpy() for name, tensor in half.model.state_dict().items()}
            weights = {entry.name: state[entry.name] for entry in entries if not entry.constant}
        outputs: dict[str, np.ndarray] = {}
        runs[way] = make_run(path, weights, threads, outputs), outputs
    return runs


def measure(
    runs: dict[str, tuple[Run, dict[str, np.ndarray]]], name: str, size: int, batch: int, repeats: int
) -> dict[str, Any]:
    """Median milliseconds of each way, run in turn, after one round that is not counted but compared."""
    pixels = np.random.default_rng(0).standard_normal((batch, 3, size, size), np.float32)
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for turn in range(repeats + 1):
        for way, (run, outputs) in runs.items():
            taken = run(pixels)
            if turn:
                seconds[way].append(taken)
            else:
                np.testing.assert_allclose(outputs["last"], runs["all"][1]["last"], atol=1e-3)
    return {
        "model": name,
        "size": size,
        "batch": batch,
        "ms": {way: 1e3 * statistics.median(values) for way, values in seconds.items()},
        "ratio": {way: median_ratio(values, seconds["constants"]) for way, values in seconds.items()},
    }


def median_ratio(mine: list[float], theirs: list[float]) -> float:
    """The median of the ratios of neighbouring runs: what slows the machine slows both."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, size, batches) in GEOMETRIES.items():
            runs = make_runs(config, size, Path(folder), options.threads)
            rows += [measure(runs, name, size, batch, options.repeats) for batch in batches]
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime")},
        "work": f"client half of {SPLIT} stages, {options.threads} threads, median of {options.repeats}",
        "rows": rows,
    }
    print(json.dumps(report) if options.json else describe(report))


def describe(report: dict[str, Any]) -> str:
    """The report as a table: milliseconds, and how many times those of the ordinary export."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [f"{report['machine']}; {versions}", report["work"]]
    lines.append(f"{'':>22} " + " ".join(f"{way:>16}" for way in WAYS))
    for row in report["rows"]:
        what = f"{row['model']} {row['batch']} x {row['size']}²"
        cells = [f"{row['ms'][way]:7.2f} ms x {row['ratio'][way]:4.2f}" for way in WAYS]
        lines.append(f"{what:>22} " + " ".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
