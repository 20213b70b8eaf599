"""The service's bundles: added whole or not at all, listed with who needs them, and kept while a run needs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hosl_cloud.__main__ import main
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.store import Store
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.manifest import (
    load_manifest,
)
from hosl_protocol.run.tasks import Task

CONFIG = RunConfig(task=Task(name="text", kind="lm", template="{text}"))
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*command: str, code: int = 0) -> str:
        assert main(["bundle", *command, "--data-dir", str(tmp_path / "cloud")]) == code
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    return run


def test_a_bundle_is_added_listed_and_deleted(run: Run, bundle: Path, tmp_path: Path) -> None:
    assert "add one with: hosl-cloud bundle add PATH" in run("list")
    said = run("add", str(bundle))
    assert "hosl-cloud run start --bundle smollm --task PRESET" in said
    run("add", str(bundle), "--name", "other")
    kept = tmp_path / "cloud" / "bundles" / "smollm"
    assert load_manifest(kept) == load_manifest(bundle)
    assert (kept / "shard" / "shard.onnx").read_bytes() == (bundle / "shard" / "shard.onnx").read_bytes()
    assert sorted(path.name for path in kept.parent.iterdir()) == ["other", "smollm"]

    lines = run("list").splitlines()
    assert [line.split()[0] for line in lines] == ["other", "smollm"]
    assert "tiny, split 1 of 2, trains none" in lines[0]
    assert run("rm", "other") == "bundle other is deleted\n"
    assert [each["name"] for each in json.loads(run("list", "--json"))["bundles"]] == ["smollm"]


def test_a_bundle_stays_while_a_run_needs_it(run: Run, bundle: Path, tmp_path: Path) -> None:
    run("add", str(bundle))
    kept = tmp_path / "cloud" / "bundles" / "smollm"
    store = Store(tmp_path / "cloud" / "hosl.sqlite")
    store.create_run("tickets-1", kept.resolve(), load_manifest(kept).shard_digest, CONFIG)
    for state in ("pending", "running", "paused"):
        store.set_state("tickets-1", state)
        said = run("rm", "smollm", code=ExitCode.SETTINGS)
        assert "bundle smollm is needed by tickets-1: let it end, or stop it with hosl-cloud run stop" in said
    assert "needed by tickets-1" in run("list")
    store.set_state("tickets-1", "stopped")
    store.close()
    assert "to merge or resume tickets-1 it has to be there again" in run("rm", "smollm")
    assert not kept.exists()


def test_what_cannot_be_added_leaves_nothing_behind(run: Run, bundle: Path, tmp_path: Path) -> None:
    assert "no bundle at" in run("add", str(tmp_path / "absent"), code=ExitCode.BUNDLE)
    assert "--name is '../x'" in run("add", str(bundle), "--name", "../x", code=ExitCode.SETTINGS)
    assert "no bundle x is in" in run("rm", "x", code=ExitCode.SETTINGS)
    assert "NAME is '../x'" in run("rm", "../x", code=ExitCode.SETTINGS)
    (bundle / "tail" / "config.json").write_bytes(b"another")
    assert "is damaged" in run("add", str(bundle), code=ExitCode.BUNDLE)
    assert not (tmp_path / "cloud" / "bundles").exists()
    (bundle / "tail" / "config.json").write_bytes(b"tail/config.json")
    run("add", str(bundle))
    assert "there is a bundle smollm" in run("add", str(bundle), code=ExitCode.SETTINGS)
