"""Programs of the product as processes of their own, forked from one that has torch imported: that takes seconds."""

from __future__ import annotations

import fcntl
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("hosl_cloud.__main__", "hosl_cloud.service.server", "hosl_cloud.runs.resume", "hosl_cloud.tail.trainer"),
        *("hosl_edge.agent", "torch._dynamo", "transformers.models.llama.modeling_llama", "hosl_export.model.joining"),
    ]
)


class Program:
    """`python -m module arguments`, or `python script arguments`; of subprocess.Popen what tests use."""

    def __init__(
        self,
        module: str | Path,
        *arguments: object,
        errors: Path,
        cwd: Path | None = None,
        terminal: str = "",
        **variables: str,
    ) -> None:
        """Start it in a folder, with these variables in its environment; its standard error goes to the file.

        With the name of a `terminal` all that it says goes there, and it has that terminal's foreground.
        """
        reading, writing = FORKS.Pipe(duplex=False)
        words = [str(argument) for argument in arguments]
        given = (writing, errors, cwd, terminal, variables, module, words)
        self._process = FORKS.Process(target=_run, args=given)
        self._process.start()
        writing.close()
        self.stdout = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
        reading.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, less than zero for the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it prints until it ends."""
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(self._rest()), daemon=True)
        reader.start()
        self.wait(timeout)
        reader.join()
        return "".join(said), None

    def _rest(self) -> Iterator[str]:
        if not self.stdout.closed:
            with self.stdout:
                yield from self.stdout


def _run(
    output: Connection,
    errors: Path,
    cwd: Path | None,
    terminal: str,
    variables: dict[str, str],
    module: str | Path,
    arguments: list[str],
) -> None:
    """Be the program."""
    os.environ.update(variables)
    if cwd is not None:
        os.chdir(cwd)
    if terminal:
        os.setsid()
        place = os.open(terminal, os.O_RDWR)
        fcntl.ioctl(place, termios.TIOCSCTTY, 0)
        for number in range(3):
            os.dup2(place, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    else:
        with errors.open("ab") as file:
            os.dup2(output.fileno(), 1)
            os.dup2(file.fileno(), 2)
    output.close()
    gc.freeze()  # a device has no torch that the collector would look at
    if isinstance(module, str):
        sys.exit(importlib.import_module(f"{module}.__main__").main(arguments))
    sys.argv, sys.path[0] = [str(module), *arguments], str(module.parent)
    runpy.run_path(str(module), run_name="__main__")
