"""Fuzz the protocol for as long as one likes, and print what was run; `make fuzz FRAMES=1000000 SEQUENCES=10000`.

Frames are damaged by tests/helpers/fuzzing.py and, where atheris is installed (`hosl[fuzz]`), as many more by coverage;
sequences are those of tests/helpers/machines.py. Ends with 1 where an exception escaped or memory grew.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypothesis.stateful import RuleBasedStateMachine

GROWTH_MB = 64
"""Most that fuzzing may add to the process's peak of resident memory."""
SHOWN = 5
"""Escapes that are printed in full."""
SEPARATOR = b"\xff\xfe\xfd"
"""Between pieces in what atheris makes; no header holds it, for it is not UTF-8."""


@dataclass
class Row:
    """What one kind of fuzzing came to."""

    what: str
    count: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    escapes: int = 0
    peak_mb: float = 0.0
    growth_mb: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether nothing was found."""
        return not self.escapes and self.growth_mb <= GROWTH_MB

    def line(self) -> str:
        """Its line of the table."""
        outcomes = ", ".join(f"{name} {count:,}" for name, count in self.outcomes.most_common())
        rate = self.count / max(self.seconds, 1e-9)
        figures = f"{self.count:,} | {self.seconds:,.0f} | {rate:,.0f} | {self.escapes}"
        return f"| {self.what} | {figures} | {self.peak_mb:,.0f} | {self.growth_mb:+.1f} | {outcomes} |"


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz_frames(count: int, seed: int) -> Row:
    """Damaged frames, one after the other; what escapes is named by its seed."""
    from fuzzing import Tally, fuzz_frame

    row, tally = Row("frames, by mutation"), Tally()
    for number in range(min(count, 2000)):  # what is made once is made before memory is measured
        fuzz_frame(random.Random(seed - 1 - number), Tally())
    began, before = time.monotonic(), peak_mb()
    for number in range(count):
        try:
            fuzz_frame(random.Random(seed + number), tally)
        except Exception as error:
            row.escapes += 1
            row.outcomes[f"ESCAPED {type(error).__name__}"] += 1
            if row.escapes <= SHOWN:
                print(f"seed {seed + number}:\n{traceback.format_exc()}", file=sys.stderr)
    row.count, row.seconds = count, time.monotonic() - began
    row.outcomes += tally.outcomes()
    row.peak_mb, row.growth_mb = peak_mb(), peak_mb() - before
    return row


def fuzz_sequences(machine: type[RuleBasedStateMachine], count: int) -> Row:
    """`count` sequences of a machine of tests/helpers/machines.py."""
    from hypothesis import HealthCheck, settings
    from hypothesis.stateful import run_state_machine_as_test

    import machines

    row = Row(f"sequences, {machine.__name__}")
    machines.REACHED.clear()
    began, before = time.monotonic(), peak_mb()
    try:
        while row.count < count:
            # hypothesis remembers every sequence of a run, so a run has few.
            chosen = settings(
                max_examples=min(200, count - row.count),
                stateful_step_count=40,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            run_state_machine_as_test(machine, settings=chosen)
            row.count += chosen.max_examples
    except Exception as error:
        row.escapes += 1
        row.outcomes[f"ESCAPED {type(error).__name__}"] += 1
        traceback.print_exc()
    row.seconds, row.peak_mb, row.growth_mb = time.monotonic() - began, peak_mb(), peak_mb() - before
    row.outcomes += Counter({f"ended {phase.value}": times for phase, times in machines.REACHED.items()})
    return row


def fuzz_by_coverage(count: int) -> Row | None:
    """The same connections under atheris, in a process of its own; None where it is not installed."""
    try:
        import atheris  # noqa: F401
    except ImportError:
        print('atheris is not installed (pip install "hosl[fuzz]"): frames by mutation only', file=sys.stderr)
        return None
    row = Row("frames, by coverage (atheris)")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        _write_seeds(Path(folder))
        command = [sys.executable, __file__, "--atheris", f"-runs={count}", "-max_len=4096", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    row.seconds = time.monotonic() - began
    found = re.findall(r"^#(\d+)\s+(?:DONE|NEW|REDUCE|pulse)", done.stderr, re.MULTILINE)
    row.count = int(found[-1]) if found else 0
    rss = re.findall(r"rss: (\d+)Mb", done.stderr)
    row.peak_mb = float(rss[-1]) if rss else 0.0
    row.growth_mb = float(rss[-1]) - float(rss[0]) if rss else 0.0
    row.outcomes += Counter(
        {name: int(times) for name, times in re.findall(r"^outcome (\w+) (\d+)$", done.stdout, re.M)}
    )
    if done.returncode:
        row.escapes += 1
        print(done.stderr[-4000:], file=sys.stderr)
    return row


def _write_seeds(folder: Path) -> None:
    from fuzzing import CASES, VALID, other

    for number, (role, _) in enumerate(CASES):
        for place, (header, *rest) in enumerate(VALID[other(role)]):
            data = bytes([number]) + SEPARATOR.join([header[8:], *rest])
            (folder / f"{number}-{place}").write_bytes(data)


def run_atheris(arguments: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["hosl_protocol"]):
        import hosl_protocol  # noqa: F401
    from fuzzing import CASES, Tally, connection_in, give, with_length

    tally = Tally()
    runs = next(int(each.partition("=")[2]) for each in arguments if each.startswith("-runs="))

    def one(data: bytes) -> None:
        role, phase = CASES[data[0] % len(CASES) if data else 0]
        header, *rest = data[1:].split(SEPARATOR)
        give(connection_in(role, phase), [with_length(header), *rest], tally)
        if tally.frames % 10_000 == 0 or tally.frames == runs:  # nothing runs after the last one
            for name, times in tally.outcomes().items():
                print(f"outcome {name} {times}", flush=True)

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def main() -> int:
    """0 where nothing was found."""
    if sys.argv[1:2] == ["--atheris"]:
        run_atheris(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--frames", type=int, default=200_000, help="of each kind (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=3000, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the mutations (default: the time)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else time.time_ns() // 10**6 << 32
    print(f"seed {seed}, Python {sys.version.split()[0]}")
    from machines import MACHINES

    kinds: list[Callable[[], Row | None]] = []
    if options.frames:
        kinds += [partial(fuzz_frames, options.frames, seed), partial(fuzz_by_coverage, options.frames)]
    if options.sequences:
        kinds += [partial(fuzz_sequences, machine, -(-options.sequences // len(MACHINES))) for machine in MACHINES]
    print("\n| what | count | s | per s | escapes | peak MB | growth MB | outcomes |\n|" + "---|" * 8, flush=True)
    is_good = True
    for kind in kinds:
        row = kind()
        if row is not None:
            print(row.line(), flush=True)
            is_good &= row.is_good
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
