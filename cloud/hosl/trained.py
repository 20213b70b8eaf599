"""A trained model in memory: transformers' own, what makes its inputs, and the way in which the run asked it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosl.extras import needs
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.tasks import Task, render

_AUTO = {
    "sequence-classification": ("AutoModelForSequenceClassification", "AutoTokenizer"),
    "image-classification": ("AutoModelForImageClassification", "AutoImageProcessor"),
}
"""What loads a merged folder, by the kind of task; a language model for the others."""


@dataclass(frozen=True)
class Trained:
    """A model and its tokenizer; `model, tokenizer = run.model()` takes the two."""

    model: Any
    """Of transformers, in eval mode; where the device trained a soft prompt, PEFT's model around it."""
    tokenizer: Any
    """Of images the image processor."""
    task: Task
    max_length: int
    """Tokens to which the run cut a text; 0 for images."""
    answers: tuple[int, ...] = ()
    """The token that stands for each label of a prompt."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    def classify(self, example: Any) -> str:
        """Name the class of an example, a dict as the run had them, or of a picture, as the run's evaluation did.

        Raises SettingsError for a task without classes.
        """
        import torch

        if self.task.scores_tokens:
            raise SettingsError("task.kind", self.task.kind, "it has no classes: use model.generate")
        with torch.no_grad():
            logits = self.model(**self._inputs(example)).logits[0]
        if self.answers:
            return self.task.labels[int(logits[-1, list(self.answers)].argmax())]
        return str(self.model.config.id2label[int(logits.argmax())])

    def _inputs(self, example: Any) -> Any:
        if self.task.is_image:
            return self.tokenizer(example, return_tensors="pt")
        if not isinstance(example, Mapping):
            fields = ", ".join(field for field in self.task.fields if field != self.task.label_field)
            raise SettingsError("example", type(example).__name__, f"give a dict with {fields}")
        try:
            text = render(self.task, example)
        except KeyError as error:
            there = ", ".join(map(repr, example)) or "none"
            raise SettingsError("example", dict(example), f"it lacks the field {error}; it has {there}") from None
        return self.tokenizer(
            text,
            return_tensors="pt",
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=False,
        )


def load_trained(folder: Path, task: Task) -> Trained:
    """Load a merged folder."""
    with needs("Run.model", "cloud"):
        import transformers

        from hosl_cloud.tail.card import TASK
        from hosl_cloud.tail.merge import PROMPT_FOLDER
        from hosl_export.sources.loading import quiet_transformers

    facts: dict[str, Any] = json.loads((folder / TASK).read_text(encoding="utf-8"))
    side = {"truncation_side": facts["truncation_side"]} if "truncation_side" in facts else {}
    auto, reader = _AUTO.get(task.kind, ("AutoModelForCausalLM", "AutoTokenizer"))
    with quiet_transformers():
        model = getattr(transformers, auto).from_pretrained(folder)
        if (folder / PROMPT_FOLDER).exists():  # a soft prompt is no part of the model
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, folder / PROMPT_FOLDER)
        tokenizer = getattr(transformers, reader).from_pretrained(folder, **side)
    answers = tuple(facts.get("verbalizer_tokens", ()))
    return Trained(model.eval(), tokenizer, task, facts.get("max_length", 0), answers)
