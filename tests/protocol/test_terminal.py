"""Ends by signal: an exit code, whatever was running."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hosl_protocol.exceptions import ExitCode
from hosl_protocol.installing import install_line

MODULE = """
import argparse, os, signal, sys
from hosl_protocol.terminal import add_common_options, run_command, terminable

def work(options):
    exec("os.kill(os.getpid(), signal.SIGTERM); import time; time.sleep(30)", globals())
    return 0

parser = argparse.ArgumentParser(prog="work")
add_common_options(parser)
with terminable():
    code = run_command(parser, work, [])
sys.exit(code)
"""


def test_sigterm_within_generated_code_ends_with_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(MODULE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    result = subprocess.run([sys.executable, "-m", "work"], env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (ExitCode.INTERRUPTED, "work: error: interrupted\n")


@pytest.mark.parametrize("program", ["hosl-edge", "hosl-cloud", "hosl-export"])
def test_every_program_says_its_version(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"{program.replace('-', '_')}.__main__").main
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{program} {importlib.metadata.version('hosl')}\n"


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("cloud", ["init", "--name", "localhost", "--data-dir", "DIR/data"]),
        ("cloud", ["serve", "--data-dir", "DIR/data", "--port", "0"]),
        ("export", ["--model", "DIR", "--split", "1", "--out", "DIR/bundle"]),
    ],
)
def test_in_the_devices_environment_the_others_say_what_they_need(
    tmp_path: Path, program: str, arguments: list[str]
) -> None:
    absent = ("cryptography", "onnx_ir", "torch", "transformers", "starlette", "uvicorn", "prometheus_client")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); from hosl_{program}.__main__ import main; "
    given = [argument.replace("DIR", str(tmp_path)) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(main({given}))"], capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.SETTINGS, done.stderr
    line = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert line.startswith(f"hosl-{program}: error: hosl-{program} needs: {install_line(program)} (")
