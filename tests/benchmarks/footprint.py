"""What the base install, the device's, takes: bytes on disk by distribution, and memory after its import.

    python tests/benchmarks/footprint.py [--json]

Installs this repository without extras into a fresh virtual environment, with the tested versions; needs a package
index. Bytes are those of the files that each distribution lists, its bytecode included; pip itself is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

SIZES = """
import json
from importlib.metadata import distributions
rows = []
for one in distributions():
    if one.name not in ("pip", "setuptools"):
        paths = {one.locate_file(file).resolve() for file in one.files or ()}
        size = sum(path.stat().st_size for path in paths if path.is_file())
        rows.append({"name": one.name, "version": one.version, "bytes": size, "files": len(paths)})
print(json.dumps(rows))
"""

MEMORY = """
import json
{statement}
with open("/proc/self/status", encoding="ascii") as file:
    fields = dict(line.split(":", 1) for line in file)
print(json.dumps({{name: 1024 * int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon")}}))
"""


def install(folder: Path) -> Path:
    """A virtual environment with the base distribution; its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), str(ROOT)], check=True, stdout=sys.stderr)
    return python


def ask(python: Path, code: str) -> Any:
    """What the code prints, run in a fresh process that sees only its own environment."""
    command = [str(python), "-I", "-c", code]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd="/").stdout)


def measure() -> dict[str, Any]:
    """Install, weigh, import."""
    with tempfile.TemporaryDirectory() as name:
        python = install(Path(name, "venv"))
        rows = sorted(ask(python, SIZES), key=lambda row: -int(row["bytes"]))
        memory = {
            what: ask(python, MEMORY.format(statement=statement))
            for what, statement in (("interpreter", ""), ("hosl_edge", "import hosl_edge"))
        }
    return {
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "installed_bytes": sum(row["bytes"] for row in rows),
        "rss_bytes": memory["hosl_edge"]["VmRSS"],
        "anonymous_bytes": memory["hosl_edge"]["RssAnon"],
        "interpreter_rss_bytes": memory["interpreter"]["VmRSS"],
        "interpreter_anonymous_bytes": memory["interpreter"]["RssAnon"],
        "distributions": rows,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = measure()
    print(json.dumps(report) if options.json else describe(report))


def describe(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [report["machine"], f"{'distribution':<20}{'version':>12}{'files':>8}{'installed':>13}"]
    for row in report["distributions"]:
        lines.append(f"{row['name']:<20}{row['version']:>12}{row['files']:>8}{row['bytes'] / 1e6:>10.2f} MB")
    lines.append(f"{'together':<40}{report['installed_bytes'] / 1e6:>10.2f} MB")
    lines.append(f"\n{'resident memory':<24}{'all':>10}{'anonymous':>13}")
    for what, prefix in (("interpreter alone", "interpreter_"), ("after import hosl_edge", "")):
        resident, anonymous = report[f"{prefix}rss_bytes"] / 1e6, report[f"{prefix}anonymous_bytes"] / 1e6
        lines.append(f"{what:<24}{resident:>7.1f} MB{anonymous:>10.1f} MB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
