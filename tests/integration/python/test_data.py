"""Data at hand in each of its forms: the same examples come to the same file, and errors name the example."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image

import hosl
from hosl.data import DataFile, named
from hosl_cloud.simulation.virtual_devices import open_data
from hosl_edge.exceptions import DataError
from hosl_protocol.run.manifest import Manifest, load_manifest
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import Task

MakeBundle = Callable[..., Path]

TASK = Task(name="t", kind="sequence-classification", template="{text}", labels=("0", "1"))
ROWS: list[dict[str, Any]] = [{"text": f"text\n{n}", "label": n % 2} for n in range(5)]


class Dataset:
    """What hosl uses of a `datasets.Dataset`: rows as dicts, one after the other, and the names of its columns."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows
        self.column_names = list(rows[0])

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)


FORMS: dict[str, Callable[[], Any]] = {
    "a list": lambda: ROWS,
    "a generator": lambda: iter(ROWS),
    "columns": lambda: {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "columns of numpy": lambda: {name: np.array([row[name] for row in ROWS]) for name in ROWS[0]},
    "a frame": lambda: pd.DataFrame(ROWS, index=range(7, 12)),
    "a dataset": lambda: Dataset(ROWS),
    "numbers of numpy": lambda: [{**row, "label": np.int64(row["label"])} for row in ROWS],
}


@pytest.fixture
def manifest(make_bundle: MakeBundle) -> Manifest:
    return load_manifest(make_bundle("norm", 2))


def write(data: Any, manifest: Manifest, folder: Path, task: Task = TASK) -> list[dict[str, Any]]:
    path = DataFile("data", data, task, manifest, folder).path
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_examples_come_to_the_same_file(manifest: Manifest, tmp_path: Path, form: str) -> None:
    assert write(FORMS[form](), manifest, tmp_path) == ROWS


def test_fields_that_the_task_does_not_read_are_named_and_left_out(manifest: Manifest, tmp_path: Path) -> None:
    row = {**ROWS[0], "when": pd.Timestamp(0), "by": {"name": "A"}}
    assert write([row], manifest, tmp_path) == [{**ROWS[0], "when": None, "by": None}]
    nested = Task(name="t", kind="lm", template="{by.name} wrote {a.b}")
    assert write([{**row, "a.b": "c"}], manifest, tmp_path, nested) == [
        {"text": None, "label": None, "when": None, "by": {"name": "A"}, "a.b": "c"}
    ]


def test_a_path_is_taken_as_it_is(manifest: Manifest, tmp_path: Path) -> None:
    for path in (Path("there", "x.csv"), "there/x.csv"):
        assert DataFile("data", path, TASK, manifest, tmp_path).path == Path("there", "x.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], "data: holds no examples"),
        (7, "data: is of type int: give a list of dicts, a frame, or a path"),
        (["a text"], "data: example 0 is of type str: give a dict for each"),
        ([ROWS[0], {"text": "a"}], "data: example 1: has no field 'label'; it has 'text'"),
        ([ROWS[0], {"text": "a", "label": 7}], "data: example 1: the label in 'label' is not one of 0, 1"),
        ([{"text": pd.NA, "label": 1}], "data: example 0: field 'text' should be text or a number, it is null"),
        (pd.DataFrame({"text": ["a", None], "label": [1, 0]}), "data: example 1: field 'text' should be text or a"),
        ([{"text": b"a", "label": 1}], "data: example 0: a field that the task reads is of type bytes: make"),
        ({"text": ["a"], "label": [1, 0]}, "data: is a dict whose values are no columns of one length: give a list"),
        ({"text": "a", "label": 1}, "data: is a dict whose values are no columns of one length: give a list"),
        ({"train": Dataset(ROWS), "test": Dataset(ROWS)}, "data: has several parts (train, test): give one of them"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_wrong_with_data_names_the_example(
    manifest: Manifest, make_bundle: MakeBundle, tmp_path: Path, data: Any, sentence: str
) -> None:
    settings = RunSettings(task=TASK, max_length=16)

    def read() -> None:
        file = DataFile("data", data, TASK, manifest, tmp_path)
        with named(file):
            open_data(make_bundle("norm", 2), manifest, settings, file.path)

    with pytest.raises(DataError) as raised:
        read()
    assert str(raised.value).startswith(sentence)


def test_an_error_in_a_file_of_the_callers_names_the_file(manifest: Manifest, tmp_path: Path) -> None:
    file = DataFile("data", tmp_path / "x.jsonl", TASK, manifest, tmp_path)
    error = DataError(tmp_path / "x.jsonl", 3, "is wrong")
    assert file.rename(error) is error


# Images


DIGITS = Task(name="d", kind="image-classification", labels=("zero", "one"))


@pytest.fixture
def pixels() -> npt.NDArray[np.uint8]:
    """Of five images, [5, 32, 32, 3]."""
    return np.random.default_rng(3).integers(0, 256, (5, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def image_bundle(make_image_bundle: Callable[..., Path]) -> Path:
    return make_image_bundle("resnet", "norm", 1)


def as_tensor(pixels: npt.NDArray[np.uint8]) -> Any:
    import torch

    return torch.from_numpy(pixels)


IMAGE_FORMS: dict[str, Callable[[npt.NDArray[np.uint8]], Any]] = {
    "arrays": lambda pixels: {"images": pixels, "labels": np.array([0, 1, 1, 0, 1])},
    "tensors": lambda pixels: {"images": as_tensor(pixels), "labels": as_tensor(np.array([0, 1, 1, 0, 1]))},
    "names": lambda pixels: {"images": list(pixels), "labels": ["zero", "one", "one", "zero", "one"]},
    "a list": lambda pixels: [{"image": p, "label": k} for p, k in zip(pixels, (0, 1, 1, 0, 1), strict=True)],
    "pictures": lambda pixels: Dataset(
        [{"img": Image.fromarray(p), "label": k} for p, k in zip(pixels, (0, 1, 1, 0, 1), strict=True)]
    ),
}


@pytest.mark.parametrize("form", IMAGE_FORMS)
def test_the_same_images_come_to_the_same_file(
    image_bundle: Path, tmp_path: Path, pixels: npt.NDArray[np.uint8], form: str
) -> None:
    manifest = load_manifest(image_bundle)
    assert manifest.image is not None
    assert (manifest.image.height, manifest.image.channels) == (32, 3)
    data = DataFile("data", IMAGE_FORMS[form](pixels), DIGITS, manifest, tmp_path)
    dataset = open_data(image_bundle, manifest, RunSettings(task=DIGITS, max_length=manifest.max_length), data.path)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 1, 0, 1]
    assert np.array_equal(dataset.batch(np.arange(5)).pixels_BHWC, pixels)  # type: ignore[attr-defined]


def test_pictures_of_any_size_are_brought_to_the_models(image_bundle: Path, tmp_path: Path) -> None:
    manifest = load_manifest(image_bundle)
    rows = [{"image": Image.new("L", size, 9), "label": "one"} for size in ((8, 8), (40, 20))]
    with np.load(DataFile("data", rows, DIGITS, manifest, tmp_path).path) as stored:
        assert stored["images"].shape == (2, 32, 32, 3)
        assert (stored["images"] == 9).all()
        assert stored["labels"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"images": np.zeros((2, 32, 32, 3), np.uint8), "labels": [1]}, "data: has 2 images and 1 labels"),
        ({"pixels": [], "labels": [1]}, "data: needs images in one of ('images', 'image', 'img') and classes in one"),
        ([{"image": np.zeros((32, 32, 3)), "label": 1}], "data: example 0: the image should be uint8 [H, W] or"),
        ([{"image": np.zeros((32, 32, 3), np.uint8), "label": "two"}], "data: example 0: the label is not one of zero"),
        ([{"image": np.zeros((32, 32, 3), np.uint8), "label": None}], "data: example 0: the label should be a number"),
        ([{"image": np.zeros((32, 32, 3), np.uint8), "label": 2}], "data: the label at place 0 is not one of 0 to 1"),
    ],
)
def test_what_is_wrong_with_images_names_the_example(
    image_bundle: Path, tmp_path: Path, data: Any, sentence: str
) -> None:
    manifest = load_manifest(image_bundle)
    settings = RunSettings(task=DIGITS, max_length=manifest.max_length)

    def read() -> None:
        file = DataFile("data", data, DIGITS, manifest, tmp_path)
        with named(file):
            open_data(image_bundle, manifest, settings, file.path)

    with pytest.raises(DataError) as raised:
        read()
    assert str(raised.value).startswith(sentence)


def test_images_are_trained_and_the_model_names_their_classes(
    image_bundle: Path, pixels: npt.NDArray[np.uint8]
) -> None:
    data = {"images": pixels, "labels": np.array([0, 1, 1, 0, 1])}
    task = {"kind": "image-classification", "labels": ["zero", "one"]}
    run = hosl.simulate(image_bundle, data, eval=data, task=task, rounds=2, batch_size=4, threads=1)
    trained = run.model()
    best = max(run.evaluations, key=lambda each: (each.accuracy, -each.loss))
    answers = [trained.classify(Image.fromarray(each)) for each in pixels]
    right = sum(answer == name for answer, name in zip(answers, ("zero", "one", "one", "zero", "one"), strict=True))
    assert (best.scored, right) == (5, best.right), "of an odd number the wrong way round is another"
