"""A trained model in memory: transformers' own, what makes its inputs, and the way in which the run asked it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        likelihoods = self.likelihoods(example)
        return max(likelihoods, key=lambda label: likelihoods[label])

    def likelihoods(self, example: Any) -> dict[str, float]:
        """How likely each class of an example is, by its name; they add up to 1.

        Raises SettingsError for a task without classes.
        """
        import torch

        if self.task.scores_tokens:
            raise SettingsError("task.kind", self.task.kind, "it has no classes: use model.generate")
        with torch.no_grad():
            logits = self.model(**self._inputs(example)).logits[0]
        if self.answers:
            names, scores = self.task.labels, logits[-1, list(self.answers)]
        else:
            names = tuple(str(self.model.config.id2label[place]) for place in range(len(logits)))
            scores = logits
        return dict(zip(names, scores.float().softmax(-1).tolist(), strict=True))

    def answer(
        self, given: str, say: Callable[[str], object], *, most_tokens: int = 128, temperature: float = 0.0
    ) -> None:
        """Go on with a text, or answer a message of a conversation; `say` hears each piece as it is made.

        At temperature 0 each token is the likeliest; else it is drawn, by torch's own generator.
        Raises SettingsError for a task with classes, or a tokenizer without the template of a chat.
        """
        import torch

        if not self.task.scores_tokens:
            raise SettingsError("task.kind", self.task.kind, "it has classes, and writes no answer")
        ids = self._prompt_ids(given)
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        pad = self.tokenizer.pad_token_id
        with torch.no_grad():
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most_tokens,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                eos_token_id=self._ends(),
                streamer=_streamer(self.tokenizer, say),
                **(drawn or greedy),
            )

    def _prompt_ids(self, given: str) -> Any:
        """Ids [1, T] of what is before the answer, as the run had them."""
        if self.task.kind == "chat":
            if not self.tokenizer.chat_template:
                raise SettingsError("task.kind", "chat", "the model's tokenizer has no chat template")
            given = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": given}], tokenize=False, add_generation_prompt=True
            )
            # The template has put the text's beginning there itself.
            return self.tokenizer(given, return_tensors="pt", add_special_tokens=False).input_ids
        return self.tokenizer(given, return_tensors="pt").input_ids

    def _ends(self) -> list[int] | None:
        """Tokens that end an answer: the tokenizer's, and those that the model came with."""
        said = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])} - {None}
        return sorted(ends) or None

    def _inputs(self, example: Any) -> Any:
        if self.task.is_image:
            return self.tokenizer(example, return_tensors="pt")
        return self.tokenizer(
            self.text_of(example),
            return_tensors="pt",
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=False,
        )

    def text_of(self, example: Any) -> str:
        """Put an example into the task's template. Raises SettingsError where it has not the fields."""
        if not isinstance(example, Mapping):
            fields = ", ".join(field for field in self.task.fields if field != self.task.label_field)
            raise SettingsError("example", type(example).__name__, f"give a dict with {fields}")
        try:
            return render(self.task, example)
        except KeyError as error:
            there = ", ".join(map(repr, example)) or "none"
            raise SettingsError("example", dict(example), f"it lacks the field {error}; it has {there}") from None


def _streamer(tokenizer: Any, say: Callable[[str], object]) -> Any:
    """What gives the text of an answer piece by piece, whole characters and words."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                say(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def load_folder(folder: Path, task: Task) -> Trained:
    """Load a merged folder."""
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
