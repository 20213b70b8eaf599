"""Compiles the pass over the weights where there is a C compiler.

Without one the wheel is pure Python and numpy does the same work, bit for bit, several times slower.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = "protocol/hosl_protocol/arithmetic/kernel.c"
LIBRARY = "protocol/hosl_protocol/arithmetic/libhosl_kernel.so"
# Sums must be those of separate additions, on every machine.
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")


def compile_kernel(root: Path) -> str:
    """Compile into the package; what prevented it, or an empty string."""
    (root / LIBRARY).unlink(missing_ok=True)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.name != "posix" or compiler is None:
        return "no C compiler"
    command = [compiler, *FLAGS, "-o", str(root / LIBRARY), str(root / SOURCE)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if outcome.returncode == 0 else f"{compiler} failed: {outcome.stderr.strip()[:200]}"
