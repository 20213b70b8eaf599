"""A verbalizer is the token that it becomes after the task's own words, whatever the tokenizer puts before a text."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from hosl_cloud.exceptions import VerbalizerError
from hosl_cloud.tail.building import verbalizer_rows
from hosl_protocol.run.settings import convert
from hosl_protocol.run.tasks import Task, load_preset, preset_names

ANSWERS = ("terrible", "great", "No", "Yes", "Maybe")


def merged(start: str) -> Tokenizer:
    """A BPE of letters and of the answers, each with and without `start` before it."""
    text = "".join(ANSWERS) + "textSupposeCanweinferthatDosmeantrue?\nInthprvsc,'\"-.:hwbyqkgzjx" + start
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(["<unk>", *text, "Ċ", "\n"]))}
    merges = []
    for answer in ANSWERS:
        parts = [(answer[:end], answer[end]) for end in range(1, len(answer))]
        merges += [pair for pair in (*parts, (start, answer)) if pair not in merges]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    return Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))


def sentence_piece(folder: Path) -> Path:
    """As Llama-2's and Mistral's."""
    tokenizer = merged("▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def byte_level(folder: Path) -> Path:
    tokenizer = merged("Ġ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


TASKS = [convert(load_preset(name), Task, name) for name in preset_names()]
PROMPTS = {task.name: task for task in TASKS if task.kind == "prompt-classification"}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize(("make", "start"), [(sentence_piece, "▁"), (byte_level, "Ġ")])
def test_the_presets_words_are_tokens_of_either_kind_of_tokenizer(
    tmp_path: Path, name: str, make: type, start: str
) -> None:
    path, task = make(tmp_path), PROMPTS[name]
    tokenizer = Tokenizer.from_file(str(path))
    found = [tokenizer.id_to_token(row) for row in verbalizer_rows(task, path)]
    assert found == [verbalizer.replace(" ", start) for verbalizer in task.verbalizers]


@pytest.mark.parametrize(
    ("verbalizer", "said"),
    [
        (" terribleness", "use a word of exactly one token$"),
        ("great ", "use a word of exactly one token, such as ' great'"),
        ("é", "it is no token of the model's: '<unk>' stands for all such words"),
    ],
)
def test_a_word_of_several_tokens_or_none_is_refused_with_one_that_would_do(
    tmp_path: Path, verbalizer: str, said: str
) -> None:
    task = convert({**load_preset("sst2"), "verbalizers": [" terrible", verbalizer]}, Task, "task")
    with pytest.raises(VerbalizerError, match=said):
        verbalizer_rows(task, sentence_piece(tmp_path))
