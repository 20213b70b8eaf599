"""A run's settings and figures as MLflow's and W&B's own clients keep them; one that is away holds nothing up."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from hosl_cloud.runs.curves import trackers
from hosl_cloud.runs.curves.trackers import TRACKING_FILE, Trackers, flat, read_ids
from hosl_cloud.settings import TrackingSettings

FACTS = {"rounds": 3, "tail.learning_rate": 1e-3}

pytestmark = pytest.mark.filterwarnings("default")  # of the clients' own imports


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes long to import a client."""
    monkeypatch.setattr(trackers, "LEAVING_S", 200.0)


def test_mlflow_has_settings_figures_and_the_end_and_a_run_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = pytest.importorskip("mlflow.tracking").MlflowClient
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlflow").as_uri()
    first = Trackers(TrackingSettings(mlflow=uri), "run-7", FACTS, tmp_path / "run")
    first.add(1, {"train/loss": 0.5, "round/wire_bytes": 2**33})
    first.close(has_failed=True)
    id_ = read_ids(tmp_path / "run")["mlflow"]
    found = client(tracking_uri=uri).get_run(id_)
    assert (found.info.run_name, found.info.status) == ("run-7", "FAILED")
    assert found.data.params == {"rounds": "3", "tail.learning_rate": "0.001"}
    assert found.data.metrics == {"train/loss": 0.5, "round/wire_bytes": 2.0**33}

    second = Trackers(TrackingSettings(mlflow=uri), "run-7", FACTS, tmp_path / "run")
    second.add(2, {"train/loss": 0.25})
    second.close()
    again = client(tracking_uri=uri)
    assert [(each.step, each.value) for each in again.get_metric_history(id_, "train/loss")] == [(1, 0.5), (2, 0.25)]
    assert again.get_run(id_).info.status == "FINISHED"
    assert len(again.search_runs([found.info.experiment_id])) == 1


def test_wandb_offline_keeps_settings_and_figures_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = Trackers(TrackingSettings(wandb="reviews"), "run-7", FACTS, tmp_path)
    for round_ in (1, 2):
        run.add(round_, {"train/loss": 1 / round_})
    run.close()
    (kept,) = tmp_path.glob("wandb/offline-run-*-run-7/run-run-7.wandb")
    data = kept.read_bytes()
    for text in (b"reviews", b"tail.learning_rate", b"train/loss"):
        assert text in data
    assert read_ids(tmp_path) == {"wandb": "run-7"}


class Away:
    """A server that takes nothing until it is back."""

    def __init__(self) -> None:
        self.is_back = False
        self.taken: list[Any] = []

    def open(self, known: str | None) -> str:
        return known or "its-id"

    def add(self, round_: int, figures: Any, at: float) -> None:
        if not self.is_back:
            raise ConnectionError("nobody listens\nat length")
        self.taken.append((round_, figures))

    def end(self, has_failed: bool) -> None:
        self.taken.append(has_failed)


def test_a_tracker_that_is_away_is_told_once_and_gets_everything_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away = Away()
    monkeypatch.setattr(trackers, "MlflowTracker", lambda *_: away)
    monkeypatch.setattr(trackers, "RETRY_S", 0.01)
    run = Trackers(TrackingSettings(mlflow="http://x"), "run-7", FACTS, tmp_path)
    began = time.monotonic()
    for round_ in range(1, 4):
        run.add(round_, {"train/loss": 1.0})
    assert time.monotonic() - began < 1
    while not caplog.records:
        time.sleep(0.01)
    time.sleep(0.1)  # tried some times more
    away.is_back = True
    while len(away.taken) < 3:
        time.sleep(0.01)
    run.close()
    run.close()
    assert away.taken == [*((round_, {"train/loss": 1.0}) for round_ in (1, 2, 3)), False]
    (record,) = caplog.records
    expected = "tracking.mlflow: add fails, and is tried again every minute: nobody listens"
    assert (record.levelno, record.message) == (logging.WARNING, expected)


def test_a_run_ends_without_a_tracker_that_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "MlflowTracker", lambda *_: Away())
    run = Trackers(TrackingSettings(mlflow="http://x"), "run-7", FACTS, tmp_path)
    for round_ in range(1, 100):
        run.add(round_, {"train/loss": 1.0})
    began = time.monotonic()
    run.close()
    assert time.monotonic() - began < 20
    assert "tracking.mlflow lacks the run's last figures: nobody listens" in caplog.messages


def test_a_client_that_is_not_installed_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    run = Trackers(TrackingSettings(wandb="x"), "run-7", FACTS, tmp_path)
    run.close()
    (message,) = caplog.messages
    assert message.startswith("tracking.wandb needs: pip install")
    assert message.endswith("[wandb]' (wandb is missing); the run goes on without it") or "wandb is missing" in message


def test_settings_have_their_whole_names(tmp_path: Path) -> None:
    assert flat({"rounds": 2, "tail": {"train": "full", "ranks": {"a": 1}}}) == {
        "rounds": 2,
        "tail.train": "full",
        "tail.ranks.a": 1,
    }
    (tmp_path / TRACKING_FILE).write_text("[")
    assert read_ids(tmp_path) == {}
    (tmp_path / TRACKING_FILE).write_text(json.dumps({"mlflow": "a"}))
    assert read_ids(tmp_path) == {"mlflow": "a"}
