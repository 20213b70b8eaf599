"""Ends by signal: an exit code, whatever was running."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hosl_protocol.exceptions import ExitCode
from hosl_protocol.program.installing import install_line

MODULE = """
import argparse, os, signal, sys
from hosl_protocol.program.terminal import add_common_options, run_command, terminable

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
    assert (result.returncode, result.stderr) == (ExitCode.INTERRUPTED, "work: interrupted\n")


def test_a_second_sigterm_does_not_break_off_the_tidying(tmp_path: Path) -> None:
    """`timeout` sends two, one to the process and one to its group."""
    work = "os.kill(os.getpid(), signal.SIGTERM)\n    finally:\n        os.kill(os.getpid(), signal.SIGTERM)"
    tidy = f'    try:\n        {work}\n        print("tidied", flush=True)\n    return 0\n'
    (tmp_path / "work.py").write_text(re.sub("    exec.*\n    return 0\n", lambda _: tidy, MODULE))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    result = subprocess.run([sys.executable, "-m", "work"], env=environment, capture_output=True, text=True, timeout=60)
    ended = (result.returncode, result.stdout, result.stderr)
    assert ended == (ExitCode.INTERRUPTED, "tidied\n", "work: interrupted\n")


ASYNC = """
import argparse, asyncio, contextlib, os, signal, sys, time
from hosl_protocol.program.terminal import add_common_options, run_command, run_until_interrupted, terminable

def within_a_library():
    # As a connection's callback does, whose errors asyncio logs.
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), NUMBER)
        time.sleep(0.1)

async def work():
    asyncio.get_running_loop().call_later(0.05, within_a_library)
    try:
        await asyncio.sleep(30)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # a second one, as `timeout` sends it
        await asyncio.sleep(0.2)
        print("tidied", flush=True)

parser = argparse.ArgumentParser(prog="work")
add_common_options(parser)
with terminable():
    code = run_command(parser, lambda options: run_until_interrupted(work()), [])
sys.exit(code)
"""


@pytest.mark.parametrize("number", ["signal.SIGTERM", "signal.SIGINT"])
def test_a_signal_within_a_librarys_callback_ends_the_program_after_it_has_tidied_up(
    tmp_path: Path, number: str
) -> None:
    (tmp_path / "work.py").write_text(ASYNC.replace("NUMBER", number))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    result = subprocess.run([sys.executable, "-m", "work"], env=environment, capture_output=True, text=True, timeout=25)
    ended = (result.returncode, result.stdout, result.stderr)
    assert ended == (ExitCode.INTERRUPTED, "tidied\n", "work: interrupted\n")


def test_a_second_ctrl_c_breaks_off_the_tidying(tmp_path: Path) -> None:
    text = ASYNC.replace("NUMBER", "signal.SIGINT").replace("signal.SIGTERM)  #", "signal.SIGINT)  #")
    (tmp_path / "work.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    result = subprocess.run([sys.executable, "-m", "work"], env=environment, capture_output=True, text=True, timeout=25)
    assert (result.returncode, result.stdout) == (ExitCode.INTERRUPTED, "")


def test_a_crash_in_native_code_says_what_and_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(MODULE.replace("SIGTERM", "SIGSEGV"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    result = subprocess.run([sys.executable, "-m", "work"], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == -signal.SIGSEGV
    assert result.stderr.startswith("Fatal Python error: Segmentation fault\n")
    assert " in work\n" in result.stderr


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


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user id that no account has, in an environment without HOME; pytest's folder is there before, for it asks
    whose it is."""
    for variable in ("HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "RUNTIME_DIRECTORY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(RuntimeError):
        Path.home()


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("program", ["hosl-edge", "hosl-cloud", "hosl-export"])
def test_help_needs_no_home(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"{program.replace('-', '_')}.__main__").main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize(
    ("program", "arguments", "option"),
    [
        ("hosl-cloud", ["run", "list"], "--data-dir"),
        ("hosl-cloud", ["init", "--name", "localhost"], "--data-dir"),
        ("hosl-cloud", ["merge", "RUN", "--out", "DIR/out"], "--data-dir"),
        ("hosl-edge", ["config"], "--state-dir"),
        ("hosl-edge", ["status"], "--state-dir"),
        ("hosl-edge", ["config", "--state-dir", "DIR"], "--cache-dir"),
        ("hosl-edge", ["--server", "ws://127.0.0.1:1", "--token-file", "DIR/t", "--data", "DIR/d"], "--state-dir"),
    ],
)
def test_a_command_that_needs_a_home_names_the_option_that_does_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str, arguments: list[str], option: str
) -> None:
    main = importlib.import_module(f"{program.replace('-', '_')}.__main__").main
    assert main([word.replace("DIR", str(tmp_path)) for word in arguments]) == ExitCode.SETTINGS
    line = capsys.readouterr().err
    assert f"give {option} DIR" in line
    assert line.count("\n") == 1


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("hosl-cloud", ["run", "list", "--data-dir", "DIR"]),
        ("hosl-edge", ["status", "--state-dir", "DIR"]),
        ("hosl-edge", ["config", "--state-dir", "DIR", "--cache-dir", "DIR", "--example"]),
    ],
)
def test_folders_that_are_named_need_no_home(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str, arguments: list[str]
) -> None:
    main = importlib.import_module(f"{program.replace('-', '_')}.__main__").main
    assert main([word.replace("DIR", str(tmp_path)) for word in arguments]) in (ExitCode.OK, ExitCode.REFUSED)
    assert "home" not in capsys.readouterr().err


@pytest.mark.parametrize("module", ["argparse", "numpy"])
@pytest.mark.parametrize("program", ["hosl_edge", "hosl_cloud", "hosl_export"])
def test_ctrl_c_while_a_program_loads_is_no_traceback(tmp_path: Path, program: str, module: str) -> None:
    """At the import of a module that all of them need: of their first one, and of a large one."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == '{module}': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    script = f"from {program}.__main__ import main; import sys; sys.exit(main(['--version']))"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (ExitCode.INTERRUPTED, "", "")
