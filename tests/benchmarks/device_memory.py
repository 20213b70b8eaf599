"""Peak memory of a real device process in a real run: `hosl-edge` against `hosl-cloud` on loopback.

    python tests/benchmarks/device_memory.py [--model opt-125m] [--split 6] [--train blocks] [--batch 16] [--length 128]
                                             [--lora-rank 8] [--lora-targets NAMES]
                                             [--algorithm ho-sfl first-order] [--optimizer sgd] [--budget 400M]
                                             [--limit 400M] [--json]

The geometry of OPT-125M, OPT-1.3B (two blocks more than the device's, which is all that the tail needs here) or
Qwen2.5-0.5B (all 24 blocks), random weights, texts of 50,272 words whose frequencies follow Zipf's law. Of several
algorithms each has a device, a cloud and a run of its own, one after the other; the last column compares their peaks
with the first one's. Anonymous memory, that which no file backs, is read every 10 ms; the table has its peak.
`--limit` runs the device in a memory control group of that size (root only): a shard that is larger must still train,
its frozen weights paged in from the file.
Target: below 330 MB resident for OPT-125M, `--train blocks`, batch 16 x 128.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from hosl_edge.settings import parse_bytes

TARGET_MB = 330
VOCABULARY = 50272
CONFIG = """
algorithm = "{algorithm}"
rounds = {rounds}
batch_size = {batch}
max_length = {length}
report_every = 1
[task]
preset = "reviews"
template = "{{text}}"
verbalizers = {verbalizers}
[client]
learning_rate = 1e-7
optimizer = "{optimizer}"
[tail]
train = "head"
[devices]
round_deadline_s = 3600
"""


OPTS = {
    "opt-125m": {},
    "opt-1.3b": {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "word_embed_proj_dim": 2048},
}
QWENS = {
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
}
SAMPLE_S = 0.01
"""Between two looks at the device's anonymous memory."""


