"""How figures of a run are said to people: the service, its log and the commands use the same words."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import Task, preset_fields
from hosl_protocol.run.updates import estimate_alignment

WELL_ALIGNED = 0.5
"""An estimate that points so far towards the gradient needs no advice."""


def score_text(correct: int, scored: int, examples: int, of_examples: int) -> str:
    """An accuracy, and what it is of: predictions, and how many of the held-out examples were scored if not all."""
    text = f"{100 * correct / max(scored, 1):.1f} % ({correct} of {scored} right"
    if examples < of_examples:
        text += f"; only {examples} of {of_examples} held-out examples were scored"
    return f"{text})"


def counted(count: int, noun: str) -> str:
    """`1 device`, `2 devices`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def in_line(behind: Sequence[str]) -> str:
    """Say why a run does not have its turn yet."""
    others = f", and after {counted(len(behind) - 1, 'more run')}" if len(behind) > 1 else ""
    return (
        f"in line behind run {behind[0]}{others}: of runs whose bundles hold the same, under whatever name, one trains"
    )


def device_command(address: str, token_path: Path, task: Task | None = None) -> str:
    """Write what a person types on a device, with the consent that `task` needs beyond what devices allow."""
    words = ["hosl-edge", "--server", address, "--token-file", str(token_path), "--data", "FILE"]
    if task is not None:
        if not set(task.fields) <= set(preset_fields(task.name) or ()):
            words += ["--fields", ",".join(task.fields)]
        if task.kind == "lm":
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
