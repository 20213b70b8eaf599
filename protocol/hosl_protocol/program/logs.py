"""What a command tells people and machines: sentences on stdout, a log on stderr, both as text or as lines of JSON.

As text both have one form, `hosl-cloud: a sentence` and `hosl-cloud: warning: a line of the log`, with the time before
it where neither a person at a terminal nor the journal knows it.

Every line names the run, round and device that it is about, where these are known: from `extra` of the log's call, or
from the scope in which it was made. The scope is a context variable, so that each asyncio task has that of the task
which made it; work in a thread has it only where the caller hands its context on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TextIO

from hosl_protocol.program.live import is_live, write_line
from hosl_protocol.program.plain import plain

_TIME = "%Y-%m-%d %H:%M:%S"
PLACES = ("run", "round", "device")

_is_quiet = False

_scope: ContextVar[dict[str, Any] | None] = ContextVar("hosl_log_scope", default=None)


@contextlib.contextmanager
def log_scope(**places: Any) -> Iterator[None]:
    """Let lines from within, and from the tasks that are made there, name these places."""
    token = _scope.set({**(_scope.get() or {}), **places})
    try:
        yield
    finally:
        _scope.reset(token)


def note_place(**places: Any) -> None:
    """Add to the scope around, for all its tasks: what is known of a connection grows with what it says."""
    scope = _scope.get()
    # In place: tasks that were made before share the dictionary, and shall know it, too.
    if scope is not None:
        scope.update(places)


def place_of(record: logging.LogRecord) -> dict[str, Any]:
    """Find the run, round and device of a line, as far as they are known."""
    known = {**(_scope.get() or {}), **{name: getattr(record, name) for name in PLACES if hasattr(record, name)}}
    return {name: known[name] for name in PLACES if name in known}


class TextFormatter(logging.Formatter):
    """Lines for people: whatever a message quotes, it is one line, and a terminal obeys none of it."""

    def __init__(self, speaker: str, stream: TextIO, *, has_labels: bool = True) -> None:
        """`speaker` is who says it, a program or a device. Labels tell lines of the log from sentences."""
        super().__init__()
        self.speaker = speaker
        self._has_time, self._has_labels = _needs_time(stream), has_labels

    def format(self, record: logging.LogRecord) -> str:
        """Make the line, and below it the traceback where there is one."""
        time_ = self.formatTime(record, _TIME) + " " if self._has_time else ""
        label = _label(record) if self._has_labels else ""
        lines = [plain(f"{time_}{self.speaker}: {label}{record.getMessage()}")]
        if record.exc_info:
            lines += map(plain, self.formatException(record.exc_info).split("\n"))
        return "\n".join(lines)


def _label(record: logging.LogRecord) -> str:
    """What stands before a message of the log: its level, and what it is about."""
    # Where in the code: for who asks for more than warnings, and where it is a library's.
    is_plain = record.levelno >= logging.WARNING and record.name.startswith("hosl")
    words = [record.levelname.lower(), *([] if is_plain else [record.name])]
    said = set(re.findall(r"[\w.-]+", record.getMessage()))  # is not said twice
    words += [f"{name}={value}" for name, value in place_of(record).items() if str(value) not in said]
    return " ".join(words) + ": "


class JsonFormatter(logging.Formatter):
    """An object on one line: time (UTC), level, logger, message, and what it is about."""

    def format(self, record: logging.LogRecord) -> str:
        """Make the object; `traceback` is there for an exception alone."""
        whole, part = divmod(int(record.created * 1000), 1000)
        line = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{part:03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **place_of(record),
        }

        if hasattr(record, "exit_code"):
            line["exit_code"] = record.exit_code
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def is_json() -> bool:
    """Whether the log is lines of JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def is_quiet() -> bool:
    """Whether results and trouble alone are said."""
    return _is_quiet


def sentence_line(speaker: str, sentence: str, program: str = "") -> str:
    """Put what a program says, or a device whose `program` is another name, into the log's format."""
    record = {
        "name": program or speaker,
        "levelname": "INFO",
        "msg": sentence,
        **({"device": speaker} if program else {}),
    }
    formatter = JsonFormatter() if is_json() else TextFormatter(speaker, sys.stderr, has_labels=False)
    return formatter.format(logging.makeLogRecord(record))


def name_speaker(name: str) -> None:
    """Let the log's lines of text be said by a device, as its sentences are."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, TextFormatter):
            handler.formatter.speaker = name


def _needs_time(stream: TextIO) -> bool:
    """A person at a terminal knows the time, and the journal notes it."""
    return not stream.isatty() and "JOURNAL_STREAM" not in os.environ


class _Lines(logging.StreamHandler[TextIO]):
    """Writes whole lines, above what is drawn at a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_line(self.stream, self.format(record), is_bare=isinstance(self.formatter, JsonFormatter))
        except Exception:
            self.handleError(record)


class _Sentences(_Lines):
    """Raises what goes wrong: a command whose reader has left ends."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def _is_figure_drawn(record: logging.LogRecord) -> bool:
    """Whether a sentence is a round's figures, which a display shows in place."""
    return is_live() and _is_marked(record, "is_figure")


def _is_result(record: logging.LogRecord) -> bool:
    """Whether a sentence is what is left with --quiet: a result, or trouble."""
    return record.levelno >= logging.WARNING or _is_marked(record, "is_result")


def _is_marked(record: logging.LogRecord, mark: str) -> bool:
    return bool(getattr(record, mark, (_scope.get() or {}).get(mark, False)))


def configure_logs(program: str, level: str, format_: str, *, quiet: bool = False) -> None:
    """The log goes to stderr from `level` up; what the program's own logger says goes to stdout.

    Sentences are marked by `extra` or the scope around: `is_result`, which is all that `quiet` lets through, and
    `is_figure`, which is left out where a display shows it.
    """
    global _is_quiet
    _is_quiet = quiet
    is_json = format_ == "json"
    log_handler = _Lines()
    log_handler.setFormatter(JsonFormatter() if is_json else TextFormatter(program, log_handler.stream))
    logging.basicConfig(level=level.upper(), handlers=[log_handler])
    sentences = _Sentences(sys.stdout)
    sentences.setFormatter(JsonFormatter() if is_json else TextFormatter(program, sys.stdout, has_labels=False))
    sentences.addFilter(lambda record: not _is_figure_drawn(record))
    if quiet:
        sentences.addFilter(_is_result)
    teller = logging.getLogger(program)
    teller.handlers, teller.propagate = [sentences], False
    # Sentences are what the program is asked for: no level hides them.
    teller.setLevel(logging.INFO)
