"""The forms in which examples lie: each gives the same examples, and each fault is named with its place."""

from __future__ import annotations

import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hosl_edge.data import formats
from hosl_edge.data.formats import Place, Places, read_examples
from hosl_edge.data.piped import spooled
from hosl_edge.data.records import digest_of_data
from hosl_edge.exceptions import DataError

EXAMPLES = [
    {"text": 'a "quoted", text', "label": "1", "more": {"answers": ["ä", "東京"]}},
    {"text": "two\nlines", "label": "0", "more": {"answers": []}},
]
FLAT = [{"text": example["text"], "label": example["label"]} for example in EXAMPLES]


def json_lines(examples: list[Any]) -> str:
    return "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)


def table(separator: str) -> str:
    rows = ['"a ""quoted"", text"' + separator + "1", '"two\nlines"' + separator + "0"]
    return "\n".join([f"text{separator}label", *rows]) + "\n"


TEXTS = {
    "data.jsonl": json_lines(EXAMPLES),
    "data.json": json.dumps(EXAMPLES, ensure_ascii=False),
    "indented.json": json.dumps(EXAMPLES, indent=2),
    "data.csv": table(","),
    "data.tsv": table("\t"),
}


def examples_in(path: Path) -> list[Any]:
    return [example for _, example in read_examples(path)]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_each_form_gives_the_same_examples(tmp_path: Path, name: str, packed: bool, mark: str) -> None:
    content = (mark + TEXTS[name]).encode()
    path = tmp_path / f"{name}.gz" if packed else tmp_path / name
    path.write_bytes(gzip.compress(content) if packed else content)
    assert examples_in(path) == (EXAMPLES if "json" in name else FLAT)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    examples=st.lists(st.dictionaries(st.text(max_size=8), st.text(max_size=40) | st.lists(st.integers()), max_size=3)),
    indent=st.sampled_from([None, 0, 2]),
    piece=st.integers(1, 50),
)
def test_an_array_is_read_alike_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: list[Any], indent: int | None, piece: int
) -> None:
    path = tmp_path / "data.json"
    text = json.dumps(examples, indent=indent)
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(formats, "_PIECE_CHARACTERS", piece)
    found = list(read_examples(path))
    assert [example for _, example in found] == examples
    # The line is that on which the example begins.
    lines = text.split("\n")
    assert all("{" in lines[place.line - 1] for place, _ in found)


def test_a_large_array_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    with path.open("w", encoding="utf-8") as file:
        rows = ",".join(json.dumps({"text": "word " * 40, "place": place}) for place in range(40_000))
        file.write(f"[{rows}]")
    del rows
    tracemalloc.start()
    count = sum(1 for _ in read_examples(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000
    assert peak < path.stat().st_size / 4


def test_the_parts_of_a_folder_are_read_by_name(tmp_path: Path) -> None:
    for name, examples in (("b.jsonl", EXAMPLES[1:]), ("a.jsonl", EXAMPLES[:1]), ("deep/c.jsonl", EXAMPLES)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json_lines(examples), encoding="utf-8")
    (tmp_path / "README.md").write_text("about the data", encoding="utf-8")
    (tmp_path / ".hidden").write_text("x", encoding="utf-8")
    found = list(read_examples(tmp_path))
    assert [example for _, example in found] == EXAMPLES[:1] + EXAMPLES[1:] + EXAMPLES
    assert [(place.path.name, place.line) for place, _ in found] == [
        *(("a.jsonl", 1), ("b.jsonl", 1), ("c.jsonl", 1), ("c.jsonl", 2)),
    ]


def test_a_folders_digest_changes_with_each_of_its_parts(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json_lines(EXAMPLES), encoding="utf-8")
    before = digest_of_data(tmp_path)
    (tmp_path / "b.jsonl").write_text(json_lines(EXAMPLES[:1]), encoding="utf-8")
    assert digest_of_data(tmp_path) != before


def test_a_table_of_parquet_gives_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{**EXAMPLES[place % 2], "place": place} for place in range(20)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=7)
    monkeypatch.setattr(formats, "_TABLE_ROWS", 3)
    found = list(read_examples(tmp_path / "data.parquet"))
    assert [example for _, example in found] == rows
    assert [place.line for place, _ in found] == list(range(1, 21))


def test_a_folder_of_save_to_disk_gives_the_rows_of_its_parts_in_their_order(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    # As the library names them: by their number, which is not the order of their names beyond ten.
    names = [f"data-{place:05d}-of-00002.arrow" for place in (1, 0)]
    for name, rows in zip(names, (EXAMPLES[:1], EXAMPLES[1:]), strict=True):
        data = arrow.Table.from_pylist(rows)
        with arrow.ipc.new_stream(str(tmp_path / name), data.schema) as writer:
            writer.write_table(data)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (tmp_path / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text("{}", encoding="utf-8")
    assert examples_in(tmp_path) == EXAMPLES


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ("[]", "is not what datasets.save_to_disk writes"),
        ('{"_data_files": [{"filename": "../../secret.arrow"}]}', "names a file outside its folder"),
        ('{"_data_files": [{"filename": "gone.jsonl"}]}', "No such file"),
    ],
)
def test_a_damaged_folder_of_save_to_disk_is_named(tmp_path: Path, state: str, what: str) -> None:
    (tmp_path / "state.json").write_text(state, encoding="utf-8")
    with pytest.raises(DataError, match=what):
        examples_in(tmp_path)


def test_of_several_splits_one_is_to_be_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}', encoding="utf-8")
    with pytest.raises(DataError, match=r"holds the splits test, train: name one of them, such as .*/test"):
        examples_in(tmp_path)


