"""The base install is the device's: a fresh virtual environment, no torch, and `hosl-edge --help` runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from support import ROOT


def test_the_base_distribution_installs_alone_and_runs_the_agent(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv")
    binaries = tmp_path / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", tmp_path / "venv"]
    install = [*pip, "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", ROOT]
    subprocess.run(install, check=True, timeout=600)
    done = subprocess.run([binaries / "hosl-edge", "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert "--token-file" in done.stdout
    script = subprocess.run(
        [binaries / "hosl-edge", "--completion", "bash"], capture_output=True, text=True, timeout=60
    )
    assert "complete -" in script.stdout, "it needs no package for that"
    listing = subprocess.run([*pip, "list"], capture_output=True, text=True, check=True, timeout=60).stdout
    installed = {line.split()[0].lower() for line in listing.splitlines()[2:]}
    assert {"hosl", "onnxruntime", "numpy", "websockets"} <= installed
    assert not installed & {"torch", "transformers", "onnx", "starlette", "peft", "rich", "shtab"}
    cloud = subprocess.run([binaries / "hosl-cloud", "--help"], capture_output=True, text=True, check=False, timeout=60)
    assert cloud.returncode == 0, "help needs no extra"
    assert sys.version_info >= (3, 10)

    calls = "hosl.export('facebook/opt-125m', 6)"
    code = f"import hosl\ntry: {calls}\nexcept hosl.MissingExtra as error: print(error)"
    said = subprocess.run([binaries / "python", "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"hosl\.export needs: pip install 'hosl\[export\] @ file:.*' \(\w+ is missing\)\n", said)


@pytest.mark.parametrize("page", ["README.md", "edge/install.md"])
def test_the_command_that_packs_a_checkout_leaves_the_file_where_the_next_command_looks(
    tmp_path: Path, page: str
) -> None:
    packing = re.search(r"git -C hosl archive [^`\n]*", (ROOT / page).read_text(encoding="utf-8"))
    assert packing
    (tmp_path / "hosl").mkdir()
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "Nothing"]):
        subprocess.run(["git", "-C", "hosl", *words], cwd=tmp_path, check=True)
    subprocess.run(shlex.split(packing[0]), cwd=tmp_path, check=True)
    assert (tmp_path / "hosl.tar.gz").is_file()
