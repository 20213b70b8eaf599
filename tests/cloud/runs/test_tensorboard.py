"""A run's figures as TensorBoard would read them."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from hosl_cloud.runs.curves.tensorboard import TensorBoardWriter


def events(folder: Path) -> Iterator[Event]:
    """All that is in a folder's files, oldest first; each record's checksums must be right."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            length, crc = struct.unpack_from("<QI", data)
            body, (body_crc,) = data[12 : 12 + length], struct.unpack_from("<I", data, 12 + length)
            assert (crc, body_crc) == (masked_crc32c(data[:8]), masked_crc32c(body))
            yield Event.FromString(body)
            data = data[16 + length :]


def shown(folder: Path) -> dict[str, dict[int, float]]:
    """Curves by name as TensorBoard shows them: a session's start hides what came before of its step and later."""
    curves: dict[str, dict[int, float]] = {}
    for event in events(folder):
        if event.HasField("session_log"):
            for curve in curves.values():
                for step in [step for step in curve if step >= event.step]:
                    del curve[step]
        for value in event.summary.value:
            curves.setdefault(value.tag, {})[event.step] = round(value.simple_value, 4)
    return curves


def test_figures_are_read_back_by_round_and_name(tmp_path: Path) -> None:
    curves = TensorBoardWriter(tmp_path / "curves", 1)
    curves.add(0, {"eval/accuracy": 0.5})
    for round_ in (1, 2):
        curves.add(round_, {"train/loss": 1.0 / round_, "round/wire_bytes": 2**33})
    curves.close()
    assert shown(tmp_path / "curves") == {
        "eval/accuracy": {0: 0.5},
        "train/loss": {1: 1.0, 2: 0.5},
        "round/wire_bytes": {1: 2.0**33, 2: 2.0**33},
    }


def test_a_run_that_resumes_at_an_earlier_round_hides_what_is_made_again(tmp_path: Path) -> None:
    first = TensorBoardWriter(tmp_path, 1)
    for round_ in range(1, 6):
        first.add(round_, {"train/loss": 1.0})
    first.close()
    second = TensorBoardWriter(tmp_path, 3)
    second.add(3, {"train/loss": 2.0})
    second.close()
    assert shown(tmp_path) == {"train/loss": {1: 1.0, 2: 1.0, 3: 2.0}}
    assert len(list(tmp_path.iterdir())) == 2, "the first service's file is kept"


def test_nothing_is_written_before_there_is_a_figure(tmp_path: Path) -> None:
    TensorBoardWriter(tmp_path / "curves", 1).close()
    assert not (tmp_path / "curves").exists()


def test_a_folder_that_takes_nothing_costs_the_curves_a_part_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hosl_cloud.runs.curves.tensorboard.RETRY_S", 0.0)
    (tmp_path / "curves").write_text("a file in the folder's place")
    curves = TensorBoardWriter(tmp_path / "curves", 1)
    with caplog.at_level(logging.WARNING):
        for round_ in (1, 2):
            curves.add(round_, {"train/loss": 1.0})
        (tmp_path / "curves").unlink()
        curves.add(3, {"train/loss": 0.5})
        curves.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "takes no figures" in caplog.text
    assert shown(tmp_path / "curves") == {"train/loss": {3: 0.5}}


def test_a_file_that_is_begun_anew_hides_nothing_of_this_service(tmp_path: Path) -> None:
    curves = TensorBoardWriter(tmp_path, 1)
    for round_ in (1, 2):
        curves.add(round_, {"train/loss": 1.0})
    curves.close()
    curves.add(2, {"eval/loss": 0.5})
    curves.close()
    assert shown(tmp_path) == {"train/loss": {1: 1.0, 2: 1.0}, "eval/loss": {2: 0.5}}