def test_without_pyarrow_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"is read with pyarrow: pip install .*parquet"):
        examples_in(path)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("data.json", b'{"text": "a"}', "should be a JSON array of objects; with an object a line its name is .jsonl"),
        ("data.json", b"", "should be a JSON array"),
        ("data.json", b'[{"text": "a"},\n {"text": ', r"data.json:2: is not JSON \("),
        ("data.json", b'[{"text": "a"},\n "b"]', "data.json:2: should be a JSON object"),
        ("data.json", b'[{"text": "a"}', "is not JSON"),
        ("data.json", b"[" * 100_000, "nested too deeply"),
        ("data.jsonl", b'{"a": 1}\n{"a"\n', r"data.jsonl:2: is not JSON"),
        ("data.jsonl.gz", b'{"text": "a"}\n', "is not gzip, or is damaged"),
        ("data.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-20], "is not gzip, or is damaged"),
        ("data.tsv", b"text\tlabel\ngood\n", "data.tsv:2: should have 2 columns"),
        ("data.xml", b"<a/>", r"should end in .jsonl, .* or .arrow"),
    ],
)
def test_each_fault_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=what):
        examples_in(path)


def test_a_damaged_table_of_parquet_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 and nothing else that a table has PAR1")
    with pytest.raises(DataError, match=r"data.parquet: cannot be read: \w+"):
        examples_in(path)


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file of examples"):
        examples_in(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "notes.odt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds other files than examples: notes.odt; take them out"):
        examples_in(tmp_path)


def test_places_are_found_again_across_files() -> None:
    places, wanted = Places(), [Place(Path(name), line) for name in "ab" for line in (1, 3, 2**40)]
    for place in wanted:
        places.append(place)
    assert [places[index] for index in range(6)] == wanted
    with pytest.raises(IndexError):
        places[6]


PIPES: dict[str, Callable[[], bytes]] = {
    "lines": lambda: TEXTS["data.jsonl"].encode(),
    "marked": lambda: b"\xef\xbb\xbf" + TEXTS["data.jsonl"].encode(),
    "array": lambda: b"\n " + TEXTS["indented.json"].encode(),
    "packed": lambda: gzip.compress(TEXTS["data.json"].encode()),
    "table": lambda: TEXTS["data.csv"].encode(),
    "tabs": lambda: TEXTS["data.tsv"].encode(),
}


@pytest.mark.parametrize("kind", PIPES)
def test_a_pipe_is_kept_privately_while_it_is_used(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "state"
    with spooled(folder, io.BytesIO(PIPES[kind]())) as path:
        assert examples_in(path) == (FLAT if kind in ("table", "tabs") else EXAMPLES)
        assert examples_in(path), "it may be read again"
        assert path.stat().st_mode & 0o777 == 0o600
        # Another start beside this one must leave it there.
        with spooled(folder, io.BytesIO(b'{"a": 1}')):
            assert path.exists()
    assert not list(folder.iterdir())


def test_what_a_killed_process_left_of_a_pipe_is_removed(tmp_path: Path) -> None:
    if not (child := os.fork()):
        with spooled(tmp_path, io.BytesIO(b'{"text": "secret"}')):
            os._exit(9)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    with spooled(tmp_path, io.BytesIO(b'{"a": 1}')):
        assert not left.exists()


@pytest.mark.parametrize(("content", "what"), [(b"", "is empty"), (b"\x1f\x8b\x08broken", "is damaged gzip")])
def test_a_pipe_without_examples_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    with pytest.raises(DataError, match=f"standard input: {what}"), spooled(tmp_path, io.BytesIO(content)):
        pass
    assert not list(tmp_path.iterdir())
