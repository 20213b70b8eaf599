"""Takes uPlot, which draws the status page's charts, from a registry into the page's folder.

The files are those of uPlot's own release, bit for bit, whoever carries them. Without them the page has tables alone.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VENDOR = "cloud/hosl_cloud/page/vendor"
FILES = {
    "uPlot.iife.min.js": "2d27e8ad3d228164525ce213f9dc716f39b4e3aee0cc773fb3491c96cf4921a2",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}
"""Files of uPlot 1.6.31 and their SHA-256. Its licence is beside the page, in uPlot-LICENSE."""
PIP = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
NPM = ["npm", "pack", "--silent", "--fetch-retries=1", "--fetch-timeout=20000"]
CARRIERS = {"pip": [*PIP, "--timeout", "20", "youplot==1.0.0"], "npm": [*NPM, "uplot@1.6.31"]}
"""What downloads an archive that has the files into the working folder. The first is there wherever hosl is built."""
DEADLINE_S = 60.0


def fetch_charts(root: Path) -> str:
    """Put the files into the package, unless they are there. Returns what prevented it, or an empty string."""
    vendor, problems = root / VENDOR, []
    if not find_missing(vendor):
        return ""

    vendor.mkdir(exist_ok=True)
    for client, command in CARRIERS.items():
        with tempfile.TemporaryDirectory() as folder:
            problem = _download(Path(folder), command) or _copy_files(Path(folder), vendor)
        if not problem:
            return ""
        problems.append(f"{client}: {problem}")
    return "; ".join(problems)


def find_missing(vendor: Path) -> list[str]:
    """Find the files that are not there, or are not those of the release."""
    return [name for name, digest in FILES.items() if _digest(vendor / name) != digest]


def _download(folder: Path, command: list[str]) -> str:
    """Download an archive into the folder and unpack it there. Returns what went wrong, or an empty string."""
    try:
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)[:200]
    if result.returncode:
        return result.stderr.strip()[-200:] or f"exit code {result.returncode}"

    # A wheel is a zip archive by another name, which shutil does not know.
    for archive in list(folder.iterdir()):
        shutil.unpack_archive(archive, folder, "gztar" if archive.suffix == ".tgz" else "zip")
    return ""


def _copy_files(folder: Path, vendor: Path) -> str:
    """Copy what has the right digests, wherever it is in the archive. Returns what is missing after that."""
    found = {_digest(path): path for path in folder.rglob("*") if path.is_file()}
    for name, digest in FILES.items():
        if digest in found:
            shutil.copyfile(found[digest], vendor / name)
    return ", ".join(f"{name} has another digest, or is missing" for name in find_missing(vendor))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
