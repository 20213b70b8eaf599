"""Where there is nothing to merge, `merge` says why and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from hosl_cloud.__main__ import main
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.store import Store
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.manifest import load_manifest
from hosl_protocol.run.tasks import Task


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("running", "the run has made none yet"),
        ("stopped", "the run stopped at round 0, before its first one; go on with it: hosl-cloud run resume tickets"),
        ("failed", "the run failed at round 0, before its first one; go on with it: hosl-cloud run resume tickets"),
    ],
)
def test_a_run_without_a_checkpoint_says_how_it_goes_on(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], state: str, sentence: str
) -> None:
    store = Store(tmp_path / "hosl.sqlite")
    config = RunConfig(task=Task(name="text", kind="lm", template="{text}"))
    store.create_run("tickets-20261130-084018", bundle, load_manifest(bundle).shard_digest, config)
    store.set_state("tickets-20261130-084018", state)
    store.close()
    options = ["merge", "latest", "--out", str(tmp_path / "out"), "--data-dir", str(tmp_path)]
    assert main(options) == ExitCode.DATA
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
