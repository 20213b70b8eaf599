"""Completions and conversations: which tokens are labels, and what is cut where there is no room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from hosl_edge.data.consent import check_consent
from hosl_edge.data.datasets import TextDataset
from hosl_edge.data.texts import check_first_example, load_texts
from hosl_edge.data.token_cache import load_or_tokenize
from hosl_edge.exceptions import ConsentError, DataError, UnservedError
from hosl_protocol.run.chat import ChatForm, TextForm
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.tasks import UNSCORED, Task

COMPLETION = Task(name="mine", kind="completion", template="{question}", completion="{answer}")
CHAT = Task(name="talk", kind="chat")
FORM = TextForm(
    end="</s>",
    chat=ChatForm(
        opening="<u>",
        prompt="<a>",
        to_answer="<a>",
        to_last_answer="<a>",
        to_user="</s><u>",
        answer_end="</s>",
        closing="</s>",
        closing_answer_end="</s>",
        closing_user="",
    ),
)


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Of bytes, a merge of a blank with a letter, and special tokens; one of them before each text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate([*letters, "Ġb", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "b"), ("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<u>", "<a>")])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return tokenizer


def load(
    folder: Path, tokenizer: Tokenizer, task: Task, *examples: Any, room: int = 64, prompt: int = 0, form: Any = FORM
) -> TextDataset:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    facts: dict[str, Any] = {"tensors": (), "files": (), "width": 8, "pad_token_id": 0, "prompt_tokens": prompt}
    manifest = Manifest(
        model="m", family="llama", architecture="A", split=1, blocks=2, max_length=64, train="none", **facts
    )
    return load_texts(path, task, tokenizer, room, manifest, form)


def shown(tokenizer: Tokenizer, dataset: TextDataset, place: int = 0) -> list[str]:
    """The tokens of an example; those that are labels in brackets."""
    batch = dataset.batch(np.array([place]))
    tokens = [tokenizer.id_to_token(token) for token in batch.ids_BL[0].tolist()]
    labels = batch.labels_N.tolist()
    assert all(label in (token, UNSCORED) for label, token in zip(labels, batch.ids_BL[0].tolist(), strict=True))
    return [token if label == UNSCORED else f"[{token}]" for token, label in zip(tokens, labels, strict=True)]


def test_a_completion_is_learned_up_to_its_end_and_the_prompt_is_not(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = load(tmp_path, tokenizer, COMPLETION, {"question": "x", "answer": "yz"})
    assert shown(tokenizer, dataset) == ["<s>", "x", "[y]", "[z]", "[</s>]"]


@pytest.mark.parametrize(
    ("question", "answer", "tokens"),
    [
        # As the model meets them: the prompt's tokens are what they are without a completion.
        ("xa", "b", ["<s>", "x", "a", "[b]", "[</s>]"]),
        ("x ", "b", ["<s>", "x", "Ġ", "[b]", "[</s>]"]),
        ("x", " b", ["<s>", "x", "[Ġb]", "[</s>]"]),
    ],
)
def test_no_token_lies_across_the_boundary(
    tmp_path: Path, tokenizer: Tokenizer, question: str, answer: str, tokens: list[str]
) -> None:
    assert shown(tokenizer, load(tmp_path, tokenizer, COMPLETION, {"question": question, "answer": answer})) == tokens


@pytest.mark.parametrize(
    ("room", "tokens"),
    [
        (8, ["<s>", "u", "v", "w", "x", "[y]", "[z]", "[</s>]"]),
        (6, ["<s>", "w", "x", "[y]", "[z]", "[</s>]"]),
        (4, ["<s>", "[y]", "[z]", "[</s>]"]),
        (3, ["<s>", "[y]", "[z]"]),
    ],
)
def test_a_long_prompt_loses_its_beginning_and_then_the_completion_its_end(
    tmp_path: Path, tokenizer: Tokenizer, room: int, tokens: list[str]
) -> None:
    dataset = load(tmp_path, tokenizer, COMPLETION, {"question": "uvwx", "answer": "yz"}, room=room)
    assert shown(tokenizer, dataset) == tokens


def test_without_a_token_before_it_one_of_the_prompt_stays(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    dataset = load(tmp_path, tokenizer, COMPLETION, {"question": "uvwx", "answer": "yz"}, room=2)
    assert shown(tokenizer, dataset) == ["x", "[y]"]


def test_a_token_that_ends_every_text_stands_behind_the_completion_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = [(text, tokenizer.token_to_id(text)) for text in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    dataset = load(tmp_path, tokenizer, COMPLETION, {"question": "x", "answer": "y"})
    assert shown(tokenizer, dataset) == ["<s>", "x", "[y]", "[</s>]"]


def talk(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]}


def test_of_a_conversation_the_answers_are_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = load(tmp_path, tokenizer, CHAT, talk("x", "y", "z", "w"))
    assert shown(tokenizer, dataset) == ["<u>", "x", "<a>", "[y]", "[</s>]", "<u>", "z", "<a>", "[w]", "[</s>]"]


@pytest.mark.parametrize(("room", "kept"), [(9, ["x", "y"]), (5, ["x", "y"]), (10, ["x", "y", "z", "w"])])
def test_a_long_conversation_loses_whole_exchanges(
    tmp_path: Path, tokenizer: Tokenizer, room: int, kept: list[str]
) -> None:
    whole = load(tmp_path, tokenizer, CHAT, talk(*kept))
    assert shown(tokenizer, load(tmp_path, tokenizer, CHAT, talk("x", "y", "z", "w"), room=room)) == shown(
        tokenizer, whole
    )


def test_a_first_exchange_that_is_too_long_loses_its_end(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = load(tmp_path, tokenizer, CHAT, talk("x", "yyyy"), talk("xxxx", "y"), room=4)
    assert shown(tokenizer, dataset) == ["<u>", "x", "<a>", "[y]"]
    assert (
        f"{tmp_path / 'data.jsonl'}: examples of more than 4 tokens, which are cut: 2, the first in line 1"
        in caplog.text
    )
    assert f"{tmp_path / 'data.jsonl'}: examples with nothing to learn: 1, the first in line 2" in caplog.text


def test_no_place_of_a_soft_prompt_is_a_label(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = load(tmp_path, tokenizer, COMPLETION, {"question": "x", "answer": "y"}, prompt=2, room=6)
    assert dataset.batch(np.array([0])).labels_N.tolist()[:4] == [UNSCORED] * 4
    assert shown(tokenizer, dataset)[2:] == ["<s>", "x", "[y]", "[</s>]"]


def test_batches_and_parts_of_the_data_keep_their_labels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    examples = [{"question": "x" * n, "answer": "y" * n} for n in (3, 1, 2)]
    dataset = load(tmp_path, tokenizer, COMPLETION, *examples)
    batch = dataset.batch(np.array([0, 1]))
    assert batch.lengths_B.tolist() == [4, 8], "shortest first"
    assert [label == UNSCORED for label in batch.labels_N] == [True] * 2 + [False] * 2 + [True] * 4 + [False] * 4
    part = dataset.subset(np.array([2]))
    assert shown(tokenizer, part) == shown(tokenizer, dataset, 2)
    assert dataset.labels is None


def test_labels_are_kept_with_the_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = load(tmp_path, tokenizer, COMPLETION, {"question": "x", "answer": "yz"})
    load_or_tokenize(tmp_path, "key", 0, lambda: {"train": dataset})
    kept = load_or_tokenize(tmp_path, "key", 0, lambda: pytest.fail("it is kept"))["train"]
    assert shown(tokenizer, kept) == shown(tokenizer, dataset)


@pytest.mark.parametrize(
    ("task", "example", "problem"),
    [
        (COMPLETION, {"question": "x"}, r"data.jsonl:1: has no field 'answer'"),
        (COMPLETION, {"question": "x", "answer": None}, r"data.jsonl:1: field 'answer' should be text or a number"),
        (CHAT, {"text": "x"}, r"data.jsonl:1: has no field 'messages'"),
        (CHAT, talk("x"), r"data.jsonl:1: the field 'messages' has no message of the assistant"),
        (CHAT, {"messages": [{"role": "system", "content": "s"}, *talk("x", "y")["messages"]]}, "has a system message"),
    ],
)
def test_what_is_wrong_with_an_example_is_named(
    tmp_path: Path, tokenizer: Tokenizer, task: Task, example: Any, problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        load(tmp_path, tokenizer, task, example)


def test_a_model_without_a_chat_template_serves_no_conversations(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UnservedError, match="the model has no chat template that a device can follow"):
        load(tmp_path, tokenizer, CHAT, talk("x", "y"), form=TextForm())
    dataset = load(tmp_path, tokenizer, COMPLETION, {"question": "x", "answer": "y"}, form=TextForm())
    assert shown(tokenizer, dataset) == ["<s>", "x", "[y]"]


def test_the_device_says_which_fields_it_sends_as_labels() -> None:
    fields = ("question", "answer")
    with pytest.raises(ConsentError, match="sends the text of answer itself as labels"):
        check_consent(COMPLETION, fields, share_text=False)
    check_consent(COMPLETION, fields, share_text=True)
    check_consent(COMPLETION, fields, share_text=False, share_fields=("answer",))
    everything = Task(name="mine", kind="lm", template="{question} {answer}")
    for share_text in (False, True):
        with pytest.raises(ConsentError, match="sends the text of question itself"):
            check_consent(everything, fields, share_text=share_text, share_fields=("answer",))
    with pytest.raises(ConsentError, match="sends the text of messages itself"):
        check_consent(CHAT, ("messages",), share_text=False, share_fields=("answer",))


def test_preflight_looks_at_the_first_example(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "x"}) + "\n", encoding="utf-8")
    for task, field in ((CHAT, "messages"), (COMPLETION, "question")):
        with pytest.raises(DataError, match=f"has no field '{field}'"):
            check_first_example(path, task)
