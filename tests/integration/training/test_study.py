"""The study's driver with a tiny model: it tunes on training data, runs what is missing, and reports."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from processes import Program
from support import ROOT, write_reviews

STUDY = ROOT / "examples" / "study"
SETTINGS = """
title = "A tiny study"
model = "{model}"
splits = [2]
seeds = [5]
max_length = 16

[run]
rounds = 3
batch_size = 4
max_length = 16
evaluation = {{ every = 0, start = false }}
client.learning_rate = 1e-3
tail.device = "cpu"

[tune]
budget = 2
holdout = 8
run.rounds = 2

[tasks.words]
train = "train.jsonl"
validation = "held-out.jsonl"
shift = "upper"
[tasks.words.run.task]
kind = "prompt-classification"
name = "words"
template = "{{text}} it was"
labels = ["0", "1"]
verbalizers = ["bad", "good"]

[methods.frozen]
train = "norm:1"
run.algorithm = "frozen"

[methods."HO-SFL, norms"]
train = "norm:1"
run.directions = 2
tune."client.learning_rate" = [1e-3, 1e9]
"""

FROZEN = 'run.algorithm = "frozen"\ntune."tail.learning_rate" = {}'


def study(folder: Path, *options: str) -> str:
    """What the driver prints."""
    command = [sys.executable, STUDY / "study.py", *places(folder), "--jobs", "1", *options]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def measure(script: str, folder: Path, *options: str) -> None:
    """Run a script of the study that itself uses torch."""
    program = Program(STUDY / script, *places(folder), *options, errors=folder / "errors")
    program.communicate()
    assert program.returncode == 0, (folder / "errors").read_text(encoding="utf-8")


def places(folder: Path) -> list[str]:
    """What every script is told."""
    own = ["--work", str(folder / "work"), "--results", str(folder / "results")]
    return [str(folder / "tiny.toml"), "--data", str(folder), *own]


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first script that needs it has exported."""
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, bundles: Path) -> Path:
    """Settings and data."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "bundles").symlink_to(bundles)
    write_reviews(tmp_path / "train.jsonl", 24)
    write_reviews(tmp_path / "held-out.jsonl", 10, 400)
    (tmp_path / "tiny.toml").write_text(SETTINGS.format(model=tiny_model), encoding="utf-8")
    return tmp_path


def test_a_study_tunes_runs_and_reports_and_runs_nothing_twice(folder: Path) -> None:
    assert "tiny: 2 runs, 2 to do\n" in study(folder)
    results = folder / "results"
    tried = read_table(results / "tiny-tuning.csv")
    # A rate of 1e9 leaves the lattice: the failure is on record, and not chosen.
    assert [(row["candidate"], row["chosen"], bool(row["error"])) for row in tried] == [
        ('{"client.learning_rate": 0.001}', "yes", False),
        ('{"client.learning_rate": 1000000000.0}', "", True),
    ]
    rows = read_table(results / "tiny.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [("frozen", "5"), ("HO-SFL, norms", "5")]
    assert all(0.0 <= float(row["final_accuracy"]) <= 1.0 and row["rounds"] == "3" for row in rows)
    assert (results / "tiny-accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (results / "tiny-curves.png").read_bytes().startswith(b"\x89PNG")
    page = (results / "tiny.md").read_text(encoding="utf-8")
    assert "# A tiny study" in page
    assert "| HO-SFL, norms | 64 |" in page

    again = study(folder)
    assert "tiny: 2 runs, 0 to do\n" in again
    assert (results / "tiny.md").read_text(encoding="utf-8") == page


def test_a_control_without_a_rate_that_others_may_have_is_named(folder: Path) -> None:
    settings = folder / "tiny.toml"
    warning = "the tail of frozen never learns at 0.001, others' may"
    assert warning not in study(folder, "--report")

    rates = 'tune."client.learning_rate" = [1e-3]\ntune."tail.learning_rate" = [1e-4, 1e-3]'
    text = settings.read_text(encoding="utf-8").replace('tune."client.learning_rate" = [1e-3, 1e9]', rates)
    settings.write_text(text.replace('run.algorithm = "frozen"', FROZEN.format("[1e-4, 3e-4]")), encoding="utf-8")
    assert warning in study(folder, "--report")

    settings.write_text(text.replace('run.algorithm = "frozen"', FROZEN.format("[1e-4, 1e-3]")), encoding="utf-8")
    assert warning not in study(folder, "--report")


def test_estimates_have_the_cosine_that_their_dimension_allows(folder: Path) -> None:
    measure("estimator.py", folder, "--batch", "8", "--directions", "32")
    measured = read_table(folder / "results" / "tiny-estimator.csv")
    assert [row["directions"] for row in measured] == ["1", "2", "8", "32"]
    assert all(float(row["correlation"]) > 0.99 for row in measured)
    assert float(measured[2]["cosine"]) == pytest.approx(float(measured[2]["limit"]), rel=0.3)

    measure("shapes.py", folder, "--tasks", "words", "--train", "norm:1", "--batch", "4")
    cosines = {
        (row["shape"], row["directions"]): float(row["cosine"])
        for row in read_table(folder / "results" / "tiny-shapes.csv")
    }
    assert cosines["even", "8"] == pytest.approx((8 / (64 + 7)) ** 0.5, rel=0.15)
    assert cosines["even", "32"] == pytest.approx((32 / (64 + 31)) ** 0.5, rel=0.15)
    assert cosines["number, own", "8"] > cosines["even", "8"]


def test_the_shipped_settings_can_be_read() -> None:
    script = """
import json, pathlib, plan
paths = pathlib.Path("settings").glob("*.toml")
print(json.dumps({path.stem: len(plan.study_cells(plan.read_study(path), {})) for path in paths}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=STUDY, check=True, text=True, capture_output=True)
    counts = json.loads(done.stdout)
    assert {"smollm2", "shift-images", "fleet", "dimension", "hosl-opt-125m", "ho-sfl-opt-125m"} <= set(counts)
    assert all(counts.values())
