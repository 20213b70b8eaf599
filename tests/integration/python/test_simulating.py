"""A simulation from Python: followed, left, interrupted, merged; in a thread with an event loop and without one."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import hosl
from hosl_cloud.__main__ import main as cloud_main
from hosl_cloud.runs.coordinator import Coordinator
from hosl_cloud.runs.curves.tensorboard import TensorBoardWriter
from support import TASK, count_right, write_reviews

MakeBundle = Callable[..., Path]

REVIEWS: dict[str, Any] = msgspec.toml.decode(TASK)["task"]
SETTINGS: dict[str, Any] = {
    "task": REVIEWS,
    "seed": 9,
    "batch_size": 4,
    "max_length": 16,
    "threads": 1,
    "tail": {"learning_rate": 3e-3, "device": "cpu"},
    "evaluation": {"every": 2},
}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def reviews(tmp_path: Path) -> list[dict[str, Any]]:
    return read(write_reviews(tmp_path / "train.jsonl", 40))


@pytest.fixture
def held_out(tmp_path: Path) -> list[dict[str, Any]]:
    return read(write_reviews(tmp_path / "eval.jsonl", 20, 400))


Examples = list[dict[str, Any]]


def test_a_run_is_that_of_the_command(
    make_bundle: MakeBundle, tmp_path: Path, reviews: Examples, held_out: Examples, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle("norm", 2)
    run = hosl.simulate(bundle, reviews, eval=held_out, rounds=5, devices=3, **SETTINGS)
    rounds = list(run)

    (tmp_path / "run.toml").write_text(TASK, encoding="utf-8")
    options = ["--bundle", bundle, "--config", tmp_path / "run.toml", "--data-dir", tmp_path / "d", "--json"]
    options += ["--data", tmp_path / "train.jsonl", "--eval", tmp_path / "eval.jsonl", "--devices", 3, "--threads", 1]
    settings = ("seed=9", "batch_size=4", "max_length=16", "tail.learning_rate=3e-3", "evaluation.every=2", "rounds=5")
    options += [part for setting in settings for part in ("--set", setting)]
    capsys.readouterr()
    assert cloud_main(["simulate", *map(str, options)]) == 0
    summary = json.loads(capsys.readouterr().out)

    assert [each.number for each in rounds] == [1, 2, 3, 4, 5] == [each.number for each in run.rounds]
    assert {(each.of, each.devices) for each in rounds} == {(5, 3)}
    assert rounds[-1].loss == summary["loss"]
    assert sum(each.bytes for each in rounds) == summary["wire_bytes"]
    assert [each.evaluation is not None for each in rounds] == [False, True, False, True, True]
    assert [each.round for each in run.evaluations] == [0, 2, 4, 5]
    last = run.evaluations[-1]
    assert (last, last.loss) == (rounds[-1].evaluation, summary["final_eval_loss"])
    assert (last.scored, last.accuracy, len(last.classes)) == (20, last.right / 20, 2)
    assert (last.examples, last.of_examples) == (20, 20)
    assert f"({last.right} of 20 right), loss" in str(last)
    part = dataclasses.replace(last, of_examples=50, perplexity=12.5)
    assert f"({last.right} of 20 right, only 20 of 50 examples scored), loss" in str(part)
    assert str(part).endswith(", perplexity 12.5")
    assert (run.state, run.settings.rounds) == ("completed", 5)


def test_the_merged_model_answers_as_the_run_did_and_transformers_loads_it(
    make_bundle: MakeBundle,
    tmp_path: Path,
    reviews: Examples,
    held_out: Examples,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data_dir = tmp_path / "data"
    run = hosl.simulate(make_bundle("norm", 2), reviews, eval=held_out, rounds=4, data_dir=data_dir, **SETTINGS)
    trained = run.model()  # nobody went through it: it trains to the end first
    assert run.state == "completed"
    best = max(run.evaluations, key=lambda each: (each.accuracy, -each.loss))
    right = sum(trained.classify(example) == str(example["label"]) for example in held_out)
    assert right == best.right

    out = run.merge(tmp_path / "merged")
    assert out == tmp_path / "merged"
    assert count_right(out, [tmp_path / "eval.jsonl"]) == (best.right, 20)
    model, tokenizer = trained
    assert (type(model).__name__, tokenizer.truncation_side) == ("LlamaForCausalLM", "left")
    with pytest.raises(hosl.SettingsError, match=r"example is .*: it lacks the field 'text'; it has 'txt'"):
        trained.classify({"txt": "a"})

    # The command asks the same model, from arguments and from lines of standard input.
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{each['text']}\n\n" for each in held_out)))
    assert cloud_main(["try", "latest", "-", "--json", "--data-dir", str(data_dir)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == [each["text"] for each in held_out]
    assert [line["likelihoods"] for line in lines] == [trained.likelihoods(each) for each in held_out]
    assert cloud_main(["try", "latest", json.dumps(held_out[0]), "--data-dir", str(data_dir)]) == 0
    assert re.fullmatch(r"\w+ \d+\.\d %, \w+ \d+\.\d %\n", capsys.readouterr().out)


def test_a_run_that_fails_closes_its_curves(
    make_bundle: MakeBundle, reviews: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []
    close = TensorBoardWriter.close
    monkeypatch.setattr(TensorBoardWriter, "close", lambda writer: (close(writer), closed.append(1))[0])
    train = Coordinator._train_round

    async def fail_later(coordinator: Coordinator) -> bool:
        return bool(coordinator.run.round and 1 / 0) or await train(coordinator)

    monkeypatch.setattr(Coordinator, "_train_round", fail_later)
    run = hosl.simulate(make_bundle("norm", 2), reviews, rounds=9, **SETTINGS)
    with pytest.raises(ZeroDivisionError):
        run.wait()
    assert run.state == "failed"
    deadline = time.monotonic() + 20
    while not closed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert closed, "the file of TensorBoard is still open"


def test_a_callback_hears_of_every_round_and_scores_come_with_theirs(
    make_bundle: MakeBundle, reviews: Examples, held_out: Examples
) -> None:
    heard: list[hosl.Round] = []
    run = hosl.simulate(make_bundle("norm", 2), reviews, eval=held_out, rounds=3, callback=heard.append, **SETTINGS)
    assert run.state == "completed"
    assert heard == run.rounds
    assert str(heard[1]).startswith("round 2 of 3: loss ")
    assert f"({heard[1].evaluation.right} of 20 right)" in str(heard[1])  # type: ignore[union-attr]


def test_an_error_of_a_callback_ends_the_run(
    make_bundle: MakeBundle, tmp_path: Path, reviews: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with pytest.raises(ZeroDivisionError) as raised:
        hosl.simulate(
            make_bundle("norm", 2), reviews, rounds=1000, callback=lambda each: 1 / (3 - each.number), **SETTINGS
        )
    assert not [thread for thread in threading.enumerate() if thread.name == "hosl run"], f"while {raised} is held"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_program_may_end_while_its_run_waits(make_bundle: MakeBundle) -> None:
    code = """
