"""Data files: what is read, how batches look, and how every fault is named."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hosl_edge.data.consent import check_consent
from hosl_edge.data.datasets import TextDataset
from hosl_edge.data.formats import read_examples
from hosl_edge.data.records import digest_of_data
from hosl_edge.data.texts import load_texts
from hosl_edge.exceptions import ConsentError, DataError, UnservedError
from hosl_protocol.run.manifest import Manifest, TensorEntry
from hosl_protocol.run.tasks import Task

TASK = Task(
    name="reviews",
    kind="prompt-classification",
    template="{text} it was",
    labels=("0", "1"),
    verbalizers=("bad", "good"),
)


@pytest.fixture
def tokenizer() -> Tokenizer:
    words = ["<unk>", "<s>", "<pad>", "good", "bad", "film", "it", "was"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def load(
    path: Path, tokenizer: Tokenizer, task: Task = TASK, max_length: int = 8, prompt_tokens: int = 0
) -> TextDataset:
    return load_texts(path, task, tokenizer, max_length, manifest(prompt_tokens=prompt_tokens))


def manifest(**facts: Any) -> Manifest:
    return Manifest(
        model="m",
        family="llama",
        architecture="LlamaForCausalLM",
        split=1,
        blocks=2,
        width=8,
        max_length=64,
        pad_token_id=2,
        train="none",
        files=(),
        **{"inputs": ("input_ids",), "tensors": (), **facts},
    )


def write(folder: Path, text: str, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_batch_is_padded_on_the_right_and_sorted_by_length(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, '{"text": "good film film", "label": 1}\n\n{"text": "bad", "label": "0"}\n')
    dataset = load(path, tokenizer)
    batch = dataset.batch(np.array([0, 1]))
    assert batch.lengths_B.tolist() == [3, 5]
    assert batch.ids_BL.tolist() == [[4, 6, 7, 2, 2], [3, 5, 5, 6, 7]]
    assert batch.labels_N.tolist() == [0, 1]
    assert batch.tokens == 8


def test_a_long_prompt_loses_its_beginning_but_keeps_its_special_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = write(tmp_path, '{"text": "good good good good good bad", "label": 1}\n')
    assert load(path, tokenizer, max_length=5).ids.tolist() == [1, 3, 4, 6, 7]


def test_a_length_that_special_tokens_fill_and_more_is_not_served(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <s> <s>", special_tokens=[("<s>", 1), ("<pad>", 2)]
    )
    path = write(tmp_path, '{"text": "good film", "label": "1"}')
    assert load(path, tokenizer, max_length=5, prompt_tokens=2).ids.size == 5
    with pytest.raises(UnservedError, match=r"max_length is 4: .* take 5 places"):
        load(path, tokenizer, max_length=4, prompt_tokens=2)


CLASSES = Task(name="x", kind="sequence-classification", template="{text}", labels=("0", "1"))


@pytest.mark.parametrize(
    ("task", "facts", "ids"),
    [
        (CLASSES, {}, [[3, 2, 5], [4], [2]]),
        (CLASSES, {"inputs": ("input_ids", "attention_mask")}, [[3, 2, 5, 2], [4, 2, 2], [2]]),
        (CLASSES, {"prompt_tokens": 1}, [[2, 3, 2, 5, 2], [2, 4, 2, 2], [2, 2]]),
        (TASK, {}, [[3, 2, 5, 2], [4, 2, 2], [2]]),
    ],
)
def test_a_causal_classifiers_text_ends_before_padding_that_the_tokenizer_puts_there(
    tmp_path: Path, tokenizer: Tokenizer, task: Task, facts: dict[str, Any], ids: list[list[int]]
) -> None:
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <pad>", special_tokens=[("<pad>", 2)])
    rows = '{"text": "good <pad> film", "label": 0}\n{"text": "bad <pad>", "label": 1}\n{"text": "", "label": 0}\n'
    bare = msgspec.structs.replace(task, template="{text}")
    dataset = load_texts(write(tmp_path, rows), bare, tokenizer, 8, manifest(**facts))
    parts = [dataset.ids[first:end].tolist() for first, end in pairwise(dataset.offsets)]
    assert parts == ids


@pytest.mark.parametrize("task", [CLASSES, TASK], ids=["classes", "prompt"])
def test_a_text_with_a_token_that_the_model_has_no_embedding_for_is_named(
    tmp_path: Path, tokenizer: Tokenizer, task: Task
) -> None:
    tokenizer.add_special_tokens(["<image>"])
    table = TensorEntry(name="embed", shape=(8, 4), trainable=False, lookup=True)
    path = write(tmp_path, '{"text": "good film", "label": 1}\n{"text": "a <image> it", "label": 0}\n')
    with pytest.raises(DataError, match=r"data.jsonl:2: the text has the special token '<image>'.* no embedding"):
        load_texts(path, task, tokenizer, 8, manifest(tensors=(table,)))


def test_a_long_text_of_other_tasks_loses_its_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = Task(name="x", kind="sequence-classification", template="{text}", labels=("a", "b"))
    path = write(tmp_path, '{"text": "good bad film it", "label": "b"}\n')
    assert load(path, tokenizer, task, max_length=2).ids.tolist() == [3, 4]


def test_labels_of_next_token_training_are_the_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, '{"text": "good film"}\n{"text": "bad film it"}\n')
    dataset = load(path, tokenizer, Task(name="lm", kind="lm", template="{text}"))
    batch = dataset.batch(np.array([1, 0]))
    assert batch.labels_N.tolist() == [3, 5, 4, 5, 6]
    assert batch.labels_N.size == batch.tokens


def test_csv_is_read_like_json_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, 'text,label\n"good, film",1\nbad,0\n', "data.csv")
    dataset = load(path, tokenizer)
    assert len(dataset) == 2
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", None, "holds no examples"),
        ('{"text": "good", "label": 1}\n{"text": "good"}\n', 2, "has no field 'label'"),
        ('{"label": 1}\n', 1, "has no field 'text'"),
        ('{"text": "good", "label": 7}\n', 1, "the label in 'label' is not one of 0, 1"),
        ('{"text": "good", "label": 1}\n{"text": NaN, "label": 1}\n', 2, "'text' .* is a number that is not finite"),
        ('{"text": 1e999, "label": 1}\n', 1, "it is a number that is not finite"),
        ('{"text": null, "label": 1}\n', 1, "it is null"),
        ('{"text": "good", "label": "a good one"}\n', 1, "the label in 'label' is not one of 0, 1"),
        ('{"text": "x", "good morning": 1}\n', 1, "has no field 'label'; it has 'text' and others"),
        ('{"text": "good", "label": 1}\n{"text"\n', 2, "is not JSON"),
        ("[1]\n", 1, "should be a JSON object"),
    ],
)
def test_a_fault_is_named_with_file_and_line(
    tmp_path: Path, tokenizer: Tokenizer, text: str, line: int | None, what: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=what) as caught:
        load(path, tokenizer)
    place = str(path) if line is None else f"{path}:{line}"
    assert str(caught.value).startswith(f"{place}: ")
    assert "good" not in str(caught.value), "an error must not quote the text"


def test_a_text_with_too_few_tokens_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, '{"text": "good film"}\n{"text": "good"}\n')
    with pytest.raises(DataError, match=r":2: the text comes to 1 tokens"):
        load(path, tokenizer, Task(name="texts", kind="lm", template="{text}"))


def test_a_text_without_tokens_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, '{"text": "good", "label": 1}\n{"text": "  ", "label": 1}\n')
    with pytest.raises(DataError, match=r":2: the text comes to 0 tokens"):
        load(path, tokenizer, CLASSES)


def test_examples_without_text_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    load(write(tmp_path, "text,label\ngood,1\n,0\n bad,1\n  ,0\n", "gaps.csv"), tokenizer)
    assert "gaps.csv: examples without text: 2, the first in line 3" in caplog.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("semicolons.csv", 'text;label\n"good; film";1\n'),
        ("tabs.csv", "text\tlabel\ngood, film\t1\n"),
        ("marked.csv", "\ufefftext,label\r\ngood film,1.0\r\n"),
        ("UPPER.CSV", "text,label\ngood film,1\n"),
        ("marked.jsonl", '\ufeff{"text": "good film", "label": 1.0}\n'),
        ("UPPER.JSONL", '{"text": "good film", "label": "1"}\n'),
    ],
)
def test_what_other_programs_write_is_read(tmp_path: Path, tokenizer: Tokenizer, name: str, text: str) -> None:
    dataset = load(write(tmp_path, text, name), tokenizer)
    assert (len(dataset), dataset.labels is not None and dataset.labels.tolist()) == (1, [1])
    assert [each for each in dataset.ids.tolist() if each] == [3, 5, 6, 7], "without what is unknown"


def test_a_long_cell_of_a_table_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, f"text,label\n{'good film ' * 20_000},1\n", "long.csv")
    assert load(path, tokenizer).ids.tolist() == [3, 5, 3, 5, 3, 5, 6, 7]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "Dear support,technical\ngood,1\n",
            "has no field 'text'; the first line should name the columns, and names 2",
        ),
        ("Text,label\ngood,1\n", "has no field 'text'; .* of them 'Text'"),
        ("Dear support,,\ngood,1,1\n", "names two columns alike"),
        ("text;label\n'good';1\n\"good;\";;1", "should have 2 columns"),
        ('text;label\n"good" morning;1\n', "is not CSV with semicolons"),
    ],
)
def test_a_table_that_is_not_as_it_should_be_is_named_without_its_data(
    tmp_path: Path, tokenizer: Tokenizer, text: str, what: str
) -> None:
    with pytest.raises(DataError, match=what) as caught:
        load(write(tmp_path, text, "data.csv"), tokenizer)
    assert not any(word in str(caught.value) for word in ("Dear", "technical", "good", "morning"))


def test_a_class_without_examples_is_told(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    load(write(tmp_path, '{"text": "good", "label": 1}\n'), tokenizer)
    assert "data.jsonl: no example of 0" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("data.csv", "text,label\ngood\n", "should have 2 columns"),
        ("data.csv", 'text,label\n"good,1\n', "is not CSV"),
        ("data.txt", "good", "should end in .jsonl"),
    ],
)
def test_a_broken_table_is_named(tmp_path: Path, name: str, text: str, what: str) -> None:
    with pytest.raises(DataError, match=what):
        list(read_examples(write(tmp_path, text, name)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        list(read_examples(tmp_path / "absent.jsonl"))


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_examples(path))


def test_a_task_may_only_read_the_fields_of_the_shipped_preset() -> None:
    check_consent(TASK, None, share_text=False)
    curious = Task(name="reviews", kind="prompt-classification", template="{text} {diary}", labels=("0", "1"))
    with pytest.raises(ConsentError, match="diary"):
        check_consent(curious, None, share_text=False)
    check_consent(curious, ("text", "diary", "label"), share_text=False)


def test_an_unknown_task_needs_the_fields_named() -> None:
    task = Task(name="mine", kind="sequence-classification", template="{note}", labels=("0", "1"))
    with pytest.raises(ConsentError, match="--fields"):
        check_consent(task, None, share_text=False)
    check_consent(task, ("note", "label"), share_text=False)


def test_text_is_shared_only_where_the_device_agrees() -> None:
    task = Task(name="lm", kind="lm", template="{text}")
    with pytest.raises(ConsentError, match="--share-text"):
        check_consent(task, None, share_text=False)
    check_consent(task, None, share_text=True)


def test_the_data_digest_is_of_what_a_file_holds_and_a_missing_file_is_named(tmp_path: Path) -> None:
    contents = {"a.jsonl": "1", "b.jsonl": "2", "c.jsonl": "1"}
    one, two, same = (write(tmp_path, text, name) for name, text in contents.items())
    assert digest_of_data(one) == digest_of_data(same) != digest_of_data(two)
    with pytest.raises(DataError, match=r"nope.jsonl: No such file"):
        digest_of_data(tmp_path / "nope.jsonl")


@pytest.mark.parametrize("kind", ["prompt-classification", "lm"])
def test_a_soft_prompts_places_come_first_and_count(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    task = TASK if kind != "lm" else Task(name="texts", kind="lm", template="{text}")
    path = write(tmp_path, '{"text": "good bad good bad good", "label": 1}\n')
    whole, cut = (load(path, tokenizer, task, length).ids.tolist() for length in (64, 6))
    with_prompt = load(path, tokenizer, task, max_length=6, prompt_tokens=2)
    room = whole[-4:] if kind != "lm" else whole[:4]
    assert with_prompt.ids.tolist() == [2, 2, *room]
    assert len(cut) == min(6, len(whole)), "without a prompt there is more room"
    batch = with_prompt.batch(np.array([0]))
    assert batch.lengths_B.tolist() == [6]
    assert batch.labels_N.tolist() == ([2, 2, *room] if kind == "lm" else [1])
