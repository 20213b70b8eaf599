"""The scripts that complete words in a shell, in a real bash."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from support import ROOT
from terminals import Terminal


def type_in_bash(folder: Path, program: str, keys: str, expected: str) -> str:
    """Type keys into a bash that has a program's script, until it shows what is expected."""
    (folder / program).write_text(
        f'#!/bin/sh\nexec {sys.executable} -m {program.replace("-", "_")} "$@"\n', encoding="utf-8"
    )
    (folder / program).chmod(0o755)
    (folder / "inputrc").write_text(
        "set enable-bracketed-paste off\nset bell-style none\nset show-all-if-ambiguous on\n"
    )
    (folder / "some-file.jsonl").touch()
    source = f"cd {folder}; PATH={folder}:$PATH; PS1=; source <({program} --completion bash); echo it is re''ady\n"
    with Terminal(["bash", "--norc", "--noprofile", "-i"], 200, TERM="dumb", INPUTRC=str(folder / "inputrc")) as bash:
        bash.press(source)
        bash.wait_for(lambda text: "it is ready" in text)
        bash.press(keys)
        bash.wait_for(lambda text: expected in text.rpartition("it is ready")[2], 10.0)
        return bash.text.rpartition("it is ready")[2]


@pytest.mark.parametrize(
    ("program", "keys", "expected"),
    [
        ("hosl-edge", "hosl-edge --tok\t", "--token-file"),
        ("hosl-edge", "hosl-edge pref\t", "preflight"),
        ("hosl-edge", "hosl-edge preflight --tok\t", "--token-file"),
        ("hosl-edge", "hosl-edge --data som\t", "some-file.jsonl"),
        ("hosl-edge", "hosl-edge --log-format j\t", "json"),
        ("hosl-cloud", "hosl-cloud che\t", "checkpoint"),
        ("hosl-cloud", "hosl-cloud device rev\t", "revoke"),
        ("hosl-cloud", "hosl-cloud serve --rank\t", "--rank-timeout-s"),
        ("hosl-export", "hosl-export --train lora\t", "lora-b"),
    ],
)
def test_bash_completes(tmp_path: Path, program: str, keys: str, expected: str) -> None:
    if program != "hosl-edge":
        pytest.importorskip("shtab", reason="the device does without it")
    assert expected in type_in_bash(tmp_path, program, keys, expected)


def test_the_devices_scripts_are_those_of_its_options() -> None:
    pytest.importorskip("shtab", reason="the device does without it")
    spec = importlib.util.spec_from_file_location("build_completion", ROOT / "build_completion.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for shell, script in module.scripts().items():
        assert (module.COMPLETION / shell).read_text(encoding="utf-8") == script, "make completion"
