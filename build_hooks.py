"""Build hook of hatchling: what a wheel, a source archive or an install in place needs beside the sources."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent))

import build_charts
import build_kernel


class Hook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs before anything is built, or installed in place."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if problem := build_charts.fetch_charts(Path(self.root)):
            self.app.display_warning(f"hosl: no charts, the status page will have tables alone ({problem})")
        build_data["artifacts"].append(build_charts.VENDOR)
        if self.target_name == "wheel":
            self._compile(build_data)

    def _compile(self, build_data: dict[str, Any]) -> None:
        if problem := build_kernel.compile_kernel(Path(self.root)):
            self.app.display_warning(f"hosl: no compiled kernel, numpy will do its work ({problem})")
            return
        build_data["artifacts"].append(build_kernel.LIBRARY)
        build_data["pure_python"] = False
        # The library is called through ctypes: it is tied to the platform, not to a version of Python.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
