"""What a command tells people and machines: sentences on stdout, a log on stderr, both as text or as lines of JSON.

Every line names the run, round and device that it is about, where these are known: from `extra` of the log's call, or
from the scope in which it was made. The scope is a context variable, so that each asyncio task has that of the task
which made it; work in a thread has it only where the caller hands its context on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TextIO

from hosl_protocol.program.plain import plain

_TIME = "%Y-%m-%d %H:%M:%S"
PLACES = ("run", "round", "device")

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


class _PlainFormatter(logging.Formatter):
    """Lines of text for people: whatever a message quotes, it is one line, and a terminal obeys none of it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Make the line plain."""
        return plain(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """Make the traceback plain, line by line."""
        return "\n".join(map(plain, super().formatException(ei).split("\n")))


class TextFormatter(_PlainFormatter):
    """A line for people; what it is about stands behind the logger's name."""

    def __init__(self) -> None:
        time_ = "%(asctime)s " if _needs_time(sys.stderr) else ""
        super().__init__(f"{time_}%(levelname)s %(name)s%(place)s: %(message)s", _TIME)

    def format(self, record: logging.LogRecord) -> str:
        """Make the line, and below it the traceback where there is one."""
        record.place = "".join(f" {name}={value}" for name, value in place_of(record).items())
        return super().format(record)


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


def sentence_line(device: str, sentence: str) -> str:
    """Put what a device says into the log's format."""
    if not is_json():
        time_ = time.strftime(_TIME + " ") if _needs_time(sys.stderr) else ""
        return plain(f"{time_}{device}: {sentence}")
    record = {"name": "hosl-edge", "levelname": "INFO", "msg": sentence, "device": device}
    return JsonFormatter().format(logging.makeLogRecord(record))


def _needs_time(stream: TextIO) -> bool:
    """A person at a terminal knows the time, and the journal notes it."""
    return not stream.isatty() and "JOURNAL_STREAM" not in os.environ


class _Sentences(logging.StreamHandler[TextIO]):
    """Raises what goes wrong: a command whose reader has left ends."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def configure_logs(program: str, level: str, format_: str) -> None:
    """The log goes to stderr from `level` up; what the program's own logger says goes to stdout, all of it."""
    is_json = format_ == "json"
    log_handler = logging.StreamHandler()
    log_handler.setFormatter(JsonFormatter() if is_json else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[log_handler])
    sentences = _Sentences(sys.stdout)
    text = _PlainFormatter(f"{'%(asctime)s ' if _needs_time(sys.stdout) else ''}{program}: %(message)s", _TIME)
    sentences.setFormatter(JsonFormatter() if is_json else text)
    teller = logging.getLogger(program)
    teller.handlers, teller.propagate = [sentences], False
    # Sentences are what the program is asked for: no level hides them.
    teller.setLevel(logging.INFO)
