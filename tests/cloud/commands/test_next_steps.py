"""What a command says to type next can be typed."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from hosl_cloud.__main__ import _parser
from hosl_cloud.commands.serve import _how_to_begin, _serve_again


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--host 0.0.0.0",
        "--host 0.0.0.0 --port 9000 --insecure",
        "--tls-cert 'a b.pem' --tls-key key.pem",
    ],
)
def test_the_service_is_started_again_where_it_listened(words: str, tmp_path: Path) -> None:
    where = ["--data-dir", str(tmp_path / "da ta")]
    run = ["--bundle", "bundle", "--task", "sst2", "--set", "rounds=3", "--once"]
    options = _parser().parse_args(["serve", *shlex.split(words), *run, *where])
    assert shlex.split(_serve_again(options)) == ["hosl-cloud", "serve", *shlex.split(words), *where]


def test_a_service_without_bundles_says_how_to_add_one(tmp_path: Path, bundle: Path) -> None:
    data = f"--data-dir {tmp_path}"
    start = f"hosl-cloud run start --bundle NAME --task PRESET {data}"
    folder = tmp_path / "bundles"
    folder.mkdir()
    assert _how_to_begin(folder, tmp_path) == f"hosl-cloud bundle add PATH --name NAME {data} && {start}"
    for command in _how_to_begin(folder, tmp_path).split(" && "):
        _parser().parse_args(shlex.split(command)[1:])
    shutil.copytree(bundle, folder / "smollm")
    assert _how_to_begin(folder, tmp_path) == start
