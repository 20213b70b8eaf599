"""Ends by signal: an exit code, whatever was running."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hosl_protocol.exceptions import ExitCode

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
