"""A study's settings file, and the cells it comes to: one training run each."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec


class TaskEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[tasks.NAME]`."""

    train: str
    """Data that devices hold: a path in --data, or `reviews`."""
    validation: str
    shift: str = ""
    """What befalls every input, of training and validation alike; see shifts.py."""
    train_rows: list[int] = []
    """Examples taken of the training data, from and up to; empty takes all."""
    validation_rows: int = 0
    """Examples taken of the validation data; 0 takes all."""
    form: str = ""
    """How a row becomes a text, where fields in a template do not do; see sources.FORMS."""
    least_words: int = 0
    """Rows with a text of fewer words are left out; a text of one token has no next one to predict."""
    run: dict[str, Any] = {}
    """Settings of the run."""


class MethodEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[methods.NAME]`."""

    train: str
    """`hosl-export --train`; `norm:1` trains the norms of the first block alone, `norm:-1` those of the last."""
    run: dict[str, Any] = {}
    tune: dict[str, list[Any]] = {}
    """Settings to choose on training data, and their candidates."""
    splits: list[int] = []
    """Splits that it is tried with; empty for all."""
    tasks: list[str] = []
    """Tasks that it is tried on; empty for all."""
    control: str = "frozen"
    """The method that shows what it would come to without the device's training."""


class TuneEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[tune]`: how candidates are compared."""

    task: str = ""
    """The task whose training data choose for all; empty: each task chooses for itself."""
    split: int = 0
    """The split whose runs choose for all; 0: each split chooses for itself."""
    budget: int = 3
    """Runs that each method may spend on each task and split that chooses."""
    holdout: int = 400
    """Training examples that are put aside to compare on."""
    seed: int = 1001
    run: dict[str, Any] = {}


class Study(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One settings file."""

    title: str
    model: str
    splits: list[int]
    tasks: dict[str, TaskEntry]
    methods: dict[str, MethodEntry]
    seeds: list[int] = msgspec.field(default_factory=lambda: [1, 2, 3])
    partitions: list[str] = msgspec.field(default_factory=lambda: ["iid"])
    devices: int = 1
    per_round: int = 0
    image_size: int = 0
    max_length: int = 0
    """Tokens that bundles are made for; 0: 128."""
    run: dict[str, Any] = {}
    tune: TuneEntry = TuneEntry()


@dataclass(frozen=True)
class Cell:
    """One run."""

    task: str
    split: int
    method: str
    partition: str
    seed: int
    run: Mapping[str, Any]
    """All settings of the run."""
    holdout: int = 0
    """Training examples to compare candidates on; 0: the run is scored on validation data."""
    choice: Mapping[str, Any] | None = None
    """What a candidate of tuning sets."""

    @property
    def name(self) -> str:
        """A file name of its own, the same whenever the settings are the same."""
        facts = json.dumps([self.run, self.holdout], sort_keys=True)
        digest = hashlib.sha256(facts.encode()).hexdigest()[:8]
        words = (self.task, self.split, self.method, self.partition, self.seed)
        return re.sub(r"[^a-z0-9.-]+", "_", "-".join(map(str, words)).lower()) + "-" + digest


def read_study(path: Path) -> Study:
    """Read a settings file; stop with one line where it cannot be used."""
    try:
        study: Study = msgspec.toml.decode(path.read_bytes(), type=Study)
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise SystemExit(f"{path}: {error}") from None
    for name, method in study.methods.items():
        spent = sum(1 for _ in candidates(method))
        if method.tune and spent > study.tune.budget:
            raise SystemExit(f"{path}: methods.{name}.tune asks for {spent} runs, tune.budget is {study.tune.budget}")
    return study


def is_first_order(method: MethodEntry) -> bool:
    """Whether the device's own code computes exact gradients, for which a bundle holds graphs."""
    return method.run.get("algorithm") == "first-order"


def candidates(method: MethodEntry) -> Iterator[dict[str, Any]]:
    """Every combination of what is tuned; one empty one where nothing is."""
    for values in itertools.product(*method.tune.values()):
        yield dict(zip(method.tune, values, strict=True))


def untried_rates(study: Study) -> Iterator[str]:
    """One line for each control that never has a rate of the tail which methods compared with it may have.

    Zeroth-order training of the tail has rates of another kind and is left out.
    """
    for name, control in study.methods.items():
        untried: set[float] = set()
        for method in study.methods.values():
            is_compared = method.control == name and method.run.get("algorithm") != "frozen"
            if is_compared and method.run.get("baseline") != "zeroth-order":
                untried |= tail_rates(study, method) - tail_rates(study, control)
        if untried:
            rates = " or ".join(f"{rate:g}" for rate in sorted(untried))
            yield f"the tail of {name} never learns at {rates}, others' may; what they gain may be the rate's"


def tail_rates(study: Study, method: MethodEntry) -> set[float]:
    """Learning rates that the method's tail may have; empty where the settings leave it to the default."""
    key = "tail.learning_rate"
    settled = dict(flattened(merge(study.run, method.run))).get(key)
    return set(method.tune.get(key, [] if settled is None else [settled]))


def tuning_cells(study: Study) -> list[Cell]:
    """The runs that choose."""
    tasks = [study.tune.task] if study.tune.task else list(study.tasks)
    splits = [study.tune.split] if study.tune.split else study.splits
    cells = []
    for task, split, (name, method) in itertools.product(tasks, splits, study.methods.items()):
        if not (method.tune and is_tried(study, method, split, task)):
            continue
        for choice in candidates(method):
            run = merge(study.run, study.tasks[task].run, method.run, nested(choice), study.tune.run)
            partition = study.partitions[0]
            cells.append(Cell(task, split, name, partition, study.tune.seed, run, study.tune.holdout, choice))
    return cells


def is_tried(study: Study, method: MethodEntry, split: int, task: str) -> bool:
    """Whether the method has runs there; what a whole study is tuned on counts for all."""
    is_task = not method.tasks or task in method.tasks or task == study.tune.task
    return is_task and (not method.splits or split in method.splits or split == study.tune.split)


def study_cells(study: Study, chosen: Mapping[tuple[str, int, str], dict[str, Any]]) -> list[Cell]:
    """The runs that count, seed by seed, with the settings that tuning chose."""
    cells = []
    for seed, task, split, partition in itertools.product(study.seeds, study.tasks, study.splits, study.partitions):
        for name, method in study.methods.items():
            if (method.tasks and task not in method.tasks) or (method.splits and split not in method.splits):
                continue
            choice = chosen.get((study.tune.task or task, study.tune.split or split, name), {})
            run = merge(study.run, study.tasks[task].run, method.run, nested(choice))
            cells.append(Cell(task, split, name, partition, seed, run))
    return cells


def timing_cells(study: Study, cells: list[Cell], rounds: int = 8) -> list[Cell]:
    """A few rounds of each task, split and method, for the time of a round alone on the machine."""
    short = {"rounds": rounds, "evaluation": {"every": 0, "start": False}}
    chosen = [cell for cell in cells if cell.seed == study.seeds[0] and cell.partition == study.partitions[0]]
    return [replace(cell, run=merge(cell.run, short)) for cell in chosen]


def with_seed(cell: Cell) -> dict[str, Any]:
    """The cell's run.toml."""
    return merge(cell.run, {"seed": cell.seed})


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"tail.learning_rate": 1}` as a mapping of mappings."""
    whole: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = whole
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return whole


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings one over the other, the last on top."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            below = whole.get(key)
            whole[key] = merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return whole


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`tail.learning_rate`, value."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
