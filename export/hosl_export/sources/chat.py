"""A tokenizer's chat template as the strings that it puts around messages (hosl_protocol/run/chat.py).

A template is a program. It is asked for some conversations whose contents are marks, and what it puts around them is
the form. Then it is asked for others, with all that templates treat specially, and the form must give the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from jinja2 import TemplateError
from msgspec import structs

from hosl_protocol.run.chat import THOUGHT_END, ChatForm, Message, Role, TextForm, render_chat

_MARKS = tuple(f"\u2983{place}\u2984" for place in range(6))
"""Contents that stand in no template."""


class ChatTemplateError(Exception):
    """The template does what a ChatForm cannot say; the text says what."""


def text_form(tokenizer: Any) -> tuple[TextForm, str]:
    """Work out how the tokenizer's texts end and its conversations look, and why the latter is not known.

    A template that no form gives is no error: the model serves every other task.
    """
    try:
        chat, problem = (chat_form(tokenizer), "") if tokenizer.chat_template else (None, "")
    except ChatTemplateError as error:
        chat, problem = None, f"the model's chat template does more than put texts around messages ({error})"
    return TextForm(end=tokenizer.eos_token, chat=chat), problem


def chat_form(tokenizer: Any) -> ChatForm:
    """Work out the form of the tokenizer's chat template. Raises ChatTemplateError."""
    template = _Template(tokenizer)
    opening, closing_user = template.around("user")
    _, to_last_answer, closing = template.around("user", "assistant")
    _, to_answer, to_user, _, _ = template.around("user", "assistant", "user", "assistant")
    form = ChatForm(
        opening=opening,
        prompt=template.around("user", prompts=True)[1],
        to_answer=to_answer,
        to_last_answer=to_last_answer,
        to_user=to_user,
        answer_end=_answer_end(tokenizer, to_user),
        closing=closing,
        closing_answer_end=_answer_end(tokenizer, closing),
        closing_user=closing_user,
    )
    return _checked(template, _with_system(template, form))


def _answer_end(tokenizer: Any, text: str) -> str:
    """What of the text after an answer the model writes itself: up to its first special token."""
    tokens = (token.content for token in tokenizer.added_tokens_decoder.values())
    ends = [text.index(token) + len(token) for token in tokens if token in text]
    return text[: min(ends)] if ends else ""


class _Template:
    """What the template makes of conversations."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def text(self, messages: Sequence[Message], *, prompts: bool = False) -> str:
        """Render a conversation. Raises TemplateError where the template does not take it."""
        plain = [structs.asdict(message) for message in messages]
        text: str = self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompts)
        return text

    def around(self, *roles: Role, prompts: bool = False) -> list[str]:
        """What stands before, between and after the contents of such messages. Raises ChatTemplateError."""
        messages = [Message(role, mark) for role, mark in zip(roles, _MARKS, strict=False)]
        try:
            rest, parts = self.text(messages, prompts=prompts), []
        except TemplateError as error:
            raise ChatTemplateError(f"it refuses messages of {', '.join(roles)}: {error}") from error
        for message in messages:
            part, found, rest = rest.partition(message.content)
            if not found:
                raise ChatTemplateError(f"the messages of {', '.join(roles)} are not all in its text, in this order")
            parts.append(part)
        return [*parts, rest]


def _with_system(template: _Template, form: ChatForm) -> ChatForm:
    """Add how a system message looks, where the template takes one."""
    try:
        before, between, _ = template.around("system", "user")
    except ChatTemplateError:
        return form
    empty = template.text([Message("system", ""), Message("user", _MARKS[0])]).partition(_MARKS[0])[0]
    return structs.replace(form, system=(before, between), empty_system=None if empty == before + between else empty)


def _checked(template: _Template, form: ChatForm) -> ChatForm:
    """Find out what the template does to contents, and try the form. Raises ChatTemplateError."""
    roles = [role for role in get_args(Role) if role != "system" or form.system is not None]
    form = structs.replace(form, strips=tuple(role for role in roles if _strips(template, role)))
    problems = []
    for thinks in (False, True)[: 1 + (THOUGHT_END in form.to_last_answer)]:
        tried = structs.replace(form, thinks=thinks)
        problem = next(_differences(template, tried), None)
        if problem is None:
            return tried
        problems.append(problem)
    raise ChatTemplateError(problems[-1])


def _strips(template: _Template, role: Role) -> bool:
    """Whether the template takes the blanks off a message's ends."""
    before: list[Role] = ["user"] if role == "assistant" else []
    after: list[Role] = ["user"] if role == "system" else []
    padded = f" {_MARKS[0]} \n"
    messages = [Message(each, padded if each == role else _MARKS[1]) for each in (*before, role, *after)]
    return padded not in template.text(messages)


_CONTENTS = (
    *(
        "What is 2 + 2?",
        "  blanks around \n",
        "\n\nlines before",
        "two\nlines\n",
        "Ünïcode, 日本語, 🙂 {braces} {{ two }}",
        " ",
    ),
    *(
        "<think>\nwhy\n</think>\n\nbecause",
        "<think>why</think>because",
        "no beginning</think>\n\nend",
        "<think>\n\n</think>\n\nnone",
    ),
)
"""What templates treat specially, and what they should not."""


def _differences(template: _Template, form: ChatForm) -> Iterator[str]:
    """Say what of some conversations the form makes another text than the template does."""
    shapes: list[tuple[Role, ...]] = [("user",)]
    for turns in (1, 2, 3):
        shapes += [("user", "assistant") * turns, ("user", "assistant") * turns + ("user",)]
    if form.system is not None:
        shapes += [("system", *shape) for shape in shapes]

    for start in range(len(_CONTENTS)):
        for shape in shapes:
            contents = [_CONTENTS[(start + place) % len(_CONTENTS)] for place in range(len(shape))]
            messages = [Message(role, content) for role, content in zip(shape, contents, strict=True)]
            yield from _difference(template, form, messages)
            if shape[0] == "system":
                yield from _difference(template, form, [Message("system", ""), *messages[1:]])


def _difference(template: _Template, form: ChatForm, messages: Sequence[Message]) -> Iterator[str]:
    shown = ", ".join(f"{message.role} {message.content!r}" for message in messages)
    try:
        text = template.text(messages)
    except TemplateError as error:
        yield f"it refuses {shown}: {error}"
        return
    if text != render_chat(form, messages).text:
        yield f"its text of {shown} is not made of the strings around other messages"
