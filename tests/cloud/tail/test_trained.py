"""How a trained model is asked: the chat's template, the end of an answer, and drawing at a temperature."""

from __future__ import annotations

import pytest
import torch

from decoders import decoder_tokenizer, make_decoder
from hosl_cloud.tail.trained import Trained
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.tasks import Task


def trained(kind: str, seed: int = 0) -> Trained:
    """A tiny model, and a task of such a kind."""
    template = "" if kind == "chat" else "{text}"
    return Trained(
        make_decoder("llama", seed), decoder_tokenizer("gpt-2"), Task(name="t", kind=kind, template=template), 64
    )


def answer(model: Trained, text: str, **options: float) -> str:
    """All that was said."""
    pieces: list[str] = []
    model.answer(text, pieces.append, **options)
    assert len(pieces) < 2 or all(pieces)
    return "".join(pieces)


def expected(model: Trained, prompt: str, tokens: int) -> str:
    """The likeliest tokens one by one, up to the end of the text."""
    ids = model.tokenizer(prompt, add_special_tokens=False).input_ids
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return model.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_a_message_is_asked_in_the_template_of_the_tokenizer() -> None:
    model = trained("chat")
    prompt = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert answer(model, "What is 2 + 2?", most_tokens=9) == expected(model, prompt, 9)
    model.tokenizer.chat_template = None
    with pytest.raises(SettingsError, match="has no chat template"):
        answer(model, "What?")


def test_an_answer_ends_with_the_text() -> None:
    model = trained("lm")
    head = model.model.lm_head.weight = torch.nn.Parameter(model.model.lm_head.weight.clone())
    with torch.no_grad():
        head[2] = 40 * head[7]  # </s> is very likely or very unlikely, after each token
    said = answer(model, "A film", most_tokens=40)
    assert said == expected(model, "A film", 40)
    assert len(model.tokenizer(said).input_ids) < 40


def test_a_temperature_draws() -> None:
    model = trained("lm")
    assert answer(model, "A film", most_tokens=12) == answer(model, "A film", most_tokens=12)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = {answer(model, "A film", most_tokens=12, temperature=1.5) for _ in range(4)}
    assert len(drawn) > 1


def test_a_task_of_tokens_has_no_classes_and_one_of_classes_no_answer() -> None:
    with pytest.raises(SettingsError, match="it has no classes"):
        trained("lm").likelihoods({"text": "a"})
    task = Task(name="t", kind="sequence-classification", template="{text}", labels=("a", "b"))
    with pytest.raises(SettingsError, match="it has classes, and writes no answer"):
        answer(Trained(None, None, task, 8), "a")
