"""protocol/README.md against the code: every field, tensor and setting has its row, every limit its number."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from zlib import crc32

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hosl_edge.data.texts import load_texts, without_end_padding
from hosl_protocol.arithmetic.directions import Stream
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.manifest import BlockGradient, ImageEntry, Manifest, PrefixEntry, TensorEntry
from hosl_protocol.run.settings import Augmentation, ClientOptimizer, RunSettings
from hosl_protocol.run.tasks import Task, label_of, text_of_value
from hosl_protocol.weights.exact_range import MAX_COARSENING
from hosl_protocol.weights.state import SnapshotHeader
from hosl_protocol.wire.codec import MAX_HEADER_BYTES, PIECE_BYTES
from hosl_protocol.wire.connection import _ALLOWED, Phase, Role
from hosl_protocol.wire.messages import CATCH_UP_ROUNDS, FromCloud, FromEdge, Late, Refusal, Snapshot, name_of
from specification import README, section, table_below
from support import ROOT

MESSAGES = (*FromEdge.__args__, *FromCloud.__args__)
ROUND_FIELDS = {"run", "epoch", "round", "attempt", "id"}


def rows(text):
    """Per table row the name in its first cell, and the other cells."""
    found = re.findall(r"^\| (?:tensor )?`([^`]+)` \|(.*)\|$", text, re.MULTILINE)
    assert len(found) == len(dict(found)), "a row occurs twice"
    return {name: [cell.strip() for cell in row.split("|")] for name, row in found}


def test_the_contents_name_every_section_but_the_last():
    text = README.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    contents = re.findall(r"(\d+)\. \[([^]]*)\]\(#([a-z-]+)\)", text)
    assert contents == [
        (str(place), each, each.lower().replace(" ", "-")) for place, each in enumerate(headings[:-1], 1)
    ]


@pytest.mark.parametrize("kind", MESSAGES, ids=name_of)
def test_every_field_and_tensor_of_a_message_has_its_row_and_no_other_has(kind):
    text = section(f"### {kind.__name__} (`{name_of(kind)}`)").split("\n| code |")[0]
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    if fields.keys() >= ROUND_FIELDS:
        fields = {name: field for name, field in fields.items() if name not in ROUND_FIELDS}
    table = rows(text)
    assert list(table) == [*fields, *kind.tensors]
    for name, field in fields.items():
        assert table[name][2].startswith("yes") == field.required, name
    for name, spec in kind.tensors.items():
        dtype = spec.dtypes[0] if len(spec.dtypes) == 1 else "wire dtype"
        assert table[name][0] == f"{dtype} [{', '.join(spec.shape)}]"


def test_the_fields_of_a_rounds_messages_have_their_rows():
    assert set(rows(section("### A round's messages"))) == ROUND_FIELDS


def test_every_setting_has_its_row():
    parts = re.split("^`(?:client|augmentation|task)`, ", section("## Run settings"), flags=re.MULTILINE)
    for kind, part in zip((RunSettings, ClientOptimizer, Augmentation, Task), parts, strict=True):
        assert list(rows(part)) == [field.name for field in msgspec.structs.fields(kind)]


def test_every_field_of_a_snapshot_has_its_row():
    parts = section("## Snapshots").split("`__metadata__`")
    for kind, part in zip((Snapshot, SnapshotHeader), parts, strict=True):
        table = rows(part)
        assert list(table) == [field.name for field in msgspec.structs.fields(kind)]
        assert all(table[f.name][2].startswith("yes") == f.required for f in msgspec.structs.fields(kind))


def test_every_field_of_the_manifest_has_its_row():
    table = rows(section("## Manifest").partition("\nA tensor has\n")[0])
    assert list(table) == [field.name for field in msgspec.structs.fields(Manifest)]
    assert all(table[f.name][2].startswith("yes") == f.required for f in msgspec.structs.fields(Manifest))


@pytest.mark.parametrize("kind", [TensorEntry, ImageEntry, PrefixEntry, BlockGradient])
def test_every_field_of_the_manifests_entries_is_named_below_its_table(kind):
    text = section("## Manifest").partition("\nA tensor has\n")[2]
    assert [f.name for f in msgspec.structs.fields(kind) if f"`{f.name}`" not in text] == []


@pytest.mark.parametrize("kind", [Refusal, Late])
def test_every_code_is_explained(kind):
    (code,) = (field.type for field in msgspec.structs.fields(kind) if field.name == "code")
    text = section(f"### {kind.__name__} (`{name_of(kind)}`)").split("\n| code |")[1]
    cells = re.findall(r"^\| (`[^|]+) \| [^|]* \|", text, re.MULTILINE)
    assert set(re.findall("`([a-z-]+)`", " ".join(cells))) == set(code.__args__)


def test_the_cloud_refuses_with_the_retry_of_the_codes_row():
    table = dict(
        re.findall(r"^\| `([a-z-]+)` \| [^|]* \| ([^|]*) \|$", section("### Refusal (`refusal`)"), re.MULTILINE)
    )
    said: dict[str, set[str]] = {}
    for path in (ROOT / "cloud").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Refusal":
                given = {each.arg: each.value for each in call.keywords}
                assert isinstance(given["code"], ast.Constant)
                assert isinstance(given["retry"], ast.Constant)
                said.setdefault(given["code"].value, set()).add(str(given["retry"].value).lower())
    assert {code: set(re.findall("true|false", retry)) for code, retry in table.items()} == said


def test_texts_are_cut_as_the_rows_say(tmp_path):
    words = {"<s>": 0, "</s>": 1, **{word: 2 + place for place, word in enumerate("abcdef")}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    manifest = Manifest(
        model="m", family="f", architecture="a", split=1, blocks=2, width=4, max_length=16, pad_token_id=9,
        train="none", tensors=(), files=(),
    )  # fmt: skip
    table = re.findall(
        r"^\| `([a-f ]+)` \| (\d+) \| ([^|]+) \| (\d) \| ([\d ]+) \|$", section("## Batches"), re.MULTILINE
    )
    assert len(table) == 4
    for text, length, kinds, prompt_tokens, ids in table:
        (tmp_path / "data.jsonl").write_text(json.dumps({"text": text, "label": "0"}))
        for kind in re.findall("`([a-z-]+)`", kinds) or ("prompt-classification", "sequence-classification", "lm"):
            task = Task(name="t", kind=kind, template="{text}", labels=("0", "1"))
            shard = msgspec.structs.replace(manifest, prompt_tokens=int(prompt_tokens))
            dataset = load_texts(tmp_path / "data.jsonl", task, tokenizer, int(length), shard)
            assert dataset.ids.tolist() == list(map(int, ids.split())), (kind, ids)


def test_padding_at_the_end_of_a_text_is_cut_as_the_sentence_says():
    found = re.findall(r"(\d[\d ]*) becomes (\d[\d ]*\d|\d)", section("## Batches"))
    assert len(found) == 2
    for text, left in found:
        assert without_end_padding(np.array(text.split(), np.int32), 9).tolist() == list(map(int, left.split()))


def test_labels_are_found_as_the_rows_say():
    text = section("## Run settings")
    lists = re.search(r"With `labels` (`[^ ]+`, `[^ ]+`) and `label_names` (`[^ ]+`, `[^ ]+`):", text)
    assert lists
    labels, names = (tuple(re.findall("`([^`]+)`", each)) for each in lists.groups())
    task = Task(name="t", kind="sequence-classification", template="{text}", labels=labels, label_names=names)
    table = re.findall(r"^\| (`[^|]+`) \| (\d|an error) \|$", text, re.MULTILINE)
    assert [label for _, label in table] == ["0", "1", "an error"]
    for values, label in table:
        for value in re.findall("`([^`]+)`", values):
            example = {"label": json.loads(value)}
            if label == "an error":
                with pytest.raises(ValueError, match="one of 0, 1"):
                    label_of(task, example)
            else:
                assert label_of(task, example) == int(label), value


def test_limits_are_those_of_the_code():
    text = section("## Frames")
    assert f"| header length | u64 | bytes | yes | {MAX_HEADER_BYTES};" in text
    assert f"1 to {PIECE_BYTES} bytes" in text
    assert f"at most {CATCH_UP_ROUNDS}, and no more than fit" in text
    assert f"up to {MAX_COARSENING} more" in section("## Snapshots")
    words = section("## Random words")
    assert f"of `pi-1` it is `{crc32(b'pi-1'):08x}`" in words
    streams = re.findall(r"^\| [a-z ]+ \| (\d) \|", words, re.MULTILINE)
    assert streams == [str(int(stream)) for stream in Stream]


def test_each_phase_has_what_each_side_may_say_in_it():
    table = {
        phase: (set(re.findall(r"[a-z-]+", edge)), set(re.findall(r"[a-z-]+", cloud)))
        for phase, edge, cloud, _ in table_below("## Course of a connection")
    }
    named = {name_of(kind) for kind in MESSAGES}
    in_a_round = table["active"][1] & named - {"complete", "refusal"}
    for phase in Phase:
        edge, cloud = (words & named for words in table[phase.value])
        cloud |= in_a_round if phase is Phase.JOINING else set()
        assert edge == {name_of(kind) for kind in _ALLOWED.get((Role.EDGE, phase), ())}
        assert cloud == {name_of(kind) for kind in _ALLOWED.get((Role.CLOUD, phase), ())}


GOLDEN = re.compile(
    r"[0-9a-f]{64}|`[+-]{16}`|`[0-9a-f]{16}`|0\.\d{15,}|\{\"__metadata__\".*|^[0-9a-f]+(?: [0-9a-f]+)*$", re.MULTILINE
)


def test_golden_vectors_are_those_of_the_tests():
    """The tests spell the same bits, bytes and digests, perhaps over several lines."""
    sources = [path for path in Path(__file__).parent.rglob("test_*.py") if path.name != "test_readme.py"]
    tests = "".join(path.read_text(encoding="utf-8") for path in sources)
    tests = re.sub(r"'\s*\n\s*r'", "", tests)
    golden = [vector.strip("`") for vector in GOLDEN.findall(README.read_text(encoding="utf-8"))]
    assert len(golden) > 25
    assert [vector for vector in golden if vector not in tests] == []


def test_a_value_becomes_the_text_of_its_row():
    table = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|$", section("## Text of a value"), re.MULTILINE)
    assert len(table) == 13
    for values, text in table:
        expected = None if text == "an error" else text.strip("`")
        if found := re.fullmatch(r"`(\d+)` and (\d+) times `(\d)`", text):
            expected = found[1] + int(found[2]) * found[3]
        for value in re.findall("`([^`]+)`", values):
            assert text_of_value(json.loads(value)) == expected, value


@pytest.mark.parametrize(
    "page", sorted(README.parents[1].glob("*/*.md")), ids=lambda page: f"{page.parent.name}/{page.name}"
)
def test_shell_lines_quote_their_variables(page):
    """A folder's name may have a space."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert [found for block in blocks for found in re.findall(r"[^\"]\$[A-Z]\w*.*", block)] == []


@pytest.mark.parametrize(("page", "never"), [("protocol/exit-codes.md", set()), ("edge/README.md", {ExitCode.RANKS})])
def test_every_exit_code_has_its_row_on_each_page_that_lists_them(page, never):
    table = (ROOT / page).read_text(encoding="utf-8").split("\n| code | meaning |", 1)[1].split("\n\n", 1)[0]
    codes = re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)
    assert [int(code) for row in codes for code in row.split(",")] == sorted(set(ExitCode) - never)
