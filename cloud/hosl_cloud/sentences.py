"""How figures of a run are said to people: the service, its log and the commands use the same words."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import Task, preset_fields
from hosl_protocol.run.updates import estimate_alignment

WELL_ALIGNED = 0.5
"""An estimate that points so far towards the gradient needs no advice."""


def score_text(correct: int, scored: int, examples: int, of_examples: int) -> str:
    """Say an accuracy, and what it is of: `93.8 % (75 of 80 right, 80 of 80 examples scored)`.

    `correct` and `scored` are predictions; `examples` of `of_examples` held-out examples are those that were scored,
    which an evaluation of an older version does not know.
    """
    text = f"{100 * correct / max(scored, 1):.1f} % ({correct} of {scored} right"
    if of_examples:
        only = "only " if examples < of_examples else ""
        text += f", {only}{examples} of {of_examples} examples scored"
    return f"{text})"


def figures_text(macro_f1: float | None, perplexity: float | None) -> str:
    """Say what an evaluation has beside accuracy and loss, after a comma; empty where it has nothing."""
    f1 = "" if macro_f1 is None else f", macro F1 {macro_f1:.3f}"
    return f1 if perplexity is None else f"{f1}, perplexity {perplexity:.4g}"


def evaluation_lines(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """Say an evaluation, and class by class where it has classes; `evaluation` is what the HTTP API answers."""
    score = score_text(*(evaluation[name] for name in ("right", "scored", "examples", "of_examples")))
    more = figures_text(evaluation["macro_f1"], evaluation["perplexity"])
    yield f"evaluation at round {evaluation['round']}: accuracy {score}, loss {evaluation['loss']:.4f}{more}"

    classes, confusion = evaluation["classes"], evaluation["confusion"]
    if not classes:
        return
    names = [each["name"] for each in classes]
    width = max(len(name) for name in (*names, "class"))
    yield f"{'class':<{width}}  examples  accuracy  precision     F1  most often taken for"
    for place, each in enumerate(classes):
        mistaken = "" if confusion is None else _most_taken_for(names, confusion[place], place)
        figures = f"{percent(each['accuracy']):>8}  {percent(each['precision']):>9}  {digits(each['f1']):>5}"
        yield f"{each['name']:<{width}}  {each['examples']:>8}  {figures}  {mistaken}".rstrip()


def _most_taken_for(names: Sequence[str], row: Sequence[int], place: int) -> str:
    """Name the class that a class's wrong predictions fell on most; empty where all were right."""
    wrong = [0 if column == place else count for column, count in enumerate(row)]
    most = max(wrong)
    return f"{names[wrong.index(most)]} ({most})" if most else ""


def percent(share: float | None) -> str:
    """Say a share; `-` where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def digits(value: float | None) -> str:
    """Say a figure between 0 and 1; `-` where there is none."""
    return "-" if value is None else f"{value:.3f}"


def counted(count: int, noun: str) -> str:
    """`1 device`, `2 devices`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def in_line(behind: Sequence[str]) -> str:
    """Say why a run does not have its turn yet."""
    others = f", and after {counted(len(behind) - 1, 'more run')}" if len(behind) > 1 else ""
    return (
        f"in line behind run {behind[0]}{others}: of runs whose bundles hold the same, under whatever name, one trains"
    )


def device_command(address: str, token_path: Path, task: Task | None = None, name: str = "") -> str:
    """Write what a person types on a device, with the consent that `task` needs beyond what devices allow.

    `name` is the device's, where its token has none.
    """
    words = ["hosl-edge", "--server", address, "--token-file", str(token_path)]
    words += ["--name", name] if name else []
    words += ["--data", "FILE", "--eval", "FILE"]
    if task is not None:
        if not set(task.fields) <= set(preset_fields(task.name) or ()):
            words += ["--fields", ",".join(task.fields)]
        if task.scores_answers:
            words += ["--share-fields", ",".join(task.shared_fields)]
        elif task.scores_tokens:
            words.append("--share-text")
    return shlex.join(words)


def advise(settings: RunSettings, manifest: Manifest) -> str | None:
    """Say where the exact gradient would serve a run better than its probes; None where it would not."""
    if not settings.traits.probes or not manifest.gradients:
        return None
    elements = sum(math.prod(entry.shape) for entry in manifest.trainable)
    alignment = estimate_alignment(settings.directions, elements)
    if alignment > WELL_ALIGNED:
        return None
    estimate = (
        f"an estimate from {counted(settings.directions, 'direction')} points {100 * alignment:.1f} % towards the"
    )
    return f'{estimate} gradient of the {elements:,} numbers that train; algorithm = "first-order" computes it exactly'
