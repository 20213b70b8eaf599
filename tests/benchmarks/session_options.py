"""The device's forward under other session options of ONNX Runtime: time, memory and page faults.

    python tests/benchmarks/session_options.py [--works ...] [--variants ...] [--repeats N] [--batches N] [--json]

Client halves with random weights, `--train blocks`. Each variant has a process of its own and changes the device's
options in what its name says; the processes are asked in turn, for one forward of a batch each, then for one HO-SFL
step each. Times and faults are medians, ratios are medians over what was measured in the same turn. "mixed" are batches
of texts of 4 to 128 tokens, another batch at each turn and the same for all: "crept" tells how far anonymous memory
grew over the last three quarters of them. "bits" says whether all activations are those of the first variant.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import edge_step
from edge_step import Case, EdgeClient, Stopwatch, Worker

MB = 10**6
EXAMPLES = 512
SMALL = "MiniLM size"
edge_step.GEOMETRIES[SMALL] = {"hidden_size": 384, "word_embed_proj_dim": 384, "ffn_dim": 1536}


@dataclass(frozen=True)
class Work:
    """What runs."""

    case: Case
    is_mixed: bool = False


WORKS = {
    "OPT-125M 16x128": Work(Case("OPT-125M", 6, "blocks", 16, 128)),
    "OPT-125M mixed": Work(Case("OPT-125M", 6, "blocks", 16, 128), is_mixed=True),
    "MiniLM 16x128": Work(Case(SMALL, 3, "blocks", 16, 128)),
    "MiniLM mixed": Work(Case(SMALL, 3, "blocks", 16, 128), is_mixed=True),
}


@dataclass(frozen=True)
class Variant:
    """Options of a session; the defaults are the device's."""

    tokens: int = 256
    """Of a micro-batch."""
    threads: int | None = None
    """None is all CPUs."""
    has_arena: bool = True
    """Whether the session keeps what it took."""
    takes_as_asked: bool = False
    """Whether the arena grows by what it is asked for, in place of powers of two."""
    reuses: bool = False
    """Whether values are planned into each other's buffers."""
    plans: bool = False
    """Memory pattern: one buffer for all values of shapes that came before."""
    spins: bool = False


VARIANTS = {
    "device": Variant(),
    "no arena, reuse": Variant(has_arena=False, reuses=True),
    "no arena": Variant(has_arena=False),
    "reuse": Variant(reuses=True),
    "as asked": Variant(takes_as_asked=True),
    "pattern": Variant(plans=True),
    "spinning": Variant(spins=True),
    "1 thread": Variant(threads=1),
    "512 tokens": Variant(tokens=512),
    "512, no arena, reuse": Variant(tokens=512, has_arena=False, reuses=True),
}


# The parent: files, processes, rows.


def measure(work: str, variants: list[str], repeats: int, batches: int, folder: Path) -> list[dict[str, Any]]:
    """The rows of one work; `folder` is empty."""
    case, is_mixed = WORKS[work].case, WORKS[work].is_mixed
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    Worker("export", folder, __file__).close()
    make_data(folder, case, is_mixed)
    workers: dict[str, Worker] = {}
    forwards: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    steps: dict[str, list[float]] = {name: [] for name in variants}
    try:
        for name in variants:
            workers[name] = Worker(name, folder, __file__)
        for _ in range(batches if is_mixed else repeats + 1):
            for name, worker in workers.items():
                forwards[name].append(worker.ask("forward"))
        for _ in range(0 if is_mixed else repeats + 1):
            for name, worker in workers.items():
                steps[name].append(worker.ask("step"))
        ends = {name: worker.ask("end") for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    return [
        {"work": work, "variant": name, **asdict(VARIANTS[name]), **make_row(name, forwards, steps), **ends[name]}
        for name in variants
    ]


def make_row(name: str, forwards: dict[str, list[dict[str, Any]]], steps: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of a variant and its ratios to the first one; the first turn warms up."""
    base = next(iter(forwards))
    own, other = forwards[name][1:], forwards[base][1:]
    pairs = list(zip(own, other, strict=True))
    own_steps, other_steps = steps[name][1:], steps[base][1:]
    return {
        "forward_s": statistics.median(turn["seconds"] for turn in own),
        "forward_cpu_s": statistics.median(turn["cpu_seconds"] for turn in own),
        "forward_ratio": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
        "step_s": statistics.median(own_steps) if own_steps else None,
        "step_ratio": statistics.median(a / b for a, b in zip(own_steps, other_steps, strict=True))
        if own_steps
        else None,
        "faults": statistics.median(turn["faults"] for turn in own),
        "crept_bytes": own[-1]["anonymous_bytes"] - own[len(own) // 4]["anonymous_bytes"],
        "is_same_bits": [turn["digest"] for turn in own] == [turn["digest"] for turn in other],
    }


def make_data(folder: Path, case: Case, is_mixed: bool) -> None:
    """Texts of all lengths, short ones more often, or as edge_step makes them."""
    if not is_mixed:
        edge_step.make_data(folder, case)
        return
    import numpy as np

    generator = np.random.default_rng(0)
    lengths = generator.lognormal(3.7, 0.7, EXAMPLES).clip(4, case.length).astype(int)
    texts = [" ".join(f"w{token}" for token in generator.integers(4, edge_step.VOCABULARY, n)) for n in lengths]
    lines = [json.dumps({"text": text, "label": n % 2}) + "\n" for n, text in enumerate(texts)]
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")


# What the workers do.


def work(name: str, folder: Path) -> None:
    """Answer the parent's lines until it ends; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    task = WORKS[json.loads((folder / "work.json").read_text(encoding="utf-8"))]
    if name == "export":
        edge_step.export(task.case, folder)
        print("null", file=answers)
        return
    set_options(VARIANTS[name])
    client = Client(VARIANTS[name], task, folder / name.replace(" ", "-"))
    print("null", file=answers)
    for line in sys.stdin:
        print(json.dumps(client.answer(line.strip())), file=answers)


def set_options(variant: Variant) -> None:
    """Let the device's session open with these options instead of its own."""
    import onnxruntime as ort

    ort.set_default_logger_severity(3)  # of options that are set twice
    make_session = ort.InferenceSession

    def make(graph: bytes, options: Any, providers: list[str]) -> Any:
        if variant.threads is not None:
            options.intra_op_num_threads = variant.threads
        options.enable_cpu_mem_arena = variant.has_arena
        options.enable_mem_reuse = variant.reuses
        options.enable_mem_pattern = variant.plans
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(variant.spins)))
        options.add_session_config_entry("session.use_env_allocators", str(int(variant.takes_as_asked)))
        return make_session(graph, options, providers)

    if variant.takes_as_asked:
        memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
    ort.InferenceSession = make


