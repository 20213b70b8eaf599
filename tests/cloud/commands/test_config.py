"""Examples of run.toml work as they are printed, whatever they are for; and a wrong file is told from a right one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from hosl_cloud.__main__ import main
from hosl_cloud.settings import RunConfig, parse_config
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.manifest import ImageEntry, Manifest, TensorEntry
from hosl_protocol.run.tasks import TaskKind, preset_names
from support import ROOT

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*command: str, code: int = 0) -> str:
        assert main(["config", *command]) == code
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    return run


def manifest(*, image: bool = False) -> Manifest:
    picture = ImageEntry(channels=3, height=8, width=8, mean=(0.5,) * 3, std=(0.5,) * 3) if image else None
    names = {"model": "tiny", "family": "llama", "architecture": "Tiny"}
    sizes: dict[str, Any] = {"split": 1, "blocks": 2, "width": 4, "max_length": 512, "pad_token_id": 0}
    tensors = (TensorEntry(name="w", shape=(2, 4), trainable=True, exponent=-20),)
    return Manifest(**names, **sizes, train="norm", tensors=tensors, files=(), image=picture)


def parsed(text: str) -> RunConfig:
    """What a service makes of the text, with a bundle of its kind."""
    data = msgspec.toml.decode(text)
    is_image = "image" in text.partition("[task]")[2].partition("[tail]")[0] or "cifar" in text or "mnist" in text
    return parse_config(data, manifest(image=is_image))


@pytest.mark.parametrize("task", [None, *get_args(TaskKind), *preset_names()])
def test_every_example_works_as_it_is_printed(run: Run, task: str | None) -> None:
    text = run("--example", *([task] if task else []))
    config = parsed(text)
    assert task in (None, config.task.kind, config.task.name)
    assert ("max_length" in text) == (config.task.kind != "image-classification"), "an image is cut to no length"
    assert max(len(line) for line in text.splitlines() if "template" not in line) <= 120


@pytest.mark.parametrize("task", [*get_args(TaskKind), *preset_names()])
def test_what_an_example_has_behind_a_hash_can_be_taken_and_is_the_default(run: Run, task: str) -> None:
    text = run("--example", task)
    shown = re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE)
    assert shown.count("\n#") < text.count("\n#")
    assert parsed(shown) == parsed(text)


def test_an_example_takes_columns_and_labels_from_data(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "tickets.csv"
    rows = [f'{n},"parcel, {n} {word}",{word}' for n, word in enumerate(["technical", "billing", "delivery", "me"] * 3)]
    path.write_text("id,message,category\n" + "\n".join(rows) + "\n", encoding="utf-8")
    text = run("--example", "--data", str(path))
    task = parsed(text).task
    assert (task.template, task.label_field) == ("{message}", "category")
    assert task.labels == ("billing", "delivery", "me", "technical")
    assert "hosl-edge --fields message,category" in text

    task = parsed(run("--example", "prompt-classification", "--data", str(path))).task
    assert task.template == "{message}\nTopic:"
    assert task.verbalizers == (" billing", " delivery", " me", " technical")


def test_columns_without_telling_names_are_told_by_what_they_hold(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [{"a": n, "b": f"some words and {n}", "c": n % 3} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = parsed(run("--example", "--data", str(path))).task
    assert (task.template, task.label_field, task.labels) == ("{b}", "c", ("0", "1", "2"))
    path.write_text("".join(json.dumps({"a": n, "b": f"{n}"}) + "\n" for n in range(12)), encoding="utf-8")
    assert "no column of a, b holds labels" in run("--example", "--data", str(path), code=ExitCode.SETTINGS)


def test_a_few_made_up_lines_will_do(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "few.csv"
    path.write_text("\ufeffid;Text;Label\n1;a;x\n2;b;y\n3;c;z\n", encoding="utf-8")
    task = parsed(run("--example", "--data", str(path))).task
    assert (task.template, task.label_field, task.labels) == ("{Text}", "Label", ("x", "y", "z"))
    rows = [f"I paid {times} times,{'billing' if times % 2 else 'delivery'}\n" for times in range(6)]
    path.write_text("My parcel is lost,delivery\n" + "".join(rows), encoding="utf-8")
    said = run("--example", "--data", str(path), code=ExitCode.SETTINGS)
    assert "its first line should name the columns" in said
    assert "parcel" not in said


def test_the_presets_are_listed_as_the_page_lists_them(run: Run) -> None:
    listed = json.loads(run("--list-presets", "--json"))["presets"]
    page = (ROOT / "cloud" / "run-toml.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| `([\w-]+)` \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert [each["preset"] for each in listed] == [preset for preset, *_ in rows] == preset_names()
    for each, (_, kind, fields, _) in zip(listed, rows, strict=True):
        assert (each["kind"], each["fields"]) == (kind, re.findall(r"`(.*?)`", fields))
    text = run("--list-presets")
    assert all(each["preset"] in text and ", ".join(each["fields"]) in text for each in listed)


def test_a_file_is_checked(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(run("--example"), encoding="utf-8")
    said = run("--check", str(path))
    assert "can be used: 200 rounds of ho-sfl, task own (sequence-classification)" in said
    assert "devices need: --fields text,label" in said
    path.write_text(path.read_text(encoding="utf-8").replace("rounds", "round"), encoding="utf-8")
    assert "no setting has the name round; did you mean rounds?" in run("--check", str(path), code=ExitCode.SETTINGS)
    path.write_text('[task]\nkind = "lm"\ntemplate = "no field"\n', encoding="utf-8")
    assert "task.template" in run("--check", str(path), code=ExitCode.SETTINGS)


def test_a_name_of_no_task_lists_those_that_there_are(run: Run) -> None:
    said = run("--example", "sst", code=ExitCode.SETTINGS)
    assert "--example is 'sst': use one of boolq, cb" in said
    assert "sequence-classification" in said
