"""What a person sees of runs at a terminal of any width."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from hosl_cloud.commands.display import RunsDisplay
from hosl_cloud.runs.progress import Evaluated, Evaluates, Over, RoundBegins, RoundDone, Waits
from hosl_cloud.storage.records import Evaluation
from hosl_export.steps import Painter
from hosl_protocol.program import pace


@dataclass
class Screen:
    """A display that a terminal of any width may ask for its lines."""

    display: RunsDisplay

    def lines(self, columns: int) -> list[str]:
        return self.display._lines(Painter(), columns)

    def train(self, run: str, first: int, last: int, rounds: int) -> None:
        for round_ in range(first, last + 1):
            self.display.hear(RoundBegins(run, round_, rounds))
            self.display.hear(RoundDone(run, round_, rounds, 1.0 / round_, 2.0, 3, 1000))


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, by which each round takes 2 s."""
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(pace.Pace.__init__, "__defaults__", (tick,))
    return clock


@pytest.fixture
def screen(now: list[float], monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("NO_COLOR", "1")
    display = RunsDisplay()
    display.note_loaded()
    return Screen(display)


def test_without_a_run_nothing_is_drawn(screen: Screen) -> None:
    assert screen.lines(80) == []
    assert re.fullmatch(r"loads everything  \d+ s", Screen(RunsDisplay()).lines(80)[0])


def test_a_run_is_drawn_from_its_wait_to_its_end(screen: Screen) -> None:
    hear = screen.display.hear
    hear(Waits("run-1", 1, 2))
    assert screen.lines(80) == ["waits for devices: 1 of 2 are there"]
    hear(Evaluates("run-1", 0))
    assert screen.lines(80) == ["evaluates"]
    hear(Evaluated("run-1", Evaluation(round=0, loss=1.0, correct=3, scored=4)))
    screen.train("run-1", 1, 4, 10)
    (line,) = screen.lines(100)
    assert re.search(r"  4/10  loss 0\.2500  accuracy 75\.0 %  \d+ s left  \S+ s a round  3 devices$", line)
    hear(Waits("run-1", 0, 2))
    (line,) = screen.lines(100)
    assert line.endswith("waits for devices: 0 of 2 are there")
    assert "left" not in line, "it is not known while no round runs"
    hear(Over("run-1", 4, "stopped"))
    assert screen.lines(80) == []


def test_runs_side_by_side_have_a_line_each_with_their_names(screen: Screen) -> None:
    screen.train("first", 1, 3, 10)
    screen.train("second", 1, 5, 2000)
    lines = screen.lines(100)
    assert [line.split()[0] for line in lines] == ["first", "second"]
    assert len({re.search("loss", line).start() for line in lines}) == 1, "the columns are aligned"  # type: ignore[union-attr]


@pytest.mark.parametrize("columns", [1, 5, 10, 20, 39, 50, 79, 119, 300])
def test_no_line_is_wider_than_the_terminal_and_what_matters_most_stays(screen: Screen, columns: int) -> None:
    screen.train("first", 1, 3, 10)
    screen.train("second", 1, 5, 2000)
    lines = screen.lines(columns)
    assert len(lines) == 2
    assert max(map(len, lines)) <= columns
    if columns > 39:
        assert "3/10" in lines[0]
