"""Each fault that preflight is for, made real where that can be: servers, certificates, files, clocks."""

from __future__ import annotations

import json
import platform
import shutil
import ssl
import struct
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from answers import Answers, answering
from hosl_edge import settings as settings_module
from hosl_edge.__main__ import main
from hosl_edge.connection.fetch import fetch_bundle
from hosl_edge.connection.token import Token, read_token
from hosl_edge.connection.trust import Cloud
from hosl_edge.data.records import digest_of_data
from hosl_edge.exceptions import ConnectionLost
from hosl_edge.preflight import (
    FAILED,
    OK,
    WARNING,
    check_cache,
    check_clock,
    check_disk,
    check_memory,
    check_memory_cgroup,
    check_onnxruntime,
    check_python,
    check_system,
)
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.manifest import FileEntry, Manifest, PrefixEntry, TensorEntry, encode_manifest
from hosl_protocol.run.tasks import load_preset

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
    (tmp_path / "token").chmod(0o600)
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "good", "label": 1}\n', encoding="utf-8")
    return ["--token-file", str(tmp_path / "token"), "--data", str(data), "--cache-dir", str(tmp_path / "cache")]


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
    assert list(found) == [*names, "token", "run", "data", "memory", "disk"]
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


def test_a_wrong_clock_is_a_warning_and_what_it_breaks_is_told_by_tls() -> None:
    now = time.time()
    date = formatdate(now, usegmt=True)
    assert check_clock(date, now + 3600).outcome == WARNING
    assert check_clock(date, now - 3600).detail.endswith("behind the server's")
    assert check_clock(date, now + 30).outcome == OK
    assert check_clock(None, now).outcome == WARNING


def test_data_that_the_run_refuses_is_refused_with_its_sentence(
    capsys: pytest.CaptureFixture[str], options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "pictures.npz").write_bytes(b"PK no pictures")
    place: dict[str, Any] = {"task": load_preset("reviews")}
    with answering() as answers:
        server = serve_run(answers)
        sentences = {"folder": "holds no file of examples", "pictures.npz": "the name should end in .jsonl"}
        for name, sentence in sentences.items():
            answers.by_path["/v1/device/pi"] = 200, {}, json.dumps(place).encode()
            data = ["--data", str(tmp_path / name)]
            code, found = preflight(capsys, "--server", server, *options, "--name", "pi", *data)
            assert (code, found["data"].outcome) == (ExitCode.DATA, FAILED)
            assert sentence in found["data"].detail
        for digest, outcome in (("0" * 64, FAILED), (digest_of_data(tmp_path / "d.jsonl"), OK)):
            answers.by_path["/v1/device/pi"] = 200, {}, json.dumps({**place, "data_digest": digest}).encode()
            code, found = preflight(capsys, "--server", server, *options, "--name", "pi")
            assert found["data"].outcome == outcome
            assert code == (ExitCode.DATA if outcome == FAILED else ExitCode.OK)
            assert outcome == OK or "has changed since this device joined the run" in found["data"].detail
        answers.by_path["/v1/device/pi"] = 200, {}, json.dumps({**place, "eval_digest": "0" * 64}).encode()
        code, found = preflight(capsys, "--server", server, *options, "--name", "pi")
        assert (code, found["eval"].outcome) == (ExitCode.DATA, FAILED)


