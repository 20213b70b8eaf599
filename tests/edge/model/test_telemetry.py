"""ONNX Runtime's reports to its maker are off in the agent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def files_left_by(code: str, home: Path) -> list[Path]:
    """What a process leaves in its home folder; continuous integration is not to turn the reports off for us."""
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    return [path for path in home.rglob("*") if path.is_file()]


def test_onnxruntime_keeps_no_reports_in_the_agents_process(tmp_path: Path) -> None:
    assert files_left_by("import hosl_edge.model.shard, time; time.sleep(0.5)", tmp_path / "home") == []
