"""What is drawn in place at a real pseudo-terminal, and the lines that stay above it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hosl_protocol.exceptions import ExitCode
from hosl_protocol.program.live import INTERVAL_S, fitting
from terminals import Terminal, python, show

SCRIPT = """
import argparse, logging, sys, time
from hosl_protocol.program.live import can_draw, drawn
from hosl_protocol.program.logs import log_scope
from hosl_protocol.program.terminal import add_common_options, run_command, terminable

count = 0

def lines(columns):
    return [f"count {count} ".ljust(columns, "."), "below"][: 1 + (count > 3)]

def work(options):
    global count
    say = logging.getLogger("work").info
    if not can_draw(sys.stderr, sys.stdout):
        say("nothing is drawn")
        return 0
    with drawn(lines):
        say("it begins")
        for count in range(STEPS):
            time.sleep(0.05)
            if count % 10 == 5:
                say(f"step {count}")
                logging.getLogger("hosl.part").warning("late in %d", count)
                with log_scope(is_figure=True):
                    say("a figure that is drawn")
    say("it is done")
    return 0

parser = argparse.ArgumentParser(prog="work")
add_common_options(parser)
with terminable():
    sys.exit(run_command(parser, work))
"""


def script(folder: Path, steps: int = 20) -> list[str]:
    return python(folder, SCRIPT.replace("STEPS", str(steps)))


def test_what_is_drawn_goes_and_the_lines_stay(tmp_path: Path) -> None:
    with Terminal(script(tmp_path)) as terminal:
        terminal.wait_for(lambda text: re.search(r"count \d+ \.+$", text))
        assert max(map(len, terminal.lines)) == 79, "one column is left free"
        terminal.wait_for(lambda text: text.endswith(".\nbelow"))
        assert terminal.end() == 0
        kept = ["it begins", "step 5", "late in 5", "step 15", "late in 15", "it is done"]
        assert [re.sub(r"^work: (warning: )?", "", line) for line in terminal.lines] == [*kept, ""]
        assert "a figure" not in terminal.raw
        assert "\x1b[?25l" not in terminal.raw, "the cursor is never hidden"


def test_nothing_of_it_is_left_to_what_is_printed_next(tmp_path: Path) -> None:
    code = "import time; from hosl_protocol.program.live import drawn\nwith drawn(lambda columns: ['x' * 9]):\n"
    with Terminal(python(tmp_path, f"{code}    time.sleep(0.5)\nprint('it is')")) as terminal:
        assert terminal.end() == 0
        assert "x" * 9 in terminal.raw
        assert terminal.lines == ["it is", ""]


def test_it_is_drawn_four_times_a_second_at_most(tmp_path: Path) -> None:
    with Terminal(script(tmp_path, 40)) as terminal:
        assert terminal.end() == 0
        drawings = re.findall(r"\r\x1b\[Jcount", terminal.raw)
    assert INTERVAL_S == 0.25
    assert 4 <= len(drawings) <= 40 * 0.05 / INTERVAL_S + 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_the_screen_in_order(tmp_path: Path, number: signal.Signals) -> None:
    with Terminal(script(tmp_path, 1000)) as terminal:
        terminal.wait_for(lambda text: "step 5" in text and "below" in text)
        if number is signal.SIGINT:
            terminal.press("\x03")
        else:
            terminal.process.send_signal(number)
        assert terminal.end() == ExitCode.INTERRUPTED
        assert terminal.lines[-2:] == ["work: interrupted", ""]
        assert "count" not in terminal.text
        assert "below" not in terminal.text


def test_a_terminal_that_becomes_narrow_is_drawn_in_its_width(tmp_path: Path) -> None:
    with Terminal(script(tmp_path, 1000), columns=120) as terminal:
        terminal.wait_for(lambda text: max(map(len, text.splitlines()), default=0) == 119)
        terminal.resize(30)
        terminal.wait_for(lambda text: max(map(len, text.splitlines()[-2:])) == 29)
        # So that rows into which a terminal has broken what was drawn are below the cursor, where all is erased.
        ends = [drawing[-6:] for drawing in re.findall(r"\r\x1b\[Jcount[^\n]*\n?[^\n]*?(?=\r\x1b\[J)", terminal.raw)]
        assert ends
        assert all(end.endswith(("\r", "\r\x1b[1A")) for end in ends), "the cursor rests at the start"


@pytest.mark.parametrize("kind", ["dumb", ""])
def test_a_terminal_that_moves_no_cursor_gets_lines(tmp_path: Path, kind: str) -> None:
    with Terminal(script(tmp_path), TERM=kind) as terminal:
        assert terminal.end() == 0
        assert terminal.raw == "work: nothing is drawn\r\n"


def test_in_a_pipe_there_are_lines_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(script(tmp_path), capture_output=True, text=True, check=True, timeout=60)
    assert re.fullmatch(r"[\d :-]+ work: nothing is drawn\n", done.stdout)
    assert done.stderr == ""


def test_in_the_background_nothing_is_drawn(tmp_path: Path) -> None:
    """The shell, with its job control, has the foreground."""
    command = " ".join(script(tmp_path))
    with Terminal(["bash", "-c", f"set -m; {command} & wait"]) as terminal:
        assert terminal.end() == 0
        assert "work: nothing is drawn" in terminal.text


def test_two_programs_at_one_terminal_write_whole_lines(tmp_path: Path) -> None:
    command = " ".join(script(tmp_path, 60))
    with Terminal(["bash", "-c", f"{command} & {command} & wait"]) as terminal:
        assert terminal.end() == 0
        line = r"work: (it begins|step \d+|warning: late in \d+|it is done)"
        assert [text for text in terminal.lines if text and not re.fullmatch(line, text)] == []
        assert sum("step" in text for text in terminal.lines) == 12, "none is lost"


def test_a_line_is_written_at_once() -> None:
    """In one call to the system: what others write may come before or after it, never between."""
    reading, writing = os.pipe2(os.O_DIRECT)  # keeps writes apart
    code = "import sys; from hosl_protocol.program.live import write_line; write_line(sys.stderr, 'x' * 300)"
    subprocess.run([sys.executable, "-c", code], stderr=writing, check=True, timeout=60)
    assert os.read(reading, 4096) == b"x" * 300 + b"\n"
    os.close(reading)
    os.close(writing)


def test_what_fits_is_shown_in_its_order() -> None:
    parts = ["round 3/10", "loss 0.5", "1 min left"]
    assert fitting(parts, 80) == "round 3/10  loss 0.5  1 min left"
    assert fitting(parts, 21) == "round 3/10  loss 0.5"
    assert fitting(parts, 5) == "round"


def test_the_screen_of_these_tests_shows_what_a_terminal_shows() -> None:
    assert show("one\r\ntwo\r\n") == ["one", "two", ""]
    assert show("12345\rab") == ["ab345"]
    assert show("12345\r\x1b[Jab") == ["ab"]
    assert show("1\r\n2\r\n3\r\x1b[2A\x1b[Jx") == ["x"]
    with pytest.raises(AssertionError):
        show("\x1b[?25l")
    assert os.name == "posix"
