"""What the three commands share: one clear line and a numbered exit code for every error."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import importlib.metadata
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from hosl_protocol.exceptions import ExitCode, HoslError, SettingsError
from hosl_protocol.program.installing import install_line
from hosl_protocol.program.live import write_line
from hosl_protocol.program.logs import configure_logs
from hosl_protocol.program.plain import plain

T = TypeVar("T")

_EXTRAS = {"hosl-cloud": "cloud", "hosl-export": "export"}
"""What a program needs beside the device's packages."""


def add_version(parser: argparse.ArgumentParser) -> None:
    """`--version`."""
    version = f"{parser.prog} {importlib.metadata.version('hosl')}"
    parser.add_argument("--version", action="version", version=version, help="print the version and end")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """`--quiet`, `--debug`, `--log-level` and `--log-format`."""
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors and the result")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--log-level", default="warning", choices=("debug", "info", "warning", "error"), help="default: %(default)s"
    )
    parser.add_argument(
        "--log-format", default="text", choices=("text", "json"), help="json: a line is an object (default: text)"
    )


def default_folder(variable: str, fallback: str, option: str) -> Path:
    """Find the folder that an XDG variable names, or one below the user's home; ask only where it is needed.

    Raises SettingsError, which names `option`, for a user who has no home.
    """
    if folder := os.environ.get(variable):
        return Path(folder)
    try:
        return Path.home() / fallback
    except RuntimeError:
        remedy = f"this user has no home folder, and HOME is not set: give {option} DIR"
        raise SettingsError(option, None, remedy) from None


def print_unit(path: Path) -> None:
    """Print a systemd unit, with the folder of this program. Raises SettingsError for a path with quotes."""

    def place(found: re.Match[str]) -> str:
        return _quoted(sys.prefix + found[1])

    print(re.sub(r"/opt/hosl(\S*)", place, path.read_text(encoding="utf-8")), end="")


def _quoted(word: str) -> str:
    """Quote a word of a systemd command line as systemd.syntax(7) wants it."""
    if re.search(r"[\"'\\]", word):
        raise SettingsError(
            "this program's path", word, "systemd takes no quotes or backslashes in it: install elsewhere"
        )
    word = word.replace("%", "%%")
    return f'"{word}"' if re.search(r"[\s;]", word) else word


def run_command(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse, run, and turn errors into a line on stderr and an exit code."""
    options = argparse.Namespace(debug=False, log_format="text", quiet=False)
    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # a crash in native code says what and where it was

    try:
        options = parser.parse_args(arguments)
        configure_logs(parser.prog, options.log_level, options.log_format, quiet=options.quiet)
        return command(options)
    except HoslError as error:
        return _fail(parser.prog, str(error), error.exit_code, options)
    except ModuleNotFoundError as error:
        # A module of ours that is missing is a fault of ours, and the device has no extra to install.
        if parser.prog not in _EXTRAS or (error.name or "hosl").startswith("hosl"):
            raise
        needs = f"{parser.prog} needs: {install_line(_EXTRAS[parser.prog])}"
        return _fail(parser.prog, f"{needs} ({error.name} is missing)", ExitCode.SETTINGS, options)
    except KeyboardInterrupt:
        return _fail(parser.prog, "interrupted", ExitCode.INTERRUPTED, options)
    except BrokenPipeError:
        # Whoever read has left; what Python flushes at the end must find somebody, or it would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.INTERRUPTED)
    except MemoryError:
        return _fail(parser.prog, "out of memory", ExitCode.RESOURCES, options)
    except OSError as error:
        return _fail(parser.prog, _sentence_of(error), _code_of(error), options)


class Terminated(KeyboardInterrupt):
    """SIGTERM came.

    A plain KeyboardInterrupt that passes through `exec` of a string (torch and transformers generate code) marks the
    process, and `python -m` then dies by SIGINT instead of returning its exit code, though the exception was caught.
    """


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end what runs within as Ctrl-C does, so that it can tidy up.

    It does so once: `timeout` sends two, and the second would break off the tidying.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_until_interrupted(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on an event loop of its own; SIGTERM and Ctrl-C cancel it, and are raised when it has tidied up.

    Raised at once, as `terminable` does, an exception could come within a library's callback, which keeps it to itself:
    the connection would then never end, and neither would the program. A second Ctrl-C breaks off the tidying.
    """
    heard: list[signal.Signals] = []

    async def run() -> T:
        task = asyncio.current_task()
        assert task is not None

        def on_signal(number: signal.Signals) -> None:
            heard.append(number)
            if len(heard) == 1:
                task.cancel()
            elif number is signal.SIGINT:
                raise KeyboardInterrupt

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
        return await work

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        if not heard:
            raise
        raise (Terminated if heard[0] is signal.SIGTERM else KeyboardInterrupt) from None


def _sentence_of(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def _code_of(error: OSError) -> ExitCode:
    """Choose the exit code: a wrong file is for a person to mend, the rest is what the machine lacks."""
    about_a_file = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
    return ExitCode.SETTINGS if isinstance(error, about_a_file) else ExitCode.RESOURCES


def _fail(program: str, sentence: str, code: ExitCode, options: argparse.Namespace) -> int:
    sentence, log, is_error = plain(sentence), logging.getLogger("hosl"), code is not ExitCode.INTERRUPTED
    # Who interrupts wants no traceback, even with --debug.
    is_traced = options.debug and is_error
    if options.log_format == "json":
        level = logging.ERROR if is_error else logging.WARNING
        log.log(level, sentence, exc_info=is_traced, extra={"exit_code": int(code)})
        return int(code)
    if is_traced:
        log.exception("%s failed", program)
    write_line(sys.stderr, f"{program}: {'error: ' * is_error}{sentence}")
    return int(code)