def make_model(folder: Path, geometry: str = "opt-125m", split: int = 6) -> None:
    """The geometry with random weights, and a tokenizer: of OPTs one of 50,272 words, of Qwen's one of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if geometry in QWENS:
        Qwen2ForCausalLM(Qwen2Config(**QWENS[geometry])).save_pretrained(folder)
        # transformers takes the family's own tokenizer, byte-level BPE, whatever the file says.
        letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(letters | {"<end>": len(letters)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(
            folder
        )
        return
    OPTForCausalLM(OPTConfig(num_hidden_layers=split + 2, **OPTS[geometry])).save_pretrained(folder)
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, **{f"w{n}": n for n in range(4, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


def make_data(path: Path, examples: int, length: int) -> None:
    """Texts of `length` words; word n is drawn as often as the n-th word of a natural text."""
    generator = np.random.default_rng(0)
    ranks = np.minimum(generator.zipf(1.1, (examples, length)), VOCABULARY - 5)
    rows = [{"text": " ".join(f"w{4 + rank}" for rank in row), "label": n % 2} for n, row in enumerate(ranks)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def export(folder: Path, options: argparse.Namespace) -> None:
    """Write the bundle."""
    command = [sys.executable, "-m", "hosl_export", "--model", folder / "model", "--split", options.split]
    command += ["--train", options.train, "--max-length", options.length, "--out", folder / "bundle"]
    for name in ("lora_rank", "lora_targets"):
        if getattr(options, name) is not None:
            command += [f"--{name.replace('_', '-')}", getattr(options, name)]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE)


def run_device(folder: Path, algorithm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Serve and train; the device's own summary."""
    module = [sys.executable, "-m"]
    labels = {"algorithm": algorithm, "verbalizers": '["w10", "w11"]' if options.model in OPTS else '["a", "b"]'}
    (folder / "run.toml").write_text(CONFIG.format(**{**vars(options), **labels}), encoding="utf-8")
    serve = ["hosl_cloud", "serve", "--bundle", folder / "bundle", "--config", folder / "run.toml", "--port", 0]
    cloud = subprocess.Popen(
        [*map(str, [*module, *serve, "--data-dir", folder / f"cloud-{algorithm}", "--once"])],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert cloud.stdout is not None
        line = next(line for line in cloud.stdout if "--token-file" in line)
        found = re.search(r"--server (\S+) --token-file (\S+)", line)
        assert found is not None
        edge = ["hosl_edge", "--server", found[1], "--token-file", found[2], "--data", folder / "data.jsonl"]
        edge += [
            "--state-dir",
            folder / f"state-{algorithm}",
            "--cache-dir",
            folder / "cache",
            "--json",
            "--name",
            "device",
        ]
        if options.budget:
            edge += ["--memory-budget", options.budget]
        with control_group(options.limit) as group:
            summary = watch([*module, *edge], group)
            summary["group"] = group_figures(group)
        return summary
    finally:
        cloud.kill()
        cloud.communicate()


def watch(command: list[Any], group: Path | None) -> dict[str, Any]:
    """Run a device, in a control group if one is given; its summary, and the most anonymous memory that was seen."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    device = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, preexec_fn=enter)
    most = 0
    while device.poll() is None:
        with contextlib.suppress(OSError):  # it may end between the two
            status = Path(f"/proc/{device.pid}/status").read_text(encoding="ascii")
            most = max([most, *(1024 * int(size) for size in re.findall(r"RssAnon:\s*(\d+) kB", status))])
        time.sleep(SAMPLE_S)
    output = device.communicate()[0]
    if device.returncode:
        sys.exit(f"the device ended with exit code {device.returncode}")
    return {**json.loads(output), "most_anonymous_bytes": most}


@contextlib.contextmanager
def control_group(limit: str | None) -> Iterator[Path | None]:
    """A memory control group of version 1 or 2 for the time of the block; None without a limit."""
    if limit is None:
        yield None
        return
    root = Path("/sys/fs/cgroup/memory") if Path("/sys/fs/cgroup/memory").is_dir() else Path("/sys/fs/cgroup")
    group = root / f"hosl-benchmark-{os.getpid()}"
    try:
        group.mkdir()
        name = "memory.limit_in_bytes" if (group / "memory.limit_in_bytes").exists() else "memory.max"
        (group / name).write_text(str(parse_bytes(limit)), encoding="ascii")
    except OSError as error:
        sys.exit(f"--limit {limit}: no memory control group can be made here ({error}); run as root, or leave it out")
    try:
        yield group
    finally:
        group.rmdir()


def group_figures(group: Path | None) -> dict[str, int]:
    """Most memory that the group used, page cache included, and how often it met its limit."""
    if group is None:
        return {}
    for peak, met in (("memory.max_usage_in_bytes", "memory.failcnt"), ("memory.peak", "memory.events")):
        if (group / peak).exists():
            words = (group / met).read_text(encoding="ascii").split()
            count = words[words.index("max") + 1] if "max" in words else words[0]
            return {"peak_bytes": int((group / peak).read_text(encoding="ascii")), "times_at_limit": int(count)}
    return {}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-125m", choices=(*OPTS, *QWENS))
    parser.add_argument("--split", type=int, default=6)
    parser.add_argument("--train", default="blocks", choices=("none", "lora", "norm", "blocks", "all"))
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--lora-targets", help="as hosl-export takes them")
    known = ("ho-sfl", "hosl", "first-order", "frozen")
    parser.add_argument("--algorithm", nargs="+", default=["ho-sfl"], choices=known)
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "adamw"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--budget", help="the device's --memory-budget")
    parser.add_argument("--limit", help="size of a memory control group for the device")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    reports = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", options.model, options.split)
        make_data(folder / "data.jsonl", 4 * options.batch, options.length)
        export(folder, options)
        shard_bytes = (folder / "bundle" / "shard" / "shard.safetensors").stat().st_size
        for algorithm in options.algorithm:
            reports.append(make_report(run_device(folder, algorithm, options), algorithm, options, shard_bytes))
    if options.json:
        print(json.dumps(reports if len(reports) > 1 else reports[0]))
    else:
        print(describe(reports))


def make_report(
    summary: dict[str, Any], algorithm: str, options: argparse.Namespace, shard_bytes: int
) -> dict[str, Any]:
    """What a device's summary comes to, and of which work."""
    names = (
        "model",
        "split",
        "train",
        "lora_rank",
        "lora_targets",
        "optimizer",
        "batch",
        "length",
        "rounds",
        "budget",
        "limit",
    )
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {name: version(name) for name in ("hosl", "onnxruntime", "numpy")},
        "work": {"algorithm": algorithm, **{name: getattr(options, name) for name in names}},
        "peak_mb": summary["peak_rss_bytes"] / 1e6,
        "anonymous_mb": summary["most_anonymous_bytes"] / 1e6,
        "step_s": summary["step_seconds"],
        "shard_mb": shard_bytes / 1e6,
        "group": summary["group"],
    }


def describe(reports: list[dict[str, Any]]) -> str:
    """The reports as a table."""
    first = reports[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    shard = f"shard {first['shard_mb']:.0f} MB"
    lines = [
        f"{first['machine']}; {versions}",
        f"{first['work']['model']} geometry, split {first['work']['split']}, real device process, real run; {shard}",
        f"{'train':>7} {'algorithm':>11} {'batch':>9} {'budget':>7} {'limit':>7} "
        f"{'peak':>8} {'anonymous':>10} {'step':>8} {'peak over first':>16}",
    ]
    for report in reports:
        work = report["work"]
        is_target = (work["model"], work["train"], work["batch"], work["length"]) == ("opt-125m", "blocks", 16, 128)
        is_above = is_target and work["algorithm"] == "ho-sfl" and report["peak_mb"] > TARGET_MB
        lines.append(
            f"{work['train']:>7} {work['algorithm']:>11} {work['batch']:>3} x {work['length']:>3} "
            f"{work['budget'] or '-':>7} {work['limit'] or '-':>7} {report['peak_mb']:5.0f} MB "
            f"{report['anonymous_mb']:7.0f} MB {report['step_s']:6.2f} s {report['peak_mb'] / first['peak_mb']:>16.2f}"
            f"{'  above target' if is_above else ''}"
        )
        if group := report["group"]:
            peak = group["peak_bytes"] / 1e6
            lines.append(f"control group: at most {peak:.0f} MB used, {group['times_at_limit']} times at the limit")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
