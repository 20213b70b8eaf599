"""`hosl-edge data`: what a run would read of a file, shown before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from answers import answering
from hosl_edge.__main__ import main
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.chat import TextForm, encode_form
from hosl_protocol.run.manifest import (
    MANIFEST,
    SHARD_CHAT,
    SHARD_TOKENIZER,
    FileEntry,
    ImageEntry,
    Manifest,
    encode_manifest,
    sha256_of_file,
)
from hosl_protocol.run.tasks import load_preset

View = Callable[..., tuple[int, Any]]


def write_shard(folder: Path, **facts: Any) -> Path:
    """A folder with what of a bundle tells how texts are read: letters are tokens, and so is an end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    (folder / "shard").mkdir(parents=True)
    tokenizer.save(str(folder / SHARD_TOKENIZER))
    (folder / SHARD_CHAT).write_bytes(encode_form(TextForm(end="</s>", chat=None)))
    large = folder / "shard" / "shard.onnx"
    large.write_bytes(b"weights")
    entries = tuple(
        FileEntry(path=name, size_bytes=(folder / name).stat().st_size, sha256=sha256_of_file(folder / name))
        for name in (SHARD_TOKENIZER, SHARD_CHAT, "shard/shard.onnx")
    )
    given: dict[str, Any] = {"family": "llama", "max_length": 40, "files": entries, **facts}
    manifest = Manifest(
        model="m", architecture="A", split=1, blocks=2, width=8, pad_token_id=0, train="none", tensors=(), **given
    )
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))
    return folder


@pytest.fixture
def view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> View:
    """Ask for a file's view as JSON, or with `text` as people see it."""
    folder = write_shard(tmp_path / "bundle")

    def ask(path: Path, *options: str, text: bool = False) -> tuple[int, Any]:
        code = main(["data", str(path), "--shard", str(folder), *options, *([] if text else ["--json"])])
        out, error = capsys.readouterr()
        return code, (out or error) if text or code else json.loads(out)

    return ask


def write(path: Path, *examples: Any) -> Path:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return path


REVIEWS = [{"text": "good", "label": 1}, {"text": "bad\nfilm", "label": 0}, {"text": "x" * 90, "label": 1}]


def test_counts_labels_lengths_and_cuts_are_those_of_the_run(view: View, tmp_path: Path) -> None:
    code, found = view(write(tmp_path / "d.jsonl", *REVIEWS), "--task", "sequence-classification", "--ids")
    assert code == 0
    assert (found["examples"], found["max_length"], found["cut"], found["learned"]) == (3, 40, 1, None)
    assert sum(found["labels"].values()) == 3
    assert found["tokens"] == {"median": 8, "most": 40, "longest": 40, "sum": 52}
    assert [example["line"] for example in found["shown"]] == [1, 2, 3]
    assert found["shown"][1]["parts"] == [["bad\nfilm", False]]
    assert len(found["shown"][2]["ids"]) == 40


def test_people_see_which_text_is_learned(view: View, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "two and two?\n", "completion": "four"})
    code, text = view(path, "--task", "completion", text=True)
    assert code == 0
    assert "learned   5 of 18 tokens" in text
    assert text.endswith("example 1: d.jsonl, line 1\n  read      two and two?\n\n  learned   four</s>\n")


def test_what_a_terminal_would_obey_is_shown_as_its_escape(view: View, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"text": "a\x1b[2Jb", "label": 0})
    _, text = view(path, "--task", "sequence-classification", text=True)
    assert "\x1b" not in text
    assert r"a\x1b[2Jb" in text


def test_a_shorter_length_cuts_more_and_one_beyond_the_bundles_is_refused(view: View, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *REVIEWS)
    options = ("--task", "sequence-classification", "--max-length")
    assert view(path, *options, "6")[1]["cut"] == 2
    code, error = view(path, *options, "41")
    assert code == ExitCode.SETTINGS
    assert "use 1 to 40" in error


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ((), "give --task and the name of a shipped task"),
        (("--task", "nothing"), "use one of"),
        (("--task", "cifar10"), "the bundle's model takes texts, and the task has images"),
        (("--task", "chat"), "has no chat template"),
        (("--task", "sst2"), "d.jsonl:1: has no field 'sentence'"),
    ],
)
def test_each_fault_has_its_line(view: View, tmp_path: Path, options: tuple[str, ...], what: str) -> None:
    code, error = view(write(tmp_path / "d.jsonl", *REVIEWS), *options)
    assert code
    assert what in error


def test_images_are_counted_by_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = ImageEntry(channels=3, height=4, width=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    folder = write_shard(tmp_path / "bundle", family="vit", image=image, inputs=("pixel_values",))
    np.savez(tmp_path / "d.npz", images=np.zeros((3, 4, 4, 3), np.uint8), labels=np.array([2, 0, 2]))
    assert main(["data", str(tmp_path / "d.npz"), "--shard", str(folder), "--task", "cifar10"]) == 0
    out = capsys.readouterr().out
    assert "3 examples for the task cifar10" in out
    assert "airplane: 1; automobile: 0; bird: 2" in out
    assert "tokens" not in out


def test_the_service_tells_what_its_run_reads_and_no_weights_are_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shard(tmp_path / "bundle")
    (tmp_path / "token").write_text("secret", encoding="ascii")
    (tmp_path / "token").chmod(0o600)
    path = write(tmp_path / "d.jsonl", *REVIEWS)
    with answering() as answers:
        for name in (MANIFEST, SHARD_TOKENIZER, SHARD_CHAT):
            answers.by_path[f"/v1/bundle/{name}"] = 200, {}, (folder / name).read_bytes()
        offer = {"task": load_preset("sequence-classification"), "max_length": 12}
        answers.by_path["/v1/device/pi"] = 200, {}, json.dumps(offer).encode()
        common = ["--server", f"ws://127.0.0.1:{answers.port}", "--token-file", str(tmp_path / "token")]
        common += ["--name", "pi", "--cache-dir", str(tmp_path / "cache"), "--json"]
        assert main(["data", "--data", str(path), *common]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["examples"], found["max_length"], found["cut"]) == (3, 12, 1)
        assert not any(asked.endswith(".onnx") for asked in answers.asked)

        # No run waits for it.
        answers.by_path["/v1/device/pi"] = 200, {}, b'{"task": null}'
        assert main(["data", str(path), *common]) != 0
        assert "no run" in capsys.readouterr().err
