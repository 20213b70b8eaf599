"""Peak memory of a real device process in a real run: `hosl-edge` against `hosl-cloud` on loopback.

    python tests/benchmarks/device_memory.py [--train blocks] [--batch 16] [--length 128] [--budget 400M] [--json]

OPT-125M geometry, random weights, split 6, a vocabulary of 50,272 tokens whose frequencies follow Zipf's law.
Target: below 330 MB resident for `--train blocks`, batch 16 x 128.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

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
verbalizers = ["w10", "w11"]
[client]
learning_rate = 1e-7
[tail]
train = "head"
"""


def make_model(folder: Path) -> None:
    """OPT-125M's geometry with random weights and a word-level tokenizer of as many words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig()).save_pretrained(folder)
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


def run_device(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Export, serve, train; the device's own summary."""
    module = [sys.executable, "-m"]
    export = ["hosl_export", "--model", folder / "model", "--split", 6, "--train", options.train, "--max-length"]
    call([*module, *export, options.length, "--out", folder / "bundle"])
    (folder / "run.toml").write_text(CONFIG.format(**vars(options)), encoding="utf-8")
    serve = ["hosl_cloud", "serve", "--bundle", folder / "bundle", "--config", folder / "run.toml", "--port", 0]
    cloud = subprocess.Popen(
        [*map(str, [*module, *serve, "--data-dir", folder / "cloud", "--once"])], stdout=subprocess.PIPE, text=True
    )
    try:
        assert cloud.stdout is not None
        line = next(line for line in cloud.stdout if "--token-file" in line)
        found = re.search(r"--server (\S+) --token-file (\S+)", line)
        assert found is not None
        edge = ["hosl_edge", "--server", found[1], "--token-file", found[2], "--data", folder / "data.jsonl"]
        edge += ["--state-dir", folder / "state", "--cache-dir", folder / "cache", "--json", "--name", "device"]
        if options.budget:
            edge += ["--memory-budget", options.budget]
        summary: dict[str, Any] = json.loads(call([*module, *edge]))
        return summary
    finally:
        cloud.kill()
        cloud.communicate()


def call(command: list[Any]) -> str:
    """Run a command; what it prints."""
    return subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="blocks", choices=("none", "lora", "norm", "blocks", "all"))
    parser.add_argument("--algorithm", default="ho-sfl", choices=("ho-sfl", "hosl", "frozen"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--budget", help="the device's --memory-budget")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        make_data(folder / "data.jsonl", 4 * options.batch, options.length)
        summary = run_device(folder, options)
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {name: version(name) for name in ("hosl", "onnxruntime", "numpy")},
        "work": {
            name: getattr(options, name) for name in ("train", "algorithm", "batch", "length", "rounds", "budget")
        },
        "peak_mb": summary["peak_rss_bytes"] / 1e6,
        "anonymous_mb": summary["anonymous_bytes"] / 1e6,
    }
    print(json.dumps(report) if options.json else describe(report))


def describe(report: dict[str, Any]) -> str:
    """The report as a table."""
    work = report["work"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return "\n".join(
        [
            f"{report['machine']}; {versions}",
            "OPT-125M geometry, split 6, real device process, real run",
            f"{'train':>7} {'algorithm':>9} {'batch':>9} {'budget':>7} {'peak':>8} {'anonymous':>10}",
            f"{work['train']:>7} {work['algorithm']:>9} {work['batch']:>3} x {work['length']:>3} "
            f"{work['budget'] or '-':>7} {report['peak_mb']:5.0f} MB {report['anonymous_mb']:7.0f} MB"
            f"{'  above target' if report['peak_mb'] > TARGET_MB else ''}",
        ]
    )


if __name__ == "__main__":
    main()
