"""What a run tells of itself: its rounds, and how its held-out data scored."""

from __future__ import annotations

from dataclasses import dataclass

from hosl_cloud.sentences import figures_text
from hosl_cloud.storage.evaluations import ClassFigures, describe_evaluation
from hosl_cloud.storage.records import Evaluation as StoredEvaluation
from hosl_protocol.run.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The score of the held-out data after a round."""

    round: int
    """0 is before the first one."""
    accuracy: float
    """Share of right predictions, 0 to 1."""
    loss: float
    """Mean cross-entropy of a prediction."""
    right: int
    """Right predictions; of the task `lm` a prediction is a token."""
    scored: int
    """All predictions."""
    examples: int = 0
    """Scored held-out examples: of devices that sent all they have."""
    of_examples: int = 0
    """Held-out examples of all devices, those that are away too."""
    perplexity: float | None = None
    """Of the task `lm`: e to the loss."""
    macro_f1: float | None = None
    """Of a task with classes: the mean of their F1."""
    classes: tuple[ClassFigures, ...] = ()
    """Of a task with classes, up to 1,000, in their order: `name`, `examples`, `accuracy`, `precision`, `f1` ..."""
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Of up to 100 classes: examples by true class (row) and predicted class (column)."""

    def __str__(self) -> str:
        # Of what was scored in part the reader has to know; else it would be in every line of a loop.
        part = f", only {self.examples} of {self.of_examples} examples scored"
        score = f"{self.right} of {self.scored} right{part if self.examples < self.of_examples else ''}"
        more = figures_text(None, self.perplexity)
        return f"accuracy {100 * self.accuracy:.1f} % ({score}), loss {self.loss:.4f}{more}"


@dataclass(frozen=True, kw_only=True)
class Round:
    """A finished round."""

    number: int
    """From 1."""
    of: int
    """Rounds of the whole run."""
    loss: float
    """Mean over the batches of this round's devices, before its step."""
    seconds: float
    bytes: int
    """On the wire, both ways, since the round before."""
    devices: int
    """How many took part."""
    evaluation: Evaluation | None = None
    """Of the held-out data after this round, where it was scored."""

    def __str__(self) -> str:
        scored = f"; {self.evaluation}" if self.evaluation is not None else ""
        return f"round {self.number} of {self.of}: loss {self.loss:.4f}, {self.seconds:.2f} s{scored}"


def as_evaluation(stored: StoredEvaluation, task: Task) -> Evaluation:
    """Make what a caller is given of what the store keeps."""
    figures = describe_evaluation(stored, task.kind, task.labels)
    return Evaluation(
        round=figures.round,
        accuracy=figures.accuracy,
        loss=figures.loss,
        right=figures.right,
        scored=figures.scored,
        examples=figures.examples,
        of_examples=figures.of_examples,
        perplexity=figures.perplexity,
        macro_f1=figures.macro_f1,
        classes=tuple(figures.classes),
        confusion=None if figures.confusion is None else tuple(map(tuple, figures.confusion)),
    )
