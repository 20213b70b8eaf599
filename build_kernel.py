"""Compiles the pass over the weights: for this machine where it has a C compiler, or for the machines of a wheel.

Without the library numpy does the same work, bit for bit, several times slower.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = "protocol/hosl_protocol/arithmetic/kernel.c"
LIBRARY = "protocol/hosl_protocol/arithmetic/libhosl_kernel.so"
# No contraction: sums must be those of separate additions, on every machine.
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC", "-s")
GLIBC = (2, 17)
"""The oldest glibc that a wheel is for, of 2012; onnxruntime's own wheels want a newer one."""
MACHINES = {"x86_64": 62, "aarch64": 183}
"""Machines that a wheel can be for, as `uname -m` says it, and the number of each in the head of a library."""


def library_for(root: Path, machine: str) -> Path:
    """Where the library of this machine (""), or that of a wheel for `machine`, is compiled to.

    A wheel's is no part of the sources, so that to make one leaves an install in place with its own.
    """
    return root / "build" / "kernel" / machine / Path(LIBRARY).name if machine else root / LIBRARY


def platform_tag(machine: str) -> str:
    """The wheel's platform for any Linux on `machine`, as PEP 600 spells it."""
    return f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"


def compile_kernel(root: Path, machine: str = "") -> str:
    """Compile for this machine, or for any Linux on `machine`. Returns what prevented it, or an empty string.

    CC names the compiler, and the options that it wants. Without it that is cc or, with a `machine`, zig's of the
    package ziglang, which brings the C libraries of all.
    """
    library = library_for(root, machine)
    library.parent.mkdir(parents=True, exist_ok=True)
    # Where compiling fails, no older library must be taken for its result.
    library.unlink(missing_ok=True)

    compiler = shlex.split(os.environ.get("CC", "")) or (_zig(machine) if machine else ["cc"])
    if os.name != "posix" or not compiler or shutil.which(compiler[0]) is None:
        return f"no C compiler for {machine}: install ziglang, or name one in CC" if machine else "no C compiler"

    command = [*compiler, *FLAGS, "-o", str(library), str(root / SOURCE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return f"{compiler[0]} failed: {result.stderr.strip()[:200]}"
    return find_misfit(library, machine) if machine else ""


def _zig(machine: str) -> list[str]:
    """The command of zig's C compiler, or nothing where it is not installed."""
    if importlib.util.find_spec("ziglang") is None:
        return []
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"]


def find_misfit(library: Path, machine: str) -> str:
    """Find what keeps a library from running wherever the wheel's tag says that it does; an empty string if nothing."""
    content = library.read_bytes()

    # The head of an ELF file: its magic number, 2 for 64 bits, and at byte 18 the machine.
    number = int.from_bytes(content[18:20], "little")
    if content[:5] != b"\x7fELF\x02" or number != MACHINES[machine]:
        return (
            f"{library.name} is for machine {number}, expected {MACHINES[machine]} ({machine}): CC is not its compiler"
        )

    # Each symbol of the C library is named with the version from which it is there.
    wanted = max(((int(a), int(b)) for a, b in re.findall(rb"\0GLIBC_(\d+)\.(\d+)", content)), default=GLIBC)
    if wanted > GLIBC:
        return f"{library.name} wants glibc {wanted[0]}.{wanted[1]}, expected at most {GLIBC[0]}.{GLIBC[1]}"
    return ""
