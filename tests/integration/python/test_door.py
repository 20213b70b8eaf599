"""`import hosl`: what it loads, and what it says where something is missing or wrong."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hosl
from hosl_cloud.__main__ import main as cloud_main
from hosl_protocol.program.installing import install_line
from support import write_reviews

MakeBundle = Callable[..., Path]

WITHOUT_EXTRAS = """
import sys
for name in ("torch", "transformers", "onnx", "onnxscript", "peft", "starlette", "uvicorn", "prometheus_client"):
    sys.modules[name] = None
"""


def run_python(code: str, *arguments: object) -> str:
    """What a program prints in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_the_import_loads_neither_torch_nor_a_service_and_leaves_the_log_alone() -> None:
    said = run_python("""
        import logging, sys
        import hosl
        heavy = {"torch", "transformers", "onnxruntime", "uvicorn", "PIL", "pandas"}
        print(sorted(heavy & set(sys.modules)), logging.getLogger().handlers, logging.getLogger("hosl").handlers)
    """)
    assert said == "[] [] []\n"


def test_a_device_without_torch_is_told_what_to_install(make_bundle: MakeBundle) -> None:
    code = """
import hosl
for call in (
    lambda: hosl.export("facebook/opt-125m", split=6),
    lambda: hosl.simulate(sys.argv[1], [{"text": "a", "label": 1}], task="reviews", max_length=16),
    lambda: hosl.serve(sys.argv[1], task="reviews", max_length=16),
):
    try:
        call()
    except hosl.MissingExtra as error:
        print(error)
print(hosl.Bundle(sys.argv[1]).split)
"""
    lines = run_python(WITHOUT_EXTRAS + code, make_bundle("norm", 2)).splitlines()
    needs = (("export", "export"), ("simulate", "cloud"), ("serve", "cloud"))
    for line, (function, extra) in zip(lines, needs, strict=False):
        assert re.fullmatch(rf"hosl\.{function} needs: {re.escape(install_line(extra))} \(\w+ is missing\)", line)
    assert lines[3:] == ["2"]


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        ("rounds=x", {"rounds": "x"}),
        ("rnds=3", {"rnds": 3}),
        ("tail.learnin_rate=1e-3", {"tail": {"learnin_rate": 1e-3}}),
        ("learning_rate=1e-3", {"learning_rate": 1e-3}),
        ("tail.learning_rate=-1", {"tail.learning_rate": -1}),
    ],
)
def test_a_wrong_setting_has_the_sentence_that_the_command_has(
    make_bundle: MakeBundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    given: dict[str, Any],
) -> None:
    bundle, data = make_bundle("norm", 2), write_reviews(tmp_path / "r.jsonl", 4)
    capsys.readouterr()
    options = ["--bundle", str(bundle), "--task", "reviews", "--data", str(data), "--set", setting]
    assert cloud_main(["simulate", *options, "--data-dir", str(tmp_path / "d")]) == 3
    sentence = capsys.readouterr().err.removeprefix("hosl-cloud: error: ").rstrip("\n")

    with pytest.raises(hosl.SettingsError) as raised:
        hosl.simulate(bundle, data, task="reviews", **given)
    assert str(raised.value).removeprefix("hosl.simulate: ") == sentence.removeprefix(f"--set {setting}: ")


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (None, "task is not given: name a preset (boolq, "),
        ("sst3", "task.preset is 'sst3': use one of boolq, "),
        ({"preset": "reviews", "labls": [0, 1]}, "hosl.simulate: no setting has the name labls; did you mean labels?"),
    ],
)
def test_a_wrong_task_is_named(make_bundle: MakeBundle, tmp_path: Path, task: Any, sentence: str) -> None:
    with pytest.raises(hosl.SettingsError) as raised:
        hosl.simulate(make_bundle("norm", 2), write_reviews(tmp_path / "r.jsonl", 4), task=task, max_length=16)
    assert str(raised.value).startswith(sentence)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(hosl.HoslError, match="manifest"):
        hosl.simulate(tmp_path, [], task="reviews")
