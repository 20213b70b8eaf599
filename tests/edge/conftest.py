"""The settings of an agent that is installed on this machine are none of the tests' business."""

from __future__ import annotations

from pathlib import Path

import pytest

from hosl_edge import settings


@pytest.fixture(autouse=True)
def _no_system_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(settings, "CONFIG", tmp_path / "no-edge.toml")
