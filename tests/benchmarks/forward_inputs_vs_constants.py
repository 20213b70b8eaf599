"""Forward of a client half with weights as graph inputs, as a bundle has it, against constant weights.

    python tests/benchmarks/forward_inputs_vs_constants.py [--repeats N] [--threads N] [--json]

OPT-125M geometry, random weights, split 6. All run in turn, shape by shape, in one process. The ordinary export is
torch's own with optimize=True, where ONNX Runtime may fold weights and keeps a packed copy of each for its matrix
products; it runs once more without the packed copies (session.disable_prepacking), which changing weights can't have
and which cost the memory of the weights again, and once traced with torch's default attention, sdpa.
Target: within 5 % from 512 tokens a micro-batch on.
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
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from transformers import OPTConfig, OPTForCausalLM

from hosl_export.bundle.graph import OPSET, write_graph
from hosl_export.model.halves import ClientHalf, client_half
from hosl_export.model.trainable import plain_parameters

SHAPES = ((1, 16), (1, 64), (1, 128), (1, 512), (8, 64), (4, 128), (8, 128), (2, 512), (16, 128))
VOCABULARY = 50272
TARGET, TARGET_TOKENS = 1.05, 512

Run = Callable[[np.ndarray], float]


def open_session(path: Path, threads: int, is_packed: bool = True) -> ort.InferenceSession:
    """A session without an arena (the device has one) and without spinning."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_prepacking", str(int(not is_packed)))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def make_run(session: ort.InferenceSession, weights: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> Run:
    """Bind the weights once; a call binds a batch, runs, and gives its seconds."""
    binding = session.io_binding()
    for name, array in weights.items():
        binding.bind_cpu_input(name, array)

    def run(ids: np.ndarray) -> float:
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_output("activations")
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        seconds = time.perf_counter() - start
        outputs["last"] = binding.copy_outputs_to_cpu()[0]
        return seconds

    return run


def export_constants(half: ClientHalf, path: Path) -> None:
    """An ordinary optimized export, its weights inside."""
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            half,
            (),
            kwargs={"input_ids": torch.ones(2, 8, dtype=torch.long)},
            dynamo=True,
            optimize=True,
            opset_version=OPSET,
            input_names=["input_ids"],
            output_names=["activations"],
            dynamic_shapes={"input_ids": axes},
            verbose=False,
        )
        program.save(path)


def make_runs(folder: Path, threads: int) -> dict[str, tuple[Run, dict[str, np.ndarray]]]:
    """The ways to run the same half, each with the place of its last output."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig()).eval()
    half = client_half(model, 6)
    write_graph(half, folder / "inputs.onnx")
    export_constants(half, folder / "constants.onnx")
    export_constants(client_half(model, 6), folder / "sdpa.onnx")
    weights = {name: tensor.detach().numpy() for name, tensor in plain_parameters(half).items()}
    runs = {}
    for name, graph in (("inputs", "inputs"), ("constants", "constants"), ("unpacked", "constants"), ("sdpa", "sdpa")):
        outputs: dict[str, np.ndarray] = {}
        session = open_session(folder / f"{graph}.onnx", threads, is_packed=name != "unpacked")
        runs[name] = make_run(session, weights if name == "inputs" else {}, outputs), outputs
    return runs


def measure_shape(
    runs: dict[str, tuple[Run, dict[str, np.ndarray]]], shape: tuple[int, int], repeats: int
) -> dict[str, Any]:
    """Median milliseconds of each way, run in turn, after one round that is not counted but compared."""
    ids = np.random.default_rng(0).integers(4, VOCABULARY, shape)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, (run, outputs) in runs.items():
            taken = run(ids)
            if turn:
                seconds[name].append(taken)
            else:
                np.testing.assert_allclose(outputs["last"], runs["inputs"][1]["last"], atol=1e-3)
    medians = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {
        "batch": shape[0],
        "length": shape[1],
        **medians,
        "ratio": median_ratio(seconds["inputs"], seconds["constants"]),
        "ratio_to_unpacked": median_ratio(seconds["inputs"], seconds["unpacked"]),
    }


def median_ratio(mine: list[float], theirs: list[float]) -> float:
    """The median of the ratios of neighbouring runs: what slows the machine slows both."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = make_runs(Path(folder), options.threads)
        rows = [measure_shape(runs, shape, options.repeats) for shape in SHAPES]
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime")},
        "work": f"OPT-125M geometry, split 6, {options.threads} threads, median of {options.repeats}",
        "rows": rows,
    }
    print(json.dumps(report) if options.json else describe(report))


def describe(report: dict[str, Any]) -> str:
    """The report as a table."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [f"{report['machine']}; {versions}", report["work"]]
    names = f"{'inputs':>10} {'constants':>10} {'unpacked':>10} {'(sdpa)':>10}"
    lines += [f"{'batch x length':>14} {names} {'ratio':>7} {'to unpacked':>12}"]
    for row in report["rows"]:
        is_far = row["ratio"] > TARGET and row["batch"] * row["length"] >= TARGET_TOKENS
        shape = f"{row['batch']} x {row['length']}"
        times = " ".join(f"{row[f'{name}_ms']:7.1f} ms" for name in ("inputs", "constants", "unpacked", "sdpa"))
        ratios = f"{row['ratio']:7.2f} {row['ratio_to_unpacked']:12.2f}"
        lines.append(f"{shape:>14} {times} {ratios}{'  above target' if is_far else ''}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
