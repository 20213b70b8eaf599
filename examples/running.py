"""What the demos share: hosl's own commands, a cloud and its devices as processes, and a package from PyPI."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_started = time.monotonic()


def step(sentence: str) -> None:
    """Say what comes next, and when."""
    print(f"\n== {time.monotonic() - _started:4.0f} s: {sentence}", flush=True)


def took() -> str:
    """Say how long the demo has taken."""
    minutes, seconds = divmod(round(time.monotonic() - _started), 60)
    return f"it took {minutes} min {seconds} s"


def tool(program: str, *arguments: object) -> list[str]:
    """The command line of a program that is installed beside this Python."""
    return [str(Path(sys.executable).parent / program), *map(str, arguments)]


def run(program: str, *arguments: object) -> None:
    """Run a hosl command; end where it fails."""
    code = subprocess.run(tool(program, *arguments), check=False).returncode
    if code:
        raise SystemExit(f"{program} ended with exit code {code}")


@contextlib.contextmanager
def cloud(bundle: Path, config: Path, data_dir: Path) -> Iterator[tuple[str, str]]:
    """The service on a free port, for one run; its address and token file, as it prints them."""
    options = ("--bundle", bundle, "--config", config, "--data-dir", data_dir, "--port", 0, "--once")
    process = subprocess.Popen(tool("hosl-cloud", "serve", *options), stdout=subprocess.PIPE, text=True)
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
    assert process.stdout is not None
    stream = process.stdout
    thread = threading.Thread(target=lambda: [print(line, end="", flush=True) for line in stream])
    thread.start()
    try:
        yield
    finally:
        process.terminate()
        thread.join()


def train(bundle: Path, config: Path, work: Path, devices: Sequence[tuple[str, Path, Path]]) -> list[dict[str, Any]]:
    """Run a cloud and devices of (name, training data, held-out data) to the end; the devices' summaries."""
    with cloud(bundle, config, work / "cloud") as (server, token_file):
        own = ("--server", server, "--token-file", token_file, "--threads", 1, "--json")
        places = ("--state-dir", work / "state", "--cache-dir", work / "cache")
        processes = [
            subprocess.Popen(
                tool("hosl-edge", *own, "--name", name, "--data", data, "--eval", held_out, *places),
                stdout=subprocess.PIPE,
                text=True,
            )
            for name, data, held_out in devices
        ]
        try:
            outputs = [process.communicate()[0] for process in processes]
        finally:
            for process in processes:
                process.kill()

    failed = [process.returncode for process in processes if process.returncode]
    if failed:
        raise SystemExit(f"a device ended with exit code {failed[0]}")
    return [json.loads(output) for output in outputs]


def download(package: tuple[str, str], folder: Path, *options: str) -> Path:
    """Fetch one file of a package from PyPI to `folder`, by (requirement, SHA-256), and check it."""
    requirement, sha256 = package
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", *options, "--dest", str(folder)]
    subprocess.run([*command, requirement], check=True)
    (path,) = set(folder.iterdir()) - before
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise SystemExit(f"{path} has SHA-256 {digest}, expected {sha256}")
    return path
