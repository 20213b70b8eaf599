"""Build hook of hatchling: what a wheel, a source archive or an install in place needs beside the sources.

A wheel is for the machine that it is built on, and does without what that lacks. With HOSL_WHEEL_FOR=x86_64 or aarch64
it is for any Linux on such a machine, and complete or not made at all: `make wheels`.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent))

import build_charts
import build_kernel


class Hook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs before anything is built, or installed in place: hatchling calls `initialize` once for each archive."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        is_wheel = self.target_name == "wheel"
        machine = os.environ.get("HOSL_WHEEL_FOR", "") if is_wheel and version != "editable" else ""
        if machine and machine not in build_kernel.MACHINES:
            self.app.abort(f"hosl: HOSL_WHEEL_FOR={machine}, expected {' or '.join(build_kernel.MACHINES)}")

        # A wheel for others is complete, or not made at all: abort ends the process.
        report = self.app.abort if machine else self.app.display_warning
        if problem := build_charts.fetch_charts(Path(self.root)):
            report(f"hosl: no charts, the status page will have tables alone ({problem})")
        # Artifacts are taken although git ignores them.
        build_data["artifacts"].append(build_charts.VENDOR)

        if not is_wheel:
            return
        if problem := build_kernel.compile_kernel(Path(self.root), machine):
            report(f"hosl: no compiled kernel, numpy will do its work ({problem})")
            return

        # The library is called through ctypes: it is tied to the platform, not to a version of Python.
        build_data["pure_python"] = False
        if machine:
            library = build_kernel.library_for(Path(self.root), machine)
            build_data["force_include"][str(library)] = build_kernel.LIBRARY.partition("/")[2]
            build_data["tag"] = f"py3-none-{build_kernel.platform_tag(machine)}"
        else:
            build_data["artifacts"].append(build_kernel.LIBRARY)
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
