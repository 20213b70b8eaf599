"""Chat templates: the form that is made of one gives the same text, ids and answers as the template itself."""

from __future__ import annotations

import random
from typing import Any

import pytest

from chat_templates import TEMPLATES, chat_tokenizer
from hosl_edge.data.answers import AnswerTokenizer
from hosl_export.sources.chat import ChatTemplateError, chat_form, text_form
from hosl_protocol.run.chat import TextForm, decode_form, encode_form
from hosl_protocol.run.tasks import Task

TASK = Task(name="chat", kind="chat")
WORDS = (
    "the",
    "answer",
    "is",
    "Ünïcode",
    "日本語",
    "🙂",
    "a  b",
    "\n",
    "\n\n",
    " ",
    "{x}",
    "{{ y }}",
    "</s>",
    "<s>",
    "42",
)


def conversation(draw: random.Random, has_system: bool) -> list[dict[str, str]]:
    """A conversation of any shape, with blanks, lines and special tokens where they hurt."""

    def content() -> str:
        return "".join(draw.choice(WORDS) + draw.choice(("", " ")) for _ in range(draw.randint(1, 8)))

    messages = []
    if has_system and draw.random() < 0.5:
        messages.append({"role": "system", "content": draw.choice(("", content()))})
    for _ in range(draw.randint(1, 4)):
        thought = draw.choice(("", "", "<think>\nso\n</think>\n\n", "<think></think>", "so it is</think>"))
        messages.append({"role": "user", "content": content()})
        messages.append({"role": "assistant", "content": thought + content()})
    if draw.random() < 0.2:
        messages.append({"role": "user", "content": content()})
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_answers_are_those_of_the_template(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    form = chat_form(tokenizer)
    answers = AnswerTokenizer(TASK, tokenizer.backend_tokenizer, 10_000, None, form)
    draw = random.Random(name)
    for _ in range(200):
        messages = conversation(draw, form.system is not None)
        wanted = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        found = answers.tokenize({"messages": messages})
        assert found.ids.tolist() == wanted["input_ids"], messages
        assert found.is_answer.astype(int).tolist() == wanted["assistant_masks"], messages
        assert not found.is_cut


def test_a_form_survives_its_file() -> None:
    form, problem = text_form(chat_tokenizer("qwen3"))
    assert problem == ""
    assert decode_form(encode_form(form), "chat.json") == form
    assert form.end == "</s>"
    assert text_form(chat_tokenizer(None)) == (TextForm(end="</s>"), "")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages | length }}", "are not all in its text"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "are not all in its text"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "is not made of the strings"),
        ("{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}", "is not made of the strings"),
        ("{% for m in messages %}{{ m.content | trim('x\n') }}|{% endfor %}", "is not made of the strings"),
        ("{{ raise_exception('never') }}", "refuses messages of user: never"),
    ],
)
def test_a_template_that_does_more_has_no_form(template: str, problem: str) -> None:
    tokenizer = chat_tokenizer(None)
    tokenizer.chat_template = template
    with pytest.raises(ChatTemplateError, match=problem):
        chat_form(tokenizer)
    form, reason = text_form(tokenizer)
    assert form.chat is None
    assert problem in reason


def test_a_template_without_a_place_for_a_system_message_has_a_form() -> None:
    tokenizer = chat_tokenizer(None)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    )
    form = chat_form(tokenizer)
    assert form.system is None
    answers = AnswerTokenizer(TASK, tokenizer.backend_tokenizer, 99, None, form)
    with pytest.raises(ValueError, match="the field 'messages' has a system message, which the model's chat template"):
        answers.tokenize({"messages": [{"role": role, "content": role} for role in ("system", "user", "assistant")]})


def test_the_model_ends_its_answer_with_the_first_special_token() -> None:
    tokenizer = chat_tokenizer("gemma")
    form = chat_form(tokenizer)
    assert (form.answer_end, form.closing_answer_end) == ("<end_of_turn>", "<end_of_turn>")
    assert form.to_user == "<end_of_turn>\n<start_of_turn>user\n"


def shown(tokenizer: Any, ids: Any) -> str:
    """The tokens as text."""
    text: str = tokenizer.decode(ids)
    return text


def test_of_a_thought_that_the_model_is_not_given_it_writes_all() -> None:
    tokenizer = chat_tokenizer("qwen3")
    answers = AnswerTokenizer(TASK, tokenizer.backend_tokenizer, 999, None, chat_form(tokenizer))
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    found = answers.tokenize({"messages": messages})
    assert shown(tokenizer, found.ids[found.is_answer]) == "<think>\n\n</think>\n\nbecause<|im_end|>"
