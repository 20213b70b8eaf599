"""Peak memory of hosl-export on a model of OPT-1.3B's geometry, against the model's bytes.

    python tests/benchmarks/export_memory.py [--blocks N] [--split N] [--train MODE] [--json]

Random weights are saved as a local folder, then exported by a child process. Limit: 2.5 times the model's bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

LIMIT = 2.5

BUILD = """
import sys, torch
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers
folder, blocks = sys.argv[1], int(sys.argv[2])
config = OPTConfig(hidden_size=2048, ffn_dim=8192, num_attention_heads=32, num_hidden_layers=blocks)
config.word_embed_proj_dim = 2048
model = OPTForCausalLM(config)
model.save_pretrained(folder)
print(4 * sum(parameter.numel() for parameter in model.parameters()))
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(["<pad>", "</s>", *alphabet])}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
"""
"""The geometry and a tokenizer of bytes, made in a process of its own, which gives its memory back."""


def build_model(folder: Path, blocks: int) -> int:
    """Save the model. Returns the bytes of its weights."""
    command = [sys.executable, "-c", BUILD, str(folder), str(blocks)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def watch(process: subprocess.Popen[str], peaks: dict[str, int]) -> None:
    """Keep the largest resident memory of the child, anonymous and file-backed apart, until it ends."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            fields = dict(re.findall(r"(VmHWM|RssAnon|RssFile):\s+(\d+) kB", status.read_text()))
        except OSError:
            break
        for name, kib in fields.items():
            peaks[name] = max(peaks.get(name, 0), int(kib) * 1024)
        time.sleep(0.02)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Export in a child and watch it."""
    command = [sys.executable, "-m", "hosl_export", "--json", "--model", str(folder), "--out", f"{folder}-bundle"]
    command += ["--split", str(options.split), "--train", options.train, "--max-length", "128"]
    peaks: dict[str, int] = {}
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        watcher = threading.Thread(target=watch, args=(process, peaks))
        watcher.start()
        output, _ = process.communicate()
        watcher.join()
    if process.returncode:
        raise SystemExit(process.returncode)
    return {"seconds": time.monotonic() - start, "peaks": peaks, "summary": json.loads(output)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=24, help="default: %(default)s, OPT-1.3B")
    parser.add_argument("--split", type=int, default=6)
    parser.add_argument("--train", default="lora")
    parser.add_argument("--folder", type=Path, help="where the model and its bundle go for the time (16 GB)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model_bytes = build_model(Path(folder, "model"), options.blocks)
        result = measure(Path(folder, "model"), options)
    peaks = result["peaks"]
    report = {
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total >> 30} GiB",
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime")},
        "work": f"OPT, width 2048, {options.blocks} blocks, split {options.split}, --train {options.train}",
        "model_bytes": model_bytes,
        "peak_bytes": peaks["VmHWM"],
        "peak_anonymous_bytes": peaks["RssAnon"],
        "peak_file_bytes": peaks["RssFile"],
        "ratio": peaks["VmHWM"] / model_bytes,
        "limit": LIMIT,
        "seconds": result["seconds"],
        "parity_error": result["summary"]["parity_error"],
    }
    print(json.dumps(report) if options.json else describe(report))
    sys.exit(report["ratio"] > LIMIT)


def describe(report: dict[str, Any]) -> str:
    """The report as a table."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    rows = [("weights of the model", report["model_bytes"]), ("peak resident memory", report["peak_bytes"])]
    rows += [("  of it anonymous, at most", report["peak_anonymous_bytes"])]
    rows += [("  of it file-backed, at most", report["peak_file_bytes"])]
    table = "\n".join(f"{name:28} {size / 1e6:9.0f} MB {size / report['model_bytes']:6.2f} x" for name, size in rows)
    return f"{report['machine']}; {versions}\n{report['work']}, {report['seconds']:.0f} s\n{table}\nlimit {LIMIT} x"


if __name__ == "__main__":
    main()