def test_a_join_token_is_not_called_the_devices_own(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with answering() as answers:
        server = serve_run(answers)
        answers.by_path["/v1/device/pi"] = 200, {}, b"{}"
        _, found = preflight(capsys, "--server", server, *options, "--name", "pi")
    assert "join token" in found["device"].detail


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
    assert "copy the whole token again" in found["tls"].remedy
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
    assert "speaks no TLS here" in found["connection"].remedy


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


@pytest.mark.parametrize(
    ("budget", "has_prefix", "outcome", "words"),
    [
        ("1M", True, OK, "cache_budget is 1 MB"),
        ("1M", False, WARNING, "no frozen blocks of their own"),
        ("1000000G", True, WARNING, "cache_budget is 1000000000 MB"),
    ],
)
def test_a_cache_is_held_against_the_disk_and_the_bundle(
    tmp_path: Path, budget: str, has_prefix: bool, outcome: str, words: str
) -> None:
    settings = EdgeSettings(
        server="ws://localhost:1",
        token_file="t",
        data="d",
        cache_budget=budget,
        state_dir=str(tmp_path / "not" / "yet"),
    )
    facts = msgspec.structs.replace(manifest(), prefix=PrefixEntry(blocks=1, width=8) if has_prefix else None)
    found = check_cache(settings, facts, settings.cache_budget_bytes or 0)
    assert (found.outcome, found.code) == (outcome, ExitCode.OK)
    assert words in found.detail


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl", None, "d.jsonl: No such file or directory"),
        ("d.jsonl", "", "d.jsonl: holds no examples"),
        ("d.jsonl", "{\n", "d.jsonl:1: is not JSON"),
        ("d.jsonl", '{"words": "good", "label": 1}\n', "d.jsonl:1: has no field 'text'; it has 'words', 'label'"),
        ("d.jsonl", '{"text": "good"}\n', "d.jsonl:1: has no field 'label'"),
        ("d.txt", "good\n", "d.txt: the name should end in .jsonl,"),
    ],
)
def test_data_that_the_start_would_refuse_is_found_before_it(
    capsys: pytest.CaptureFixture[str], options: list[str], tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    data = tmp_path / name
    data.unlink(missing_ok=True)
    if content is not None:
        data.write_text(content, encoding="utf-8")
    with answering() as answers:
        server = serve_run(answers)
        answers.by_path["/v1/device/pi"] = 200, {}, json.dumps({"task": load_preset("reviews")}).encode()
        arguments = ["--server", server, *options, "--name", "pi", "--data", str(data)]
        code, found = preflight(capsys, *arguments)
    assert (code, found["data"].outcome, found["device"].outcome) == (ExitCode.DATA, FAILED, OK)
    assert words in found["data"].detail


def test_a_file_that_is_not_there_ends_the_agent_before_it_connects(
    capsys: pytest.CaptureFixture[str], options: list[str], tmp_path: Path
) -> None:
    for option in ("--data", "--eval"):
        missing = [option, str(tmp_path / "nope.jsonl"), "--state-dir", str(tmp_path / "state")]
        assert main(["--server", "ws://127.0.0.1:1", *options, *missing]) == ExitCode.DATA
        assert capsys.readouterr().err.splitlines()[-1].endswith("nope.jsonl: No such file or directory")


def test_a_server_that_speaks_tls_is_told_from_one_that_is_not_there(
    capsys: pytest.CaptureFixture[str], options: list[str], tmp_path: Path
) -> None:
    with answering(make_certificate(tmp_path, "localhost")) as answers:
        code, found = preflight(capsys, "--server", f"ws://127.0.0.1:{answers.port}", *options)
    assert (code, found["connection"].remedy) == (ExitCode.REFUSED, "the server speaks TLS: use wss://")


def test_what_is_wrong_with_tls_is_told_with_its_remedy_when_the_agent_tries(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(port: int) -> None:
        cloud = Cloud(f"wss://127.0.0.1:{port}", Token("", "secret"), ssl.create_default_context())
        fetch_bundle(cloud, tmp_path, lambda done, size: None)

    with answering() as answers, pytest.raises(ConnectionLost, match="speaks no TLS here: see that the port is right"):
        fetch(answers.port)
    pair = make_certificate(tmp_path, "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(pair[0]))
    with answering(pair) as answers, pytest.raises(ConnectionLost, match="the certificate is not for this name"):
        fetch(answers.port)


def test_a_signer_whom_neither_machine_nor_token_names_is_not_tried_for_ever(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(make_certificate(tmp_path, "localhost")) as answers:
        server = f"wss://localhost:{answers.port}"
        assert main(["--server", server, *options, "--state-dir", str(tmp_path / "state")]) == ExitCode.REFUSED
        code, found = preflight(capsys, "--server", server, *options)
    assert "copy the whole token again" in found["tls"].remedy
    assert code == ExitCode.REFUSED


def test_by_hand_the_token_of_the_service_is_taken(
    capsys: pytest.CaptureFixture[str], options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "etc-token"
    monkeypatch.setattr(settings_module, "TOKEN", place)
    place.write_text("secret", encoding="ascii")
    assert main(["config", "--server", "ws://localhost:1", *options[2:], "--json"]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)["token_file"]
    assert found == {"value": str(place), "source": "the service's"}
    monkeypatch.setattr("os.access", lambda *_: False)  # as for others than root
    assert main(["config", "--server", "ws://localhost:1", *options[2:]]) == ExitCode.SETTINGS
    assert f"{place} is the service's, which sudo may read" in capsys.readouterr().err


def test_a_token_that_others_can_read_is_worth_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "token"
    path.write_text("secret", encoding="ascii")
    for mode, words in ((0o600, ""), (0o644, f"{path} can be read by others: run chmod 600 {path}")):
        path.chmod(mode)
        read_token(path)
        assert "".join(caplog.messages) == words
