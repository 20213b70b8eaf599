"""Build hook of hatchling: compiles the pass over the weights where there is a C compiler.

Without one the wheel is pure Python and numpy does the same work, bit for bit, several times slower.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "protocol/hosl_protocol/kernel.c"
LIBRARY = "protocol/hosl_protocol/libhosl_kernel.so"
# Sums must be those of separate additions, on every machine.
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")


class KernelHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs before a wheel is built or installed in place."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        (root / LIBRARY).unlink(missing_ok=True)
        problem = compile_kernel(root)
        if problem:
            self.app.display_warning(f"hosl: no compiled kernel, numpy will do its work ({problem})")
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        # The library is called through ctypes: it is tied to the platform, not to a version of Python.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compile_kernel(root: Path) -> str:
    """Compile into the package; what prevented it, or an empty string."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.name != "posix" or compiler is None:
        return "no C compiler"
    command = [compiler, *FLAGS, "-o", str(root / LIBRARY), str(root / SOURCE)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if outcome.returncode == 0 else f"{compiler} failed: {outcome.stderr.strip()[:200]}"
