"""A folder as a tar file that is made while it is read."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest

from hosl_cloud.storage.archive import CHUNK_BYTES, Archive


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "prompt").mkdir(parents=True)
    (folder / "README.md").write_text("a card\n", encoding="utf-8")
    (folder / "prompt" / "empty").write_bytes(b"")
    (folder / ("long" * 40)).write_bytes(b"x" * 512)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * (CHUNK_BYTES // 256) + b"end")
    return folder


def test_what_is_unpacked_is_what_was_there(folder: Path, tmp_path: Path) -> None:
    archive = Archive(folder, "run-1")
    data = b"".join(archive)
    assert len(data) == archive.size_bytes
    with tarfile.open(fileobj=io.BytesIO(data)) as unpacked:
        unpacked.extractall(tmp_path / "out", filter="data")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(p.relative_to(tmp_path / "out/run-1") for p in (tmp_path / "out").rglob("*") if p.is_file())
    for name in names:
        assert (tmp_path / "out/run-1" / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_that_is_removed_meanwhile_still_comes_whole(folder: Path) -> None:
    archive = Archive(folder, "run-1")
    shutil.rmtree(folder)
    assert len(b"".join(archive)) == archive.size_bytes


def test_a_file_that_has_become_shorter_is_no_whole_archive(folder: Path) -> None:
    archive = Archive(folder, "run-1")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match="ends too early"):
        b"".join(archive)
