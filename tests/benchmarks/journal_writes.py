"""What the journal writes to the device's disk: bytes by the kernel's count, for rounds of a stated length.

python tests/benchmarks/journal_writes.py [--rounds 1000] [--round-s 5] [--gradient 368640] [--json]

With --gradient updates are gradients of so many numbers, one bit each, and not directions' coefficients.

Time is the benchmark's own, so that 1,000 rounds of 5 s take seconds; the file and its syncs are real.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np

from hosl_edge.history.journal import JournalHeader, create_journal
from hosl_protocol.arithmetic.rotation import GradientLayout
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import Task
from hosl_protocol.run.updates import UpdateShape
from hosl_protocol.weights.estimates import UpdateRecord

INTERVALS_S = (10.0, 30.0, 60.0, 120.0)


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--round-s", type=float, default=5.0)
    parser.add_argument("--directions", type=int, default=2)
    parser.add_argument("--gradient", type=int, metavar="NUMBERS", help="first-order updates of so many numbers")
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure (default: the temporary one)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [
        {"sync_interval_s": interval_s, "written_bytes": written_bytes(options, interval_s)}
        for interval_s in INTERVALS_S
    ]
    if options.json:
        print(json.dumps(rows))
        return 0
    update = f"gradients of {options.gradient} numbers" if options.gradient else f"P = {options.directions}"
    print(f"{options.rounds} rounds of {options.round_s:g} s, {update}")
    print(f"{'sync_interval_s':>16} {'KB written':>11}")
    for row in rows:
        print(f"{row['sync_interval_s']:>16.0f} {row['written_bytes'] / 1e3:>11.0f}")
    return 0


def written_bytes(options: argparse.Namespace, interval_s: float) -> int:
    """`write_bytes` of /proc/self/io over the rounds."""
    settings = RunSettings(task=Task(name="t", kind="lm", template="{text}"), directions=options.directions)
    shape = UpdateShape(coefficients=options.directions)
    if options.gradient:
        settings = msgspec.structs.replace(settings, algorithm="first-order")
        layout = GradientLayout([options.gradient], bits=1)
        shape = UpdateShape(coefficients=layout.scales, codes=layout.codes)
    coefficients, codes = np.ones(shape.coefficients, np.float32), np.zeros(shape.codes, np.uint8)
    digest = "0" * 64
    header = JournalHeader(
        run="r", epoch=0, shard_digest=digest, data_digest=digest, settings=settings, width=8, update=shape
    )
    now = 0.0

    def clock() -> float:
        return now

    with tempfile.TemporaryDirectory(dir=options.dir) as folder, mock.patch.object(time, "monotonic", clock):
        journal = create_journal(Path(folder), header)
        journal.sync_interval_s = interval_s
        before = _write_bytes()
        for round_ in range(1, options.rounds + 1):
            now += options.round_s
            journal.append([UpdateRecord(round_, coefficients, 0.0, codes)])
        journal.close()
        return _write_bytes() - before


def _write_bytes() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes:"))


if __name__ == "__main__":
    sys.exit(main())
