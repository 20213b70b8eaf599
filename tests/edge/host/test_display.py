"""What a device says of its run where nothing is drawn, and what its one line has where it is."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from hosl_edge.host import display as module
from hosl_edge.host.display import LARGE_BYTES, Display, Progress
from hosl_protocol.program.logs import configure_logs


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers = root.handlers[:]
    yield
    root.handlers = handlers
    configure_logs("hosl-edge", "warning", "text")
    root.handlers = handlers


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [re.sub(r"^[\d :-]+ ", "", line) for line in capsys.readouterr().err.splitlines()]


def test_a_download_is_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    alive: list[int] = []
    display = Display("pi", lambda: alive.append(1))
    size = 20 * LARGE_BYTES
    for done in range(LARGE_BYTES, size + 1, LARGE_BYTES):
        display.show_download("shard.safetensors", done, size)
    display.show_download("tokenizer.json", 5, 5)
    begun, ended = lines(capsys)
    assert begun == "pi: downloads shard.safetensors, 21.0 MB"
    assert re.fullmatch(r"pi: downloaded shard\.safetensors, 21\.0 MB in \d+ s", ended)
    assert len(alive) == 21, "each piece, of small files too, is a sign of life"


def test_a_download_that_goes_on_is_two_lines_again(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display("pi")
    for done in (1, 2, 2, 3):
        display.show_download("shard", done * LARGE_BYTES, 3 * LARGE_BYTES)
    display.show_download("shard", LARGE_BYTES, 3 * LARGE_BYTES)
    assert [line.split()[1] for line in lines(capsys)] == ["downloads", "downloaded", "downloads"]


def test_rounds_are_said_as_often_as_the_run_wants_and_not_all_the_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    display, progress = Display("pi"), Progress(run="run-1", rounds=100, report_every=5)
    for progress.round in range(1, 101):
        now[0] += 1.0
        display.show(progress)
    rounds = [int(line.split()[2].partition("/")[0]) for line in lines(capsys)]
    assert rounds == [5, *range(15, 101, 10)]


def test_quiet_leaves_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("hosl-edge", "warning", "text", quiet=True)
    display = Display("pi")
    display.say("joins run 7")
    display.show(Progress(run="7", rounds=1, round=1))
    display.say("cannot reach the cloud", matters=True)
    assert lines(capsys) == ["pi: cannot reach the cloud"]


def test_lines_of_the_log_are_the_devices_too(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    root.handlers = []
    configure_logs("hosl-edge", "warning", "text")
    Display("pi").say("joins run 7")
    logging.getLogger("hosl_edge.device").warning("a file is damaged")
    assert lines(capsys) == ["pi: joins run 7", "pi: warning: a file is damaged"]


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ("waiting for a run", "pi: waiting for a run"),
        ("training", "pi: round 7/100  loss 0.2500  own accuracy 75.0 %"),
        ("paused: 85 °C", "pi: paused: 85 °C"),
    ],
)
def test_the_line_says_what_the_agent_does(state: str, line: str) -> None:
    progress = Progress(state=state, run="7", rounds=100, round=7, loss=0.25, right=3, scored=4)
    assert Display("pi")._line(progress, 60) == line
    for columns in range(1, 120):
        assert len(Display("pi")._line(progress, columns)) <= columns


def test_the_time_left_is_there_while_rounds_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    display, progress = Display("pi"), Progress(state="training", run="7", rounds=100, loss=0.25)
    monkeypatch.setattr(display._pace, "_now", lambda: now[0])
    for progress.round in range(1, 11):
        now[0] += 2.0
        display.show(progress)
    assert "3 min 0 s left  2.00 s a round" in display._line(progress, 200)
    now[0] += 600.0
    assert "left" not in display._line(progress, 200)
