"""What a person sees of each command at a real pseudo-terminal, and what is left with --quiet."""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hosl_cloud.__main__ import main as cloud_main
from hosl_protocol.exceptions import ExitCode
from processes import Program
from support import TASK, free_port, write_reviews
from terminals import Terminal

CONFIG = """
rounds = {rounds}
batch_size = 4
max_length = 16
[tail]
learning_rate = 3e-3
device = "cpu"
[devices]
start_with = 2
[evaluation]
every = {rounds}
"""
MakeBundle = Callable[..., Path]
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?[39][0-9]")


@contextlib.contextmanager
def command(folder: Path, module: str, *arguments: object, **variables: str) -> Iterator[Terminal]:
    """A command of ours in a terminal, forked from a process that has torch."""
    known = {"TERM": "xterm-256color", "NO_COLOR": "", **variables}

    def start(terminal: str) -> Program:
        return Program(module, *arguments, errors=folder / "errors", terminal=terminal, **known)

    with Terminal(start, 100) as terminal:
        assert isinstance(terminal.process, Program)
        with terminal.process.stdout:
            yield terminal


def configure(folder: Path, rounds: int) -> Path:
    path = folder / "run.toml"
    path.write_text(CONFIG.format(rounds=rounds) + TASK)
    return path


def simulation(bundle: Path, folder: Path, rounds: int) -> list[object]:
    train, held_out = write_reviews(folder / "train.jsonl", 20), write_reviews(folder / "eval.jsonl", 8, 400)
    data = ("--data", train, "--eval", held_out, "--devices", 2, "--threads", 1)
    return ["simulate", "--bundle", bundle, "--config", configure(folder, rounds), *data, "--data-dir", folder / "runs"]


def test_the_service_and_two_devices_in_one_terminal(make_bundle: MakeBundle, tmp_path: Path) -> None:
    rounds, port = 60, free_port()
    where = ("--data-dir", tmp_path / "cloud", "--port", port)
    first = ("--bundle", make_bundle("norm", 2), "--config", configure(tmp_path, rounds))
    with command(tmp_path, "hosl_cloud", "serve", *first, *where, "--once") as cloud:
        cloud.wait_for(lambda text: "waits for devices: 0 of 2 are there\n" in text and "join-token" in text)
        words = [sys.executable, "-m", "hosl_edge", "--server", f"ws://127.0.0.1:{port}", "--threads", 1]
        words += ["--token-file", tmp_path / "cloud" / "join-token", "--fields", "text,label"]
        words += ["--state-dir", tmp_path / "state", "--cache-dir", tmp_path / "cache"]
        words += [
            "--data",
            write_reviews(tmp_path / "train.jsonl", 20),
            "--eval",
            write_reviews(tmp_path / "eval.jsonl", 8),
        ]
        lines = [shlex.join([*map(str, words), "--name", name]) for name in ("one", "two")]
        with Terminal(["bash", "-c", f"{lines[0]} & {lines[1]} & wait"], 100) as devices:
            cloud.wait_for(lambda text: re.search(rf"\d+/{rounds}  loss \d.*  accuracy .* left  .* a round", text))
            assert devices.end() == 0
        assert cloud.end() == 0

    assert re.search(rf"(one|two): round \d+/{rounds}  loss \d\.\d+  own accuracy .* left", devices.raw)
    sentences = [line for line in devices.lines if line]
    assert [line for line in sentences if not re.match(r"(one|two): (joins run|run) ", line)] == []
    assert len(sentences) == 4, "each has joined, and has said the end"

    assert f"hosl-cloud: round {rounds}/{rounds}: loss " in cloud.text, "the last round's figures stay"
    assert f"round 10/{rounds}: " not in cloud.raw, "those before are drawn alone"
    assert [line for line in cloud.lines if line and not line.startswith("hosl-cloud: ")] == []
    assert COLOUR.search(cloud.raw)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_simulation_leaves_its_last_figures(
    make_bundle: MakeBundle, tmp_path: Path, number: signal.Signals
) -> None:
    words = simulation(make_bundle("norm", 2), tmp_path, 100000)
    with command(tmp_path, "hosl_cloud", *words, NO_COLOR="1") as terminal:
        terminal.wait_for(lambda text: re.search(r"\d+/100000  loss .* left", text))
        if number is signal.SIGINT:
            terminal.press("\x03")
        else:
            terminal.process.send_signal(number)
        assert terminal.end() == ExitCode.INTERRUPTED
    assert re.search(r"\d+/100000  loss .*", terminal.lines[-3])
    assert terminal.lines[-2:] == ["hosl-cloud: interrupted", ""]
    assert not COLOUR.search(terminal.raw)


def test_json_in_a_terminal_is_nothing_but_json(make_bundle: MakeBundle, tmp_path: Path) -> None:
    words = simulation(make_bundle("norm", 2), tmp_path, 3)
    with command(tmp_path, "hosl_cloud", *words, "--log-format", "json") as terminal:
        assert terminal.end() == 0
    assert [line for line in terminal.raw.split("\r\n") if line and not line.startswith('{"time": ')] == []


def test_quiet_leaves_the_result_of_a_simulation(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = simulation(make_bundle("norm", 2), tmp_path, 3)
    assert cloud_main([*map(str, words), "--quiet"]) == 0
    said = capsys.readouterr()
    assert re.fullmatch(r"[\d :-]+hosl-cloud: run \S+ completed at round 3; take it with: .*\n", said.out)
    assert said.err == ""


def test_an_export_shows_what_is_under_way_until_it_is_interrupted(tiny_model: Path, tmp_path: Path) -> None:
    words = ("--model", tiny_model, "--split", 2, "--train", "lora", "--max-length", 16, "--out", tmp_path / "bundle")
    with command(tmp_path, "hosl_export", *words, NO_COLOR="1") as terminal:
        terminal.wait_for(lambda text: re.search(r"\n. tracing the gradients \d+ s$", text))
        terminal.press("\x03")
        assert terminal.end(120.0) == ExitCode.INTERRUPTED
    steps = ["loading torch", "reading the configuration", "loading the weights", "computing reference outputs"]
    steps.append("tracing the client half")
    lines = [re.sub(r"\d+\.\d s$", "N s", line) for line in terminal.lines]
    ends = ["tracing the gradients: stopped after N s", "interrupted"]
    assert lines == [f"hosl-export: {line}" for line in [*(f"{step}: N s" for step in steps), *ends]] + [""]
    assert not COLOUR.search(terminal.raw)
    assert not (tmp_path / "bundle").exists()
