"""What the device's training is worth: a model meets a camera that it does not know, and learns in three ways.

python examples/camera/demo.py

A ResNet has learnt to read clean digits. Its first two stages are put on a device whose camera sees them in the dark:
there it learns with a frozen device, with HO-SFL and with first-order training, each with a cloud and a device of its
own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
from prepare import CLEAN, DEVICE, prepare

from hosl_cloud.storage.data_folder import DATABASE
from hosl_cloud.storage.store import Store

sys.path.append(str(Path(__file__).parents[1]))
from running import run, step, took, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
WORK = HERE / "work"
DATA = WORK / "data"
PICTURE = WORK / "camera.png"
SPLIT = 2
METHODS = {
    "frozen": "the device only runs its half",
    "ho-sfl": "8 probes a round, 8 numbers up",
    "first-order": "the exact gradient, compressed",
}
"""By `algorithm`: what the device does."""
COLOURS = {"frozen": "#888888", "ho-sfl": "#3b7dd8", "first-order": "#d8663b"}

Course = dict[int, float]
"""Accuracy on held-out images by round."""


def main() -> int:
    """Run the demo; what it prints last is the result."""
    for name in ("bundle", *METHODS):
        shutil.rmtree(WORK / name, ignore_errors=True)

    step("fetch handwritten digits from PyPI, and train a small ResNet on clean ones")
    print(f"accuracy on clean digits: {100 * prepare(DATA):.1f} %")
    step(f"export the model: {SPLIT} of its 3 stages go to the device, whose norms train")
    run("hosl-export", "--model", DATA / "model", "--split", SPLIT, "--train", "norm", "--out", WORK / "bundle")

    courses: dict[str, Course] = {}
    peaks: dict[str, int] = {}
    for algorithm, sentence in METHODS.items():
        step(f"{algorithm}: {sentence}")
        courses[algorithm], peaks[algorithm] = train_with(algorithm)
    step("the same training of the device's half with torch, for its memory")
    peaks["torch"] = measure_torch()

    draw(courses)
    report(courses, peaks)
    return 0


def train_with(algorithm: str) -> tuple[Course, int]:
    """Train with a cloud and a device; accuracy by round, and the device's peak of resident memory in bytes."""
    work = WORK / algorithm
    work.mkdir()
    config = work / "run.toml"
    config.write_text(
        f'algorithm = "{algorithm}"\n' + (HERE / "run.toml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (summary,) = train(WORK / "bundle", config, work, [("camera", DATA / "train.npz", DATA / "held-out.npz")])

    store = Store(work / "cloud" / DATABASE)
    course = {each.round: each.correct / each.scored for each in store.evaluations(summary["run"])}
    store.close()
    return course, summary["peak_rss_bytes"]


def measure_torch() -> int:
    """Train a few steps by backpropagation in a process of its own; its peak of resident memory in bytes."""
    command = [sys.executable, HERE / "backpropagation.py", WORK / "bundle", DATA / "train.npz"]
    return int(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)


def draw(courses: dict[str, Course]) -> None:
    """What the camera sees, and how fast each way learns it."""
    figure = plt.figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.6))
    examples = {"what it learnt": DATA / "clean.npz", "what it meets": DATA / "held-out.npz"}
    for axes, (name, path) in zip(left.subplots(2, 4), examples.items(), strict=True):
        with np.load(path) as data:
            for axis, image in zip(axes, data["images"], strict=False):
                axis.imshow(image[:, :, 0], cmap="gray", vmin=0, vmax=255)
                axis.set(xticks=[], yticks=[])
        axes[0].set_title(name, fontsize=10, loc="left")

    axis = right.subplots()
    for algorithm, course in courses.items():
        scores = [100 * score for score in course.values()]
        axis.plot(list(course), scores, "o-", color=COLOURS[algorithm], label=f"{algorithm}: {scores[-1]:.1f} %")
    axis.set(xlabel="round", ylabel="accuracy on held-out images, %")
    axis.legend(loc="lower right", title="the device's half")
    axis.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=130)


def report(courses: dict[str, Course], peaks: dict[str, int]) -> None:
    """The figures, as a person wants them."""
    print(f"\n{DEVICE} dark images on the device; the model had learnt from {CLEAN} clean ones, and named")
    print(f"{100 * courses['frozen'][0]:.1f} % of the dark ones that are held out.\n")
    print("device's half              accuracy   device's peak memory")
    for algorithm in METHODS:
        score, note = courses[algorithm][max(courses[algorithm])], ""
        if algorithm == "frozen":
            note = "  plain inference"
        print(f"{algorithm:24} {100 * score:8.1f} % {peaks[algorithm] / 1e6:9.0f} MB{note}")
    print(f"{'backpropagation in torch':24} {'':8}   {peaks['torch'] / 1e6:9.0f} MB")
    print(f"\npicture: {PICTURE}")
    print(took())


if __name__ == "__main__":
    sys.exit(main())
