"""Texts of which only some tokens are learned: a completion behind its prompt, an assistant's turns.

A completion is tokenized by itself, as the model has to write it: the prompt's tokens are what they are without it, and
no token lies across the boundary. A conversation is tokenized whole, as its chat template has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from hosl_protocol.run.chat import ChatForm, Message, read_messages, render_chat
from hosl_protocol.run.tasks import Task, fill, look_up, render


@dataclass(frozen=True)
class AnsweredText:
    """A text's token ids [L], and which of them the model is to write [L]."""

    ids: npt.NDArray[np.int32]
    is_answer: npt.NDArray[np.bool_]
    is_cut: bool
    """Whether the text was longer."""


class AnswerTokenizer:
    """Tokenizes the examples of a task of completions or conversations, cut to `room` tokens."""

    def __init__(self, task: Task, tokenizer: Tokenizer, room: int, end_id: int | None, chat: ChatForm | None) -> None:
        """`end_id` is the token that ends a completion; `chat` is needed for conversations."""
        self._task, self._tokenizer, self._room, self._end_id, self._chat = task, tokenizer, room, end_id, chat
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def tokenize(self, example: Mapping[str, Any]) -> AnsweredText:
        """Tokenize one example. Raises KeyError, TypeError and ValueError where it is not what the task reads."""
        if self._task.kind == "completion":
            return self._completion(render(self._task, example), fill(self._task.completion, example))
        assert self._chat is not None
        value = look_up(example, self._task.messages_field)
        try:
            return self._conversation(self._chat, read_messages(value))
        except ValueError as error:
            raise ValueError(f"the field {self._task.messages_field!r} {error}") from None

    def _completion(self, prompt: str, completion: str) -> AnsweredText:
        """A prompt with its special tokens in front, and the completion with the token that ends it.

        Where there is no room, the prompt loses its beginning, but not the special tokens; then the completion its end.
        """
        encoded = self._tokenizer.encode(prompt)
        special = np.array(encoded.special_tokens_mask, bool)
        ids = np.array(encoded.ids, np.int32)
        # A token that this tokenizer puts behind a text would stand between the prompt and what follows.
        ids, special = (array[: _end_of_text(special)] for array in (ids, special))
        front = int(np.argmin(special)) if not special.all() else ids.size
        answer = np.array(self._tokenizer.encode(completion, add_special_tokens=False).ids, np.int32)
        if self._end_id is not None:
            answer = np.append(answer, np.int32(self._end_id))

        # One token of the prompt stays, for the first of the answer is predicted from it.
        least = front + (0 if front or not ids.size else 1)
        is_cut = ids.size + answer.size > self._room
        answer = answer[: self._room - least]
        kept = min(ids.size - front, self._room - front - answer.size)
        ids = np.concatenate([ids[:front], ids[ids.size - kept :], answer])
        return AnsweredText(ids, np.arange(ids.size) >= ids.size - answer.size, is_cut)

    def _conversation(self, form: ChatForm, messages: tuple[Message, ...]) -> AnsweredText:
        """A conversation, without the last exchanges for which there is no room; the first one is cut at its end."""
        whole = text = self._rendered(form, messages)
        while text.ids.size > self._room and (shorter := _without_last_exchange(messages)):
            messages = shorter
            text = self._rendered(form, messages)
        is_cut = whole.ids.size > self._room
        return AnsweredText(text.ids[: self._room], text.is_answer[: self._room], is_cut)

    def _rendered(self, form: ChatForm, messages: tuple[Message, ...]) -> AnsweredText:
        rendered = render_chat(form, messages)
        # The special tokens are written out in it.
        encoded = self._tokenizer.encode(rendered.text, add_special_tokens=False)
        is_answer = np.zeros(len(encoded.ids), bool)
        for answer in rendered.answers:
            # As transformers counts: from the token of the first character to that of the last.
            first, last = encoded.char_to_token(answer.start), encoded.char_to_token(answer.stop - 1)
            if first is not None and last is not None:
                is_answer[first : last + 1] = True
        return AnsweredText(np.array(encoded.ids, np.int32), is_answer, is_cut=False)


def _end_of_text(special: npt.NDArray[np.bool_]) -> int:
    """Where the special tokens behind a text begin; those before one without any tokens stay."""
    own = np.flatnonzero(~special)
    return int(own[-1]) + 1 if own.size else special.size


def _without_last_exchange(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation up to the answer before its last one; nothing where that was its first."""
    answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
    return messages[: answers[-2] + 1] if len(answers) > 1 else ()