import json, os, sys, hosl
given = json.loads(sys.argv[2])
run = hosl.simulate(sys.argv[1], [{"text": "the film", "label": k} for k in (0, 1)], rounds=1000, **given)
rounds = iter(run)
print(next(rounds).number, run.data_dir)
"""
    command = [sys.executable, "-c", code, str(make_bundle("norm", 2)), json.dumps(SETTINGS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    number, folder = done.stdout.split()
    assert number == "1"
    assert not Path(folder).parent.exists()


def test_a_loop_that_is_left_stops_the_run_at_the_round_that_was_seen(
    make_bundle: MakeBundle, reviews: Examples
) -> None:
    run = hosl.simulate(make_bundle("norm", 2), reviews, rounds=1000, **SETTINGS)
    for each in run:
        if each.number == 3:
            break
    assert (run.state, len(run.rounds)) == ("stopped", 3)
    assert list(run) == run.rounds, "what was made can be gone through again"
    assert (run.merge() / "model.safetensors").exists()


def test_a_run_that_nobody_goes_through_makes_no_round(make_bundle: MakeBundle, reviews: Examples) -> None:
    run = hosl.simulate(make_bundle("norm", 2), reviews, rounds=1000, **SETTINGS)
    time.sleep(0.3)
    assert (run.rounds, run.state) == ([], "running")
    threads = {thread for thread in threading.enumerate() if thread.name == "hosl run"}
    folder = run.data_dir
    assert folder.exists()
    del run
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)
    assert not folder.parent.exists()


def test_ctrl_c_stops_the_run_in_order(make_bundle: MakeBundle, tmp_path: Path, reviews: Examples) -> None:
    run = hosl.simulate(make_bundle("norm", 2), reviews, rounds=10**6, data_dir=tmp_path / "d", **SETTINGS)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run.wait()
    assert run.state == "stopped"
    made = len(run.rounds)
    assert made > 0
    assert (run.merge(tmp_path / "merged", checkpoint="last") / "model.safetensors").exists()


def test_it_works_where_an_event_loop_runs(
    make_bundle: MakeBundle, tmp_path: Path, reviews: Examples, held_out: Examples
) -> None:
    async def cell() -> hosl.Run:
        run = hosl.simulate(make_bundle("norm", 2), reviews, eval=held_out, rounds=2, **SETTINGS)
        assert [each.number for each in run] == [1, 2]
        run.merge(tmp_path / "merged")
        return run

    assert asyncio.run(cell()).state == "completed"
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_data_folder_that_is_given_stays_and_the_commands_know_it(
    make_bundle: MakeBundle, tmp_path: Path, reviews: Examples, capsys: pytest.CaptureFixture[str]
) -> None:
    with hosl.simulate(make_bundle("norm", 2), reviews, rounds=2, data_dir=tmp_path / "d", **SETTINGS) as run:
        list(run)
    id_ = run.id
    run.close()
    del run
    options = [id_, "--data-dir", str(tmp_path / "d"), "--out", str(tmp_path / "merged")]
    capsys.readouterr()
    assert cloud_main(["merge", *options]) == 0
    assert f"run {id_} at round 2" in capsys.readouterr().out


def test_a_block_that_is_left_by_an_error_stops_the_run(make_bundle: MakeBundle, reviews: Examples) -> None:
    run = hosl.simulate(make_bundle("norm", 2), reviews, rounds=1000, **SETTINGS)

    def fail_in_round_2() -> None:
        with run:
            for each in run:
                1 / (2 - each.number)

    with pytest.raises(ZeroDivisionError):
        fail_in_round_2()
    assert (run.state, len(run.rounds)) == ("stopped", 2)


def test_what_ends_a_run_is_raised_where_it_is_followed(make_bundle: MakeBundle, reviews: Examples) -> None:
    client = {"optimizer": "sgd", "learning_rate": 1e9}
    run = hosl.simulate(make_bundle("lora", 2), reviews, rounds=1000, client=client, **SETTINGS)
    with pytest.raises(hosl.HoslError, match=r"lower client\.learning_rate"):
        list(run)
    assert run.state == "failed"


def test_settings_may_come_from_a_file_and_go_over_it(
    make_bundle: MakeBundle, tmp_path: Path, reviews: Examples
) -> None:
    (tmp_path / "run.toml").write_text(f'rounds = 7\nname = "mine"\nmax_length = 16\n{TASK}', encoding="utf-8")
    more: dict[str, Any] = {"tail.learning_rate": 2e-3}
    run = hosl.simulate(
        make_bundle("norm", 2), reviews, config=tmp_path / "run.toml", rounds=1, task={"labels": [0, 1]}, **more
    )
    run.wait()
    settings = run.settings
    assert (settings.rounds, settings.name, settings.tail.learning_rate) == (1, "mine", 2e-3)
    assert (settings.task.labels, settings.task.template) == (("0", "1"), "{text} it was")


def test_a_notebook_gets_a_table_and_pandas_a_frame(
    make_bundle: MakeBundle, reviews: Examples, held_out: Examples
) -> None:
    run = hosl.simulate(make_bundle("norm", 2), reviews, eval=held_out, rounds=2, **SETTINGS).wait()
    table = run._repr_html_()
    assert table.count("<tr>") == 3
    assert f"{run.evaluations[-1].right} of 20" in table
    frame = run.to_frame()
    assert list(frame["round"]) == [0, 1, 2]
    assert frame["accuracy"].notna().tolist() == [True, False, True]
    assert frame["loss"].iloc[-1] == run.rounds[-1].loss
