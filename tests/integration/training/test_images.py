"""Whole runs of a tiny ResNet with real processes on loopback: two devices with `.npz` files, a cloud, and a merge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from hosl_edge.data.images import normalize
from hosl_protocol.run.manifest import load_manifest
from pictures import CLASSES, make_pictures, write_pictures
from processes import Program
from support import run_card

DEADLINE_S = 180.0
DEVICES = ("pi-1", "pi-2")
RUN = """
name = "colours"
algorithm = "{algorithm}"
rounds = 30
seed = 5
batch_size = 12
probe_step = 1e-2
report_every = 5
[task]
name = "colours"
kind = "image-classification"
labels = ["red", "green", "blue"]
[augmentation]
crop_padding = 2
flip = true
[client]
learning_rate = 1e-3
[tail]
learning_rate = 1e-2
device = "cpu"
[devices]
start_with = 2
"""

Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes, and ends those that still run."""
    processes: list[Program] = []

    def run(module: str, *arguments: object) -> Program:
        processes.append(Program(module, *arguments, errors=tmp_path / f"errors-{len(processes)}"))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def errors(folder: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("errors-*")))


def finish(process: Program, folder: Path) -> str:
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors(folder)
    return output


@pytest.mark.parametrize(("algorithm", "train"), [("ho-sfl", "norm"), ("hosl", "blocks")])
def test_a_resnet_learns_from_two_devices_and_merges(
    make_image_bundle: Callable[..., Path], tmp_path: Path, start: Start, algorithm: str, train: str
) -> None:
    bundle = make_image_bundle("resnet", train)
    (tmp_path / "run.toml").write_text(RUN.format(algorithm=algorithm), encoding="utf-8")
    arguments = ["--bundle", bundle, "--config", tmp_path / "run.toml", "--data-dir", tmp_path / "cloud"]
    cloud = start("hosl_cloud", "serve", *arguments, "--port", "0", "--once")
    said = ""
    while "--token-file" not in said:
        line = cloud.stdout.readline()
        assert line, errors(tmp_path)
        said += line
    found = re.search(r"run (\S+):.*--server (\S+) --token-file (\S+)", said, re.DOTALL)
    assert found
    run, server, token_file = found.groups()
    devices = []
    for number, name in enumerate(DEVICES):
        train_file = write_pictures(tmp_path / f"{name}.npz", 48, seed=number)
        held_out = write_pictures(tmp_path / f"{name}-eval.npz", 12, seed=100 + number)
        folders = ["--state-dir", tmp_path / "state", "--cache-dir", tmp_path / "cache"]
        options = ["--data", train_file, "--eval", held_out, "--fields", "images,labels", "--threads", "1", "--json"]
        devices.append(
            start("hosl_edge", "--server", server, "--token-file", token_file, "--name", name, *options, *folders)
        )
    summaries: list[dict[str, Any]] = [json.loads(finish(device, tmp_path)) for device in devices]
    finish(cloud, tmp_path)
    assert [summary["rounds"] for summary in summaries] == [30, 30]
    assert summaries[0]["weights_digest"] == summaries[1]["weights_digest"] != ""
    merged = tmp_path / "merged"
    merging = ["merge", run, "--data-dir", tmp_path / "cloud", "--out", merged, "--checkpoint", "last"]
    finish(start("hosl_cloud", *merging), tmp_path)
    # What plain transformers code finds in the merged folder is what the run said of the held-out images, unvaried.
    model = AutoModelForImageClassification.from_pretrained(merged).eval()
    image = load_manifest(bundle).image
    assert image is not None
    right = 0
    for number in range(len(DEVICES)):
        images, labels = make_pictures(12, seed=100 + number)
        with torch.no_grad():
            logits = model(torch.from_numpy(normalize(images, image))).logits
        own = (logits.argmax(1) == torch.from_numpy(labels)).float().mean().item()
        assert summaries[number]["accuracy"] == pytest.approx(own)
        right += int(own * 12 + 0.5)
    assert right >= 20
    assert model.config.id2label == dict(enumerate(CLASSES))
    classify, found = run_card(merged)["classify"], 0
    for number in range(len(DEVICES)):
        images, labels = make_pictures(12, seed=100 + number)
        named = zip(images, labels, strict=True)
        found += sum(classify(Image.fromarray(pixels)) == CLASSES[label] for pixels, label in named)
    assert found == right
