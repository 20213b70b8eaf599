"""Lines of a log: what each is about, as text and as JSON, whichever task or thread it comes from."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hosl_protocol.exceptions import ExitCode
from hosl_protocol.program.logs import JsonFormatter, TextFormatter, log_scope, note_place, sentence_line
from hosl_protocol.program.plain import plain
from hosl_protocol.wire.messages import FromEdge, Goodbye, Refusal

MODULE = """
import argparse, logging, sys
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.program.logs import log_scope, sentence_line
from hosl_protocol.program.terminal import add_common_options, run_command

def work(options):
    with log_scope(run="run-1"):
        logging.getLogger("work").info("it begins")
    print(sentence_line("pi", "it waits", "work"))
    with log_scope(run="run-1"):
        logging.getLogger("hosl.part").warning("%s is\\nlate", "pi", extra={"device": "pi"})
    raise SettingsError("rounds", 0, "use 1\\n\\x1bor more")

parser = argparse.ArgumentParser(prog="work")
add_common_options(parser)
sys.exit(run_command(parser, work))
"""


def record(message: str, *arguments: Any, **extra: Any) -> logging.LogRecord:
    return logging.getLogger("hosl.test").makeRecord(
        "hosl.test", logging.WARNING, __file__, 1, message, arguments, None, extra=extra
    )


def parsed(line: str) -> dict[str, Any]:
    assert "\n" not in line
    return json.loads(line)  # type: ignore[no-any-return]


def test_a_line_is_an_object_with_what_it_is_about() -> None:
    with log_scope(run="run-1"):
        note_place(round=3)
        line = parsed(JsonFormatter().format(record("%s is\nlate", "it", device="pi")))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "hosl.test",
        "message": "it is\nlate",
        "run": "run-1",
        "round": 3,
        "device": "pi",
    }
    assert "run" not in parsed(JsonFormatter().format(record("outside")))


def text(line: logging.LogRecord) -> str:
    return TextFormatter("tool", sys.stderr).format(line)


def test_a_text_line_says_its_level_and_what_it_is_about() -> None:
    with log_scope(run="run-1", device="pi"):
        assert text(record("late")).endswith("tool: warning run=run-1 device=pi: late")
    assert text(record("late")).endswith("tool: warning: late")


def test_a_line_for_who_looks_for_its_place_says_where_it_is_from() -> None:
    others = logging.makeLogRecord({"name": "asyncio", "levelno": logging.ERROR, "levelname": "ERROR", "msg": "lost"})
    assert text(others).endswith("tool: error asyncio: lost")
    ours = logging.makeLogRecord({"name": "hosl.x", "levelno": logging.DEBUG, "levelname": "DEBUG", "msg": "it is"})
    assert text(ours).endswith("tool: debug hosl.x: it is")


HOSTILE = "bye\r\n2026-01-01 hosl-cloud: run completed\x1b[2J\x1b]0;owned\x07\x9b1A\x7f\u202eevil\u2028next\udcff"
HARMLESS = r"bye 2026-01-01 hosl-cloud: run completed\x1b[2J\x1b]0;owned\x07\x9b1A\x7f\u202eevil next\udcff"


def test_what_others_say_forges_no_line_and_moves_no_cursor() -> None:
    assert plain(HOSTILE) == HARMLESS
    assert plain(HARMLESS) == HARMLESS
    said = "θ of tensor 'ä': 3 × 4  columns"
    assert plain(said) == said
    assert text(record("%s left: %s", "pi", HOSTILE)).endswith(f": pi left: {HARMLESS}")
    assert sentence_line("pi", HOSTILE, "work").endswith(f"pi: {HARMLESS}")
    for message in (Goodbye(reason=HOSTILE), Refusal(code="run", reason=HOSTILE, retry=True)):
        assert message.reason == HARMLESS
    heard = msgspec.json.decode(b'{"type":"goodbye","reason":"a\\u001b[2J\\nb"}', type=FromEdge)
    assert isinstance(heard, Goodbye)
    assert heard.reason == r"a\x1b[2J b"


def test_a_traceback_keeps_its_lines_and_shows_no_other() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        line = logging.getLogger("t").makeRecord("t", logging.ERROR, __file__, 1, "it failed", (), sys.exc_info())
    said = text(line)
    assert "\nTraceback (most recent call last):\n" in said
    assert all(each.isprintable() for each in said.replace("\n", ""))


def test_what_one_task_learns_of_a_place_its_siblings_say_too_and_strangers_do_not() -> None:
    def place() -> dict[str, Any]:
        line = parsed(JsonFormatter().format(record("here")))
        return {name: line[name] for name in ("run", "device") if name in line}

    async def connection(name: str) -> list[dict[str, Any]]:
        learnt = asyncio.Event()

        async def sibling() -> dict[str, Any]:
            await learnt.wait()
            return place()

        with log_scope():
            other = asyncio.create_task(sibling())
            note_place(device=name)
            learnt.set()
            thread = asyncio.get_running_loop().run_in_executor(None, contextvars.copy_context().run, place)
            with log_scope(run="run-1"):
                inner = place()
            return [await other, await thread, inner]

    async def both() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(connection("a"), connection("b"))

    for name, places in zip("ab", asyncio.run(both()), strict=True):
        assert places == [{"device": name}, {"device": name}, {"run": "run-1", "device": name}]
    note_place(device="c")
    assert place() == {}, "there is no scope here"


@pytest.mark.parametrize("is_traced", [False, True])
def test_a_command_says_logs_and_fails_in_json(tmp_path: Path, is_traced: bool) -> None:
    result = run_module(tmp_path, "--log-format", "json", *(["--debug"] if is_traced else []))
    assert result.returncode == ExitCode.SETTINGS
    said, (late, failed) = map(parsed, result.stdout.splitlines()), map(parsed, result.stderr.splitlines())
    begins, waits = said
    assert (begins["level"], begins["message"], begins["run"]) == ("info", "it begins", "run-1")
    assert (waits["level"], waits["message"], waits["device"]) == ("info", "it waits", "pi")
    assert (late["message"], late["device"]) == ("pi is\nlate", "pi")
    assert (failed["level"], failed["message"], failed["exit_code"]) == ("error", r"rounds is 0: use 1 \x1bor more", 3)
    assert ("Traceback" in failed.get("traceback", "")) == is_traced


def test_a_command_says_logs_and_fails_in_text(tmp_path: Path) -> None:
    result = run_module(tmp_path, JOURNAL_STREAM="8:1")
    assert result.stdout == "work: it begins\npi: it waits\n", "the journal has the time"
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(f"{time} work: it begins\n{time} pi: it waits\n", run_module(tmp_path).stdout)
    assert "work: warning run=run-1: pi is late\n" in result.stderr
    assert result.stderr.endswith("work: error: rounds is 0: use 1 \\x1bor more\n")


def run_module(folder: Path, *options: str, module: str = MODULE, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "work.py").write_text(module)
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    command = [sys.executable, "-m", "work", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


MARKED = """
import argparse, logging, sys
from hosl_protocol.program.logs import log_scope
from hosl_protocol.program.terminal import add_common_options, run_command

def work(options):
    say = logging.getLogger("work").info
    say("it begins")
    with log_scope(is_figure=True):
        say("round 3")
    with log_scope(is_result=True):
        say("it is done")
    say("it is here", extra={"is_result": True})
    logging.getLogger("hosl.part").warning("a thing is late")
    return 0

parser = argparse.ArgumentParser(prog="work")
add_common_options(parser)
sys.exit(run_command(parser, work))
"""


@pytest.mark.parametrize("format_", ["text", "json"])
def test_quiet_leaves_results_and_trouble(tmp_path: Path, format_: str) -> None:
    results = {}
    for options in ([], ["--quiet"]):
        done = run_module(tmp_path, "--log-format", format_, *options, module=MARKED)
        assert "a thing is late" in done.stderr
        results[bool(options)] = re.findall("it is [a-z]+|it begins|round 3", done.stdout)
    assert results[True] == ["it is done", "it is here"]
    assert results[False] == ["it begins", "round 3", "it is done", "it is here"]
