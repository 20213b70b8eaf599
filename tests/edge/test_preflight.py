"""Each fault that preflight is for, made real where that can be: servers, certificates, files, clocks."""

from __future__ import annotations

import json
import platform
import shutil
import struct
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from answers import Answers, answering
from hosl_edge.__main__ import main
from hosl_edge.preflight import (
    FAILED,
    OK,
    WARNING,
    check_clock,
    check_disk,
    check_memory,
    check_memory_cgroup,
    check_onnxruntime,
    check_python,
    check_system,
)
from hosl_edge.settings import EdgeSettings
from hosl_protocol import ExitCode, FileEntry, Manifest, TensorEntry, encode_manifest

MANIFEST = "/v1/bundle/manifest.json"


def manifest(shard_bytes: int = 1000, trained: int = 10) -> Manifest:
    file = FileEntry(path="shard/shard.safetensors", size_bytes=shard_bytes, sha256="a" * 64)
    lora = TensorEntry(name="q.lora_A.weight", shape=(trained,), trainable=True, exponent=-24)
    return Manifest(
        model="tiny",
        family="llama",
        architecture="LlamaForCausalLM",
        split=2,
        blocks=4,
        width=32,
        max_length=32,
        pad_token_id=0,
        train="lora",
        tensors=(lora,),
        files=(file,),
    )


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    (tmp_path / "token").write_text("secret", encoding="ascii")
    return ["--token-file", str(tmp_path / "token"), "--data", "d.jsonl", "--cache-dir", str(tmp_path / "cache")]


def preflight(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, SimpleNamespace]]:
    """Exit code, and the checks by name."""
    code = main(["preflight", "--json", *arguments])
    checks: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return code, {check["name"]: SimpleNamespace(**check) for check in checks}


def serve_run(answers: Answers) -> str:
    answers.token = "secret"
    answers.by_path[MANIFEST] = 200, {}, encode_manifest(manifest())
    return f"ws://127.0.0.1:{answers.port}"


def test_a_machine_where_all_is_well_passes(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with answering() as answers:
        server = serve_run(answers)
        code, found = preflight(capsys, "--server", server, *options)
        assert main(["preflight", "--server", server, *options]) == code
    assert code == ExitCode.OK
    names = ["system", "python", "onnxruntime", "memory cgroup", "settings", "name", "connection", "clock"]
    assert list(found) == [*names, "token", "run", "memory", "disk"]
    assert all(check.outcome == OK for name, check in found.items() if name != "memory cgroup")
    assert found["run"].detail == "tiny, split 2 of 4, trains lora"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found)
    assert lines[0].startswith("ok      system: ")


