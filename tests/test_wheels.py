"""Wheels for other machines than the one that makes them, here made with its own C compiler; and who publishes them."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[1]
LIBRARY = "hosl_protocol/arithmetic/libhosl_kernel.so"
HERE = platform.machine()
ELSEWHERE = {"x86_64": "aarch64", "aarch64": "x86_64"}

pytestmark = pytest.mark.skipif(
    HERE not in ELSEWHERE or shutil.which("cc") is None, reason="no C compiler for x86-64 or aarch64"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the source archive holds, with the library of another install in it."""
    folder = tmp_path_factory.mktemp("source")
    command = [sys.executable, "-m", "hatchling", "build", "-d", folder, "-t", "sdist"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    unpacked = next(path.parent for path in folder.glob("*/pyproject.toml"))
    (unpacked / "protocol" / LIBRARY).write_bytes(b"of another install")
    return unpacked


def build(source: Path, folder: Path, machine: str, compiler: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel for any Linux on `machine` into `folder`, with `compiler` as CC."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", folder, "-t", "wheel"]
    variables = {**os.environ, "HOSL_WHEEL_FOR": machine, "CC": compiler, "PIP_NO_INDEX": "1"}
    return subprocess.run(command, cwd=source, capture_output=True, text=True, env=variables, timeout=120)


def test_the_source_archive_has_what_a_build_needs_and_no_tests(source: Path) -> None:
    assert {path.name for path in ROOT.glob("build_*.py")} <= {path.name for path in source.iterdir()}
    assert (source / "protocol" / LIBRARY).with_name("kernel.c").is_file()
    assert not (source / "tests").exists()


def test_a_wheel_for_any_linux_says_so_and_has_a_library_of_its_own(source: Path, tmp_path: Path) -> None:
    made = build(source, tmp_path, HERE, "cc")
    assert made.returncode == 0, made.stderr

    (path,) = tmp_path.iterdir()
    name = re.fullmatch(rf"(hosl-[\d.]+)-(py3-none-manylinux_2_17_{HERE})\.whl", path.name)
    assert name, path.name

    with zipfile.ZipFile(path) as wheel:
        assert wheel.namelist().count(LIBRARY) == 1
        assert {"hosl/__init__.py", "hosl/py.typed"} <= set(wheel.namelist())
        facts = wheel.read(f"{name[1]}.dist-info/WHEEL").decode().splitlines()
        library = Path(wheel.extract(LIBRARY, tmp_path))

    assert {"Root-Is-Purelib: false", f"Tag: {name[2]}"} <= set(facts)
    assert ctypes.CDLL(str(library)).hosl_add_terms
    assert (source / "protocol" / LIBRARY).read_bytes() == b"of another install", "an install in place keeps its own"


@pytest.mark.parametrize(
    ("machine", "compiler", "said"),
    [
        (
            ELSEWHERE.get(HERE, ""),
            "cc",
            rf"libhosl_kernel\.so is for machine \d+, expected \d+ \({ELSEWHERE.get(HERE)}\)",
        ),
        (HERE, "no-such-compiler", f"no C compiler for {HERE}: install ziglang, or name one in CC"),
        (HERE, "cc --no-such-option", "cc failed: "),
        ("riscv64", "cc", "HOSL_WHEEL_FOR=riscv64, expected x86_64 or aarch64"),
    ],
)
def test_a_wheel_for_any_linux_is_complete_or_is_not_made(
    source: Path, tmp_path: Path, machine: str, compiler: str, said: str
) -> None:
    made = build(source, tmp_path, machine, compiler)
    assert made.returncode == 1
    assert re.search(said, made.stderr)
    assert not list(tmp_path.iterdir())


def test_a_library_that_wants_a_newer_libc_than_the_tag_says_is_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    build_kernel = importlib.import_module("build_kernel")

    monkeypatch.setenv("CC", "cc")
    assert build_kernel.compile_kernel(source, HERE) == ""
    monkeypatch.setattr(build_kernel, "GLIBC", (2, 3))
    assert re.fullmatch(
        r"libhosl_kernel\.so wants glibc 2\.1[47], expected at most 2\.3", build_kernel.compile_kernel(source, HERE)
    )


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is not None, reason="ziglang is installed")
def test_without_ziglang_the_remedy_is_told(source: Path, tmp_path: Path) -> None:
    made = build(source, tmp_path, ELSEWHERE[HERE], "")
    assert f"no C compiler for {ELSEWHERE[HERE]}: install ziglang, or name one in CC" in made.stderr


def test_what_may_publish_runs_nothing_of_the_repository() -> None:
    """A job with the permission to publish only takes what another job, which has none, has built."""
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    build, publish = release["jobs"]["build"], release["jobs"]["publish"]

    assert release["permissions"] == {"contents": "read"}
    assert "permissions" not in build
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "build"
    assert not [step for step in publish["steps"] if "run" in step or "checkout" in step["uses"]]

    commands = [step["run"] for step in build["steps"] if "run" in step]
    assert commands[:2] == [".ci/run", "make wheels"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
