"""Conversations: which messages are taken, and what text becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hosl_protocol.run.chat import ChatForm, Message, TextForm, encode_form, load_form, read_messages, render_chat
from hosl_protocol.run.manifest import SHARD_CHAT, BundleError

FORM = ChatForm(
    opening="[U]",
    system=("[S]", "[/S][U]"),
    prompt="[A]",
    to_answer="[A]",
    to_last_answer="[A]",
    to_user="[/A]\n[U]",
    answer_end="[/A]",
    closing="[/A]\n",
    closing_answer_end="[/A]",
    closing_user="[/U]",
)


def said(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ("user", "assistant") * len(contents)
    turns = [Message(role, content) for role, content in zip(roles, contents, strict=False)]  # type: ignore[arg-type]
    return (*([] if system is None else [Message("system", system)]), *turns)


def test_a_conversation_is_its_contents_and_the_strings_around_them() -> None:
    rendered = render_chat(FORM, said("hi", "hello", "bye", "see you", system="be kind"))
    assert rendered.text == "[S]be kind[/S][U]hi[A]hello[/A]\n[U]bye[A]see you[/A]\n"
    assert [rendered.text[answer] for answer in rendered.answers] == ["hello[/A]", "see you[/A]"]


def test_a_conversation_may_end_with_the_user() -> None:
    rendered = render_chat(FORM, said("hi", "hello", "bye"))
    assert rendered.text == "[U]hi[A]hello[/A]\n[U]bye[/U]"
    assert [rendered.text[answer] for answer in rendered.answers] == ["hello[/A]"]


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("names", [("role", "content", "user", "assistant"), ("from", "value", "human", "gpt")])
def test_both_public_forms_of_messages_are_read(names: tuple[str, str, str, str]) -> None:
    role, content, user, assistant = names
    assert read_messages([{role: user, content: "a"}, {role: assistant, content: "b"}]) == said("a", "b")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("text", "should be a list of messages"),
        ([], "should be a list of messages"),
        ([{"text": "a"}], "has no role and content in message 1"),
        ([USER, {"role": "tool", "content": "a"}], "has a message 2 of none of the roles system, user and assistant"),
        ([USER, {"role": ["user"], "content": "a"}], "has a message 2 of none of the roles"),
        ([USER, {"role": "assistant", "content": ["a"]}], "has a message 2 whose content is no text"),
        ([USER, {**ANSWER, "tool_calls": [{}]}], "has a message 2 that calls tools"),
        ([USER, USER], "has a message of the user in place 2, where the assistant's is due"),
        ([ANSWER], "has a message of the assistant in place 1, where the user's is due"),
        ([USER, ANSWER, {"role": "system", "content": "a"}], "has a message of the system in place 3"),
        ([USER], "has no message of the assistant to learn from"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said(value: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_messages(value)


def test_a_damaged_or_missing_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"chat\.json is missing, for an older hosl exported the bundle"):
        load_form(tmp_path)
    path = tmp_path / SHARD_CHAT
    path.parent.mkdir()
    path.write_bytes(encode_form(TextForm(chat=FORM))[:-9])
    with pytest.raises(BundleError, match=r"chat\.json is damaged"):
        load_form(tmp_path)
