"""Conversations as text: what a model's chat template makes of messages, in a form that runs nothing.

A chat template is a program. A device takes programs from nobody, so the exporter works out the strings that the
template puts around each message, and checks that they give what the template gives (hosl_export/sources/chat.py).
The strings travel with the shard, in `shard/chat.json` (protocol/README.md, Conversations).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from hosl_protocol.run.manifest import SHARD_CHAT, BundleError

Role: TypeAlias = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""What data calls them; `human` and `gpt` stand beside `from` and `value`, as ShareGPT has it."""

THOUGHT, THOUGHT_END = "<think>", "</think>"
"""What encloses an assistant's reasoning, where the template knows of it."""


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Role
    content: str


class ChatForm(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The strings around the contents of a conversation's messages."""

    opening: str
    """Before the first user's content, where no system message comes before it."""
    system: tuple[str, str] | None = None
    """Before the system message's content, and from there to the first user's; None where the model knows none."""
    empty_system: str | None = None
    """Before the first user's content, after a system message without content; None: as `system` has it."""
    prompt: str
    """From a user's content to what the model then writes."""
    to_answer: str
    """From a user's content to the assistant's, where another message follows that."""
    to_last_answer: str
    """The same where the assistant's is the last message."""
    to_user: str
    """From an assistant's content to the next user's."""
    answer_end: str
    """With what of `to_user` the model ends its answer: up to the first special token, that token included."""
    closing: str
    """After an assistant's content at the end of the conversation."""
    closing_answer_end: str
    """As `answer_end`, of `closing`."""
    closing_user: str
    """After a user's content at the end of the conversation."""
    strips: tuple[Role, ...] = ()
    """Whose content loses blanks at both ends."""
    thinks: bool = False
    """Whether what an assistant's content has before `</think>` is reasoning. It is dropped but in the last message,
    where it stands before the `</think>` of `to_last_answer`."""


class TextForm(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """`shard/chat.json`: how answers end, and conversations look."""

    end: str | None = None
    """The token that ends a text, and an answer outside a conversation; None where the model has none."""
    chat: ChatForm | None = None
    """None where the model has no chat template, or one that no ChatForm gives."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    answers: tuple[slice, ...]
    """What of it an assistant writes: from where the model's turn begins up to the token that ends it."""


_DECODER = msgspec.json.Decoder(TextForm)


def encode_form(form: TextForm) -> bytes:
    """The form as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(form), indent=1) + b"\n"


def decode_form(data: bytes, where: str) -> TextForm:
    """Parse what the shard says. Raises BundleError."""
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where} is damaged: {error}; export the bundle again, or copy it again") from error


def load_form(folder: Path) -> TextForm:
    """Read the form of a shard in `folder`. Raises BundleError, also for a bundle from before there were any."""
    path = folder / SHARD_CHAT
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing, for an older hosl exported the bundle: export it again") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error
    return decode_form(data, str(path))


def read_messages(value: Any) -> tuple[Message, ...]:
    """Take a conversation out of an example: a system message or none, then users and assistants in turn.

    Raises ValueError with what is wrong.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError("should be a list of messages, each with role and content")
    messages = tuple(_read_message(place, entry) for place, entry in enumerate(value, 1))

    expected: Role = "user"
    for place, message in enumerate(messages, 1):
        if message.role == "system" and place == 1:
            continue
        if message.role != expected:
            raise ValueError(f"has a message of the {message.role} in place {place}, where the {expected}'s is due")
        expected = "assistant" if expected == "user" else "user"
    if all(message.role != "assistant" for message in messages):
        raise ValueError("has no message of the assistant to learn from")
    return messages


def _read_message(place: int, entry: Any) -> Message:
    names = (("role", "content"), ("from", "value"))
    found = next((pair for pair in names if isinstance(entry, Mapping) and pair[0] in entry and pair[1] in entry), None)
    if found is None:
        raise ValueError(f"has no role and content in message {place}")
    role, content = entry[found[0]], entry[found[1]]
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"has a message {place} of none of the roles system, user and assistant")
    if not isinstance(content, str):
        raise ValueError(f"has a message {place} whose content is no text")
    if entry.get("tool_calls"):
        raise ValueError(f"has a message {place} that calls tools, which no run can train on")
    return Message(_ROLES[role], content)


def render_chat(form: ChatForm, messages: Sequence[Message]) -> Rendered:
    """Make the text of a conversation that `read_messages` gave. Raises ValueError for what the form has no place for.

    It is the text that the model's chat template makes of it.
    """
    text = _opening(form, messages)
    answers = []
    turns = [message for message in messages if message.role != "system"]
    for place, message in enumerate(turns):
        is_last = place == len(turns) - 1
        content = _stripped(form, message)
        if message.role == "user":
            text += content + (form.closing_user if is_last else "")
            continue

        beginning, content = _answer(form, content, is_last=is_last)
        # The model is given the prompt, and writes the rest, such as an empty thought.
        begin = len(text) + _alike(form.prompt, beginning)
        text += beginning + content
        answers.append(slice(begin, len(text) + len(form.closing_answer_end if is_last else form.answer_end)))
        text += form.closing if is_last else form.to_user
    return Rendered(text, tuple(answers))


def _alike(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _opening(form: ChatForm, messages: Sequence[Message]) -> str:
    """What comes before the first user's content, with the system message."""
    first = messages[0]
    if first.role != "system":
        return form.opening
    if form.system is None:
        raise ValueError("has a system message, which the model's chat template does not take")
    if not first.content and form.empty_system is not None:
        return form.empty_system
    return form.system[0] + _stripped(form, first) + form.system[1]


def _stripped(form: ChatForm, message: Message) -> str:
    return message.content.strip() if message.role in form.strips else message.content


def _answer(form: ChatForm, content: str, *, is_last: bool) -> tuple[str, str]:
    """How an assistant's message begins, and what it says, with the thought in its place or dropped."""
    beginning = form.to_last_answer if is_last else form.to_answer
    if not form.thinks:
        return beginning, content

    thought, *others = content.split(THOUGHT_END)
    answer = others[-1].lstrip("\n") if others else content
    if not is_last:
        return beginning, answer
    if others:
        thought = thought.rstrip("\n").split(THOUGHT)[-1].strip("\n")
        before, after = beginning.rsplit(f"\n{THOUGHT_END}", 1)
        beginning = f"{before}{thought}\n{THOUGHT_END}{after}"
    return beginning, answer.lstrip("\n")