def test_settings_that_are_wrong_are_one_of_the_checks(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    code, found = preflight(capsys, *options)
    assert code == ExitCode.SETTINGS
    assert "give --server" in found["settings"].detail
    assert found["onnxruntime"].outcome == OK
    assert "name" not in found


@pytest.mark.parametrize(
    ("server", "name", "word"),
    [("wss://no-such-host.invalid:1", "name", "DNS"), ("ws://127.0.0.1:1", "connection", "start hosl-cloud")],
)
def test_a_server_that_is_not_there_ends_the_way(
    capsys: pytest.CaptureFixture[str], options: list[str], server: str, name: str, word: str
) -> None:
    code, found = preflight(capsys, "--server", server, *options)
    assert code == ExitCode.REFUSED
    assert found[name].outcome == FAILED
    assert word in found[name].remedy
    assert "token" not in found
    assert {found["memory"].outcome, found["disk"].outcome} == {WARNING}


@pytest.mark.parametrize(
    ("status", "name", "outcome", "code", "words"),
    [
        (401, "token", FAILED, ExitCode.REFUSED, "copy the token again"),
        (503, "run", WARNING, ExitCode.OK, "start one"),
        (404, "service", FAILED, ExitCode.REFUSED, "hosl-cloud"),
    ],
)
def test_what_the_service_answers_is_told_apart(
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    name: str,
    outcome: str,
    code: ExitCode,
    words: str,
) -> None:
    with answering() as answers:
        answers.by_path[MANIFEST] = status, {}, b""
        ended, found = preflight(capsys, "--server", f"ws://127.0.0.1:{answers.port}", *options)
    assert (ended, found[name].outcome) == (code, outcome)
    assert words in found[name].remedy


def test_a_manifest_of_another_version_is_a_matter_of_versions(
    capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with answering() as answers:
        server = serve_run(answers)
        later = encode_manifest(manifest()).replace(b'"format_version":1', b'"format_version":9')
        answers.by_path[MANIFEST] = 200, {}, later.replace(b'"format_version": 1', b'"format_version": 9')
        code, found = preflight(capsys, "--server", server, *options)
    assert (code, found["run"].outcome) == (ExitCode.BUNDLE, FAILED)
    assert "update hosl" in found["run"].remedy


def test_a_wrong_clock_is_found_by_the_servers(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with answering() as answers:
        answers.date = formatdate(time.time() + 3 * 86400, usegmt=True)
        code, found = preflight(capsys, "--server", serve_run(answers), *options)
    assert (code, found["clock"].outcome) == (ExitCode.OK, WARNING)
    assert "behind the server's" in found["clock"].detail
    assert "timedatectl" in found["clock"].remedy


def test_a_wrong_clock_fails_where_certificates_are_checked_by_it() -> None:
    now = time.time()
    date = formatdate(now, usegmt=True)
    assert check_clock(date, now + 3600, needs_it=True).code == ExitCode.REFUSED
    assert check_clock(date, now + 30, needs_it=True).outcome == OK
    assert check_clock(None, now, needs_it=True).outcome == WARNING


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run([*command, *files, *subject], check=True, capture_output=True)
    return certificate, key


def test_a_certificate_that_is_not_trusted_is_told_apart_from_the_connection(
    capsys: pytest.CaptureFixture[str], options: list[str], tmp_path: Path
) -> None:
    with answering(make_certificate(tmp_path, "localhost")) as answers:
        server = serve_run(answers).replace("ws://127.0.0.1", "wss://localhost")
        code, found = preflight(capsys, "--server", server, *options)
    assert code == ExitCode.REFUSED
    assert {found[name].outcome for name in ("name", "connection", "clock")} == {OK}
    assert found["tls"].outcome == FAILED
    assert "trust who signed it" in found["tls"].remedy
    assert answers.asked == ["/healthz"], "the token is not sent to a server that is not trusted"


def test_a_trusted_certificate_passes_and_one_of_another_name_does_not(
    capsys: pytest.CaptureFixture[str], options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_certificate(tmp_path, "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(pair[0]))
    with answering(pair) as answers:
        server = serve_run(answers).replace("ws://", "wss://")
        code, found = preflight(capsys, "--server", server.replace("127.0.0.1", "localhost"), *options)
        assert (code, found["tls"].outcome) == (ExitCode.OK, OK)
        _, found = preflight(capsys, "--server", server, *options)
        assert found["tls"].outcome == FAILED


def test_a_server_without_tls_does_not_answer_wss(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with answering() as answers:
        code, found = preflight(capsys, "--server", serve_run(answers).replace("ws://", "wss://"), *options)
    assert (code, found["connection"].outcome) == (ExitCode.REFUSED, FAILED)
    assert "wss:// or ws://" in found["connection"].remedy


def test_bits_of_kernel_and_programs_are_told_apart() -> None:
    assert check_system(platform.machine(), 8 * struct.calcsize("P")).outcome == OK
    mixed, narrow = check_system("aarch64", 32), check_system("armv7l", 32)
    assert mixed.detail == "32-bit programs on a 64-bit kernel (aarch64)"
    assert narrow.detail == "armv7l, 32-bit"
    assert "64-bit image" in mixed.remedy
    assert mixed.code == ExitCode.RESOURCES


def test_an_old_python_fails() -> None:
    assert check_python((3, 9)).outcome == FAILED
    assert check_python((3, 10)).outcome == OK


def test_an_onnxruntime_that_dies_or_is_missing_is_found(tmp_path: Path) -> None:
    assert check_onnxruntime().outcome == OK
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -ILL $$\n", encoding="ascii")
    killed.chmod(0o755)
    assert "signal 4" in check_onnxruntime(str(killed)).detail
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n', encoding="ascii")
    bare.chmod(0o755)
    found = check_onnxruntime(str(bare))
    assert "No module named 'onnxruntime'" in found.detail
    assert (found.outcome, found.code) == (FAILED, ExitCode.RESOURCES)


def test_preflight_runs_where_onnxruntime_cannot_be_imported() -> None:
    blocked = "import sys; sys.modules['onnxruntime'] = None; from hosl_edge.__main__ import main; "
    done = subprocess.run(
        [sys.executable, "-c", blocked + "sys.exit(main(['preflight']))"], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("ok      system")


@pytest.mark.parametrize(("controllers", "outcome"), [("cpu io memory pids", OK), ("cpu io pids", WARNING)])
def test_the_memory_cgroup_may_be_off(tmp_path: Path, controllers: str, outcome: str) -> None:
    path = tmp_path / "sys/fs/cgroup/cgroup.controllers"
    path.parent.mkdir(parents=True)
    path.write_text(controllers, encoding="ascii")
    found = check_memory_cgroup(tmp_path)
    assert found.outcome == outcome
    assert ("cgroup_enable=memory" in found.remedy) == (outcome == WARNING)


@pytest.mark.parametrize(
    ("budget", "available", "outcome", "word"),
    [
        (None, 10**9, OK, ""),
        ("80M", 10**9, FAILED, "memory_budget is 80 MB"),
        ("200M", 10**9, OK, ""),
        ("2G", 10**9, WARNING, "memory_budget is 2000 MB"),
        (None, 90 * 10**6, FAILED, "90 MB are free"),
        (None, 120 * 10**6, WARNING, "read from the disk again"),
    ],
)
def test_memory_is_held_against_the_shard_and_the_budget(
    budget: str | None, available: int, outcome: str, word: str
) -> None:
    settings = EdgeSettings(server="ws://localhost:1", token_file="t", data="d", memory_budget=budget)
    found = check_memory(settings, manifest(shard_bytes=100 * 10**6, trained=10**7), available)
    assert found.outcome == outcome
    assert word in found.detail
    assert found.code == (ExitCode.RESOURCES if outcome == FAILED else ExitCode.OK)


def test_a_disk_that_is_too_small_for_what_is_missing_fails(tmp_path: Path) -> None:
    large = manifest(shard_bytes=10**15)
    found = check_disk(tmp_path / "not" / "yet", large)
    assert (found.outcome, found.code) == (FAILED, ExitCode.RESOURCES)
    assert str(tmp_path) in found.detail
    cached = tmp_path / "shards" / large.shard_digest / "shard" / "shard.safetensors"
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert check_disk(tmp_path, large).outcome == OK
