"""Peak memory and speed of a tail of OPT geometry: in one process, and on several ranks.

    python tests/benchmarks/cloud/tail_ranks.py [--geometry G] [--blocks N] [--ranks 1,2] [--batch N] [--tokens N]
                                          [--devices N] [--rounds N] [--set KEY=VALUE] [--checkpoint] [--json]

The trainer is the service's own; devices are random activations. Peaks are VmHWM of each process, torch included, after
the rounds, and again after a checkpoint was written. Every case is a group of processes of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

GEOMETRIES: dict[str, dict[str, int]] = {
    "opt-125m": {"hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12, "word_embed_proj_dim": 768},
    "opt-1.3b": {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "word_embed_proj_dim": 2048},
}


def write_bundle(folder: Path, geometry: str, blocks: int, tokens: int) -> int:
    """All that the cloud reads of a bundle whose tail has so many blocks, at random; the tail's parameters."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    from hosl_export.model.halves import tail_half
    from hosl_export.tensor_files import stream_tensors
    from hosl_protocol.run.manifest import MANIFEST, TAIL_CONFIG, TAIL_WEIGHTS, Manifest, encode_manifest

    config = OPTConfig(num_hidden_layers=blocks + 1, architectures=["OPTForCausalLM"], **GEOMETRIES[geometry])
    with torch.device("meta"):
        tail = tail_half(OPTForCausalLM(config), 1)
    shapes = {name: each.shape for name, each in tail.model.state_dict().items() if not name.startswith("lm_head")}
    (folder / TAIL_CONFIG).parent.mkdir(parents=True)
    config.to_json_file(folder / TAIL_CONFIG)
    random = torch.Generator().manual_seed(0)
    values = (torch.randn(shape, generator=random) * 0.02 for shape in shapes.values())
    stream_tensors(folder / TAIL_WEIGHTS, shapes, values)
    manifest = Manifest(
        model=geometry,
        family="opt",
        architecture="OPTForCausalLM",
        split=1,
        blocks=blocks + 1,
        width=config.hidden_size,
        max_length=tokens,
        pad_token_id=1,
        train="none",
        tensors=(),
        files=(),
    )
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))
    return sum(shape.numel() for shape in shapes.values())


TASK = {"name": "classes", "kind": "sequence-classification", "template": "{text}", "labels": ["0", "1"]}


@contextlib.contextmanager
def make_tail(bundle: Path, config: Any, manifest: Any, out: Path) -> Iterator[Any]:
    """The trainer of one process or of all ranks; does not return on ranks that only obey."""
    from hosl_cloud.ranks.follower import follow
    from hosl_cloud.ranks.group import Group
    from hosl_cloud.ranks.leader import GroupTrainer
    from hosl_cloud.tail.trainer import TailTrainer

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield TailTrainer(bundle, manifest, config)
        return
    group = Group(600.0)
    if group.rank:
        code = follow(group)
        (out / f"rank-{group.rank}").write_text(str(peak_mib()))
        sys.exit(code)
    try:
        yield GroupTrainer(group, bundle, manifest, config)
    finally:
        group.shut_down()


def peak_mib() -> float:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def work(options: argparse.Namespace) -> None:
    """A process of a case."""
    from hosl_cloud.settings import parse_config, read_config
    from hosl_cloud.tail.checkpoint import save_checkpoint
    from hosl_protocol.run.manifest import load_manifest

    manifest = load_manifest(options.bundle)
    data = {"task": TASK, "algorithm": "frozen", "max_length": options.tokens, "batch_size": options.batch}
    overrides = read_config(None, [f"tail.device={options.device}", *options.overrides])
    config = parse_config({**data, **overrides}, manifest)
    random = np.random.default_rng(0)
    batch = (
        random.standard_normal((options.batch * options.tokens, manifest.width), np.float32),
        np.full(options.batch, options.tokens, np.int32),
        random.integers(0, 2, options.batch).astype(np.int32),
    )
    with make_tail(options.bundle, config, manifest, options.out) as trainer:
        seconds = []
        for round_ in range(1, options.rounds + 1):
            began = time.monotonic()
            waiting = options.devices
            while waiting:
                count = min(waiting, trainer.at_once)
                trainer.forward_backward_many([batch] * count, [1.0] * count, wants_cut_gradient=True)
                waiting -= count
            trainer.step(round_, float(options.devices))
            seconds.append(time.monotonic() - began)
        figures = {"seconds": seconds, "trained_mib": peak_mib()}
        if options.checkpoint:
            began = time.monotonic()
            save_checkpoint(options.out, 1, 0, trainer, config)
            figures["checkpoint_s"] = time.monotonic() - began
    (options.out / "rank-0").write_text(str(peak_mib()))
    (options.out / "figures.json").write_text(json.dumps(figures))


def measure(options: argparse.Namespace, bundle: Path, ranks: int) -> dict[str, Any]:
    """One case."""
    with tempfile.TemporaryDirectory(dir=options.folder) as out:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        arguments = [*sys.argv[1:], "--bundle", str(bundle), "--out", out]
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(options.threads // ranks, 1))}
        command = [sys.executable, *(launcher if ranks > 1 else []), __file__, *arguments]
        subprocess.run(command, check=True, env=environment)
        figures = json.loads((Path(out) / "figures.json").read_text())
        figures["peaks_mib"] = [float((Path(out) / f"rank-{rank}").read_text()) for rank in range(ranks)]
    tokens = options.devices * options.batch * options.tokens
    return {"ranks": ranks, **figures, "tokens_per_s": tokens / statistics.median(figures["seconds"][1:])}


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="opt-1.3b")
    parser.add_argument("--blocks", type=int, default=12, help="of the tail (default: %(default)s)")
    parser.add_argument("--ranks", default="1,2", help="numbers of processes (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of an example")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="the first is not timed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all ranks together")
    parser.add_argument("--device", default="auto", help="tail.device (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--checkpoint", action="store_true", help="write one, and measure again")
    parser.add_argument("--folder", type=Path, help="where the bundle and checkpoints go for the time")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bundle is not None:
        work(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        parameters = write_bundle(Path(folder) / "bundle", options.geometry, options.blocks, options.tokens)
        cases = [measure(options, Path(folder) / "bundle", int(ranks)) for ranks in options.ranks.split(",")]
    if options.json:
        print(json.dumps({"parameters": parameters, "cases": cases}))
        return
    machine = f"{platform.machine()}, {options.threads} threads in all, torch {version('torch')}"
    print(f"{options.geometry}, {options.blocks} blocks, {parameters / 1e6:.0f} M parameters; {machine}")
    print(f"{options.devices} devices x {options.batch} x {options.tokens} tokens; {' '.join(options.overrides)}")
    first = max(cases[0]["peaks_mib"])
    for case in cases:
        peaks = ", ".join(f"{peak:.0f}" for peak in case["peaks_mib"])
        print(
            f"{case['ranks']} ranks: peak of each {peaks} MiB, the largest {max(case['peaks_mib']) / first:.2f} of the "
            f"first case's; rank 0 {case['trained_mib']:.0f} MiB before the checkpoint; "
            f"a round {statistics.median(case['seconds'][1:]):.2f} s, {case['tokens_per_s']:.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
