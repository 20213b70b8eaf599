"""Errors of the exporter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hosl_protocol.exceptions import ExitCode, HoslError, SettingsError


class ExportError(HoslError):
    """Root of every error that the exporter raises on purpose, beside a wrong setting.

    ExportError
    ├── ModelError           the model cannot be read, or lacks what a bundle needs: choose or repair the model
    │   └── UnknownFamily    an architecture that the exporter cannot cut
    ├── TraceError           torch or ONNX Runtime cannot run or export the model: choose another, or other versions
    ├── ParityError          shard and tail together do not compute what the uncut model computes: no bundle is left
    │   └── GradientError    a graph of the gradient does not compute what torch computes: likewise
    └── SpaceError           the disk cannot hold the bundle
    """


class ModelError(ExportError, SettingsError):
    """The model cannot be used. Stores the field, the value and the remedy."""

    exit_code = ExitCode.SETTINGS


class UnknownFamily(ModelError):
    """The exporter cannot cut models of this `model_type`. Stores why not."""

    def __init__(self, model_type: str, reason: str) -> None:
        self.reason = reason
        remedy = "use a causal language model, an encoder of text, or an image classifier of vit or resnet"
        super().__init__("architecture", model_type, f"{reason}; {remedy}")


class TraceError(ExportError):
    """Torch, its exporter or ONNX Runtime failed at a model. Stores the model's type, the step, and what was said."""

    exit_code = ExitCode.SETTINGS

    def __init__(self, model_type: str, step: str, problem: str) -> None:
        self.model_type, self.step, self.problem = model_type, step, problem
        remedy = "--no-gradients, which leaves out first-order training, " if "gradients" in step else ""
        remedy += "the tested versions of torch, transformers and onnx (constraints.txt), or another model"
        super().__init__(f"{step} of this {model_type} failed: {problem}; try {remedy}; --debug shows the whole error")


@contextlib.contextmanager
def as_trace_error(model_type: str, step: str) -> Iterator[None]:
    """Turn whatever torch, its exporter or ONNX Runtime raise, which is any type and may be pages, into a TraceError.

    Errors of hosl, of memory and of files pass through: they have their own line and exit code.
    """
    try:
        yield
    except (HoslError, MemoryError, OSError):
        raise
    except Exception as error:
        raise TraceError(model_type, step, _first_cause(error)) from error


_LONGEST = 300
"""Characters of a foreign error in our line."""


def _first_cause(error: BaseException) -> str:
    """What the first cause of an error says, in one line of at most 300 characters."""
    # Errors can be each other's context, in a circle.
    seen = [error]
    while (cause := seen[-1].__cause__ or seen[-1].__context__) is not None and cause not in seen:
        seen.append(cause)
    text = first_line(seen[-1])
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()


class ParityError(ExportError):
    """The two halves depart from the uncut model."""

    exit_code = ExitCode.BUNDLE

    def __init__(self, output: str, batch: str, error: float, tolerance: float) -> None:
        self.output, self.batch, self.error, self.tolerance = output, batch, error, tolerance
        super().__init__(
            f"shard and tail depart from the uncut model: {output} at {batch} differ by "
            f"{error:.3g} of their range, the limit is {tolerance:.3g}; no bundle was written"
        )


class GradientError(ParityError):
    """A graph of the gradient departs from torch's autograd. Stores the tensor, the batch and both numbers."""

    def __init__(self, output: str, batch: str, error: float, tolerance: float) -> None:
        super().__init__(output, batch, error, tolerance)
        self.args = (
            f"the gradient of {output} at {batch} departs from that of torch by {error:.3g} of its norm, the limit is "
            f"{tolerance:.3g}; no bundle was written (--no-gradients leaves these graphs out)",
        )


class SpaceError(ExportError):
    """Too little room for the bundle."""

    exit_code = ExitCode.RESOURCES

    def __init__(self, folder: str, needed_bytes: int, free_bytes: int) -> None:
        self.folder, self.needed_bytes, self.free_bytes = folder, needed_bytes, free_bytes
        super().__init__(
            f"the bundle takes {needed_bytes / 2**20:.0f} MiB and {folder} has {free_bytes / 2**20:.0f} MiB free: "
            "free some space or choose another --out"
        )