class Client(EdgeClient):
    """The device under a variant's options."""

    def __init__(self, variant: Variant, task: Work, folder: Path) -> None:
        folder.mkdir()
        for path in folder.parent.iterdir():
            if path.name in ("data.jsonl", "shard", "manifest.json"):
                (folder / path.name).symlink_to(path)
        super().__init__("ho-sfl", task.case, folder)
        self._device.shard.rows = variant.tokens // task.case.length
        self._is_mixed = task.is_mixed
        self._turn = 0

    def answer(self, question: str) -> Any:
        """Seconds of a step, the figures of a forward, or the bytes at the end."""
        from hosl_edge.model.memory import read_memory

        if question == "step":
            watch = Stopwatch()
            self.step(watch)
            return watch.seconds
        if question == "forward":
            return self._measure_forward()
        memory = read_memory()
        return {"peak_bytes": memory.peak, "anonymous_bytes": memory.anonymous}

    def _measure_forward(self) -> dict[str, Any]:
        import numpy as np

        from hosl_edge.model.memory import read_memory

        self._turn += 1
        if self._is_mixed:
            assert self._device.train is not None
            generator = np.random.default_rng(self._turn)
            self._batch = self._device.train.batch(generator.choice(EXAMPLES, 16, replace=False))
        watch, digest = Stopwatch(), hashlib.sha256()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        parts = self._device.shard.forward(self._batch)
        while True:
            with watch:
                part = next(parts, None)
            if part is None:
                break
            digest.update(part[1].tobytes())
        return {
            "seconds": watch.seconds,
            "cpu_seconds": watch.cpu_seconds,
            "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
            "anonymous_bytes": read_memory().anonymous,
            "digest": digest.hexdigest(),
        }


# The command.


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=tuple(WORKS), default=list(WORKS))
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=5, help="turns of full batches; default: %(default)s")
    parser.add_argument("--batches", type=int, default=60, help="turns of mixed batches; default: %(default)s")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the rows as a list")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.folder)
        return
    if not options.json:
        print(describe_machine())
    show: Callable[[str], None] = (lambda text: None) if options.json else (lambda text: print(text, flush=True))
    rows = []
    for name in options.works:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = measure(name, options.variants, options.repeats, options.batches, Path(folder))
        show(describe(found))
        rows += found
    if options.json:
        print(json.dumps(rows))


def describe_machine() -> str:
    """Machine and versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("hosl", "onnxruntime", "numpy"))
    return f"{platform.machine()}, {os.cpu_count()} cores; {versions}; split 6, MiniLM's 3, --train blocks"


def describe(rows: list[dict[str, Any]]) -> str:
    """The rows of a work as a table."""
    lines = [
        f"\n{rows[0]['work']}; load {os.getloadavg()[0]:.1f} at the end",
        f"{'options':<22}{'forward':>10}{'ratio':>7}{'cpu':>9}{'step':>9}{'ratio':>7}{'peak':>8}{'anonymous':>11}"
        f"{'crept':>8}{'faults':>9}  bits",
    ]
    for row in rows:
        step = f"{row['step_s']:>7.3f} s{row['step_ratio']:>7.3f}" if row["step_s"] else f"{'-':>9}{'-':>7}"
        lines.append(
            f"{row['variant']:<22}{row['forward_s']:>8.3f} s{row['forward_ratio']:>7.3f}{row['forward_cpu_s']:>7.3f} s"
            f"{step}{row['peak_bytes'] / MB:>5.0f} MB{row['anonymous_bytes'] / MB:>8.1f} MB"
            f"{row['crept_bytes'] / MB:>5.1f} MB{row['faults']:>9.0f}  {'same' if row['is_same_bits'] else 'other'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
