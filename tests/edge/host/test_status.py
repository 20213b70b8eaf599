"""What a running agent tells over its socket, from real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from answers import answering
from hosl_edge.__main__ import main
from hosl_edge.exceptions import ConnectionLost
from hosl_edge.host.status import read_status, readable, serve_status, status_folder
from hosl_protocol.exceptions import ExitCode, SettingsError

MANIFEST = "/v1/bundle/manifest.json"
PATIENCE_S = 150.0
"""To load an agent takes 20 seconds and more where another processor is imitated, on a busy machine."""


@contextlib.contextmanager
def agent(folder: Path, name: str, server: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A real one, which is terminated at the end."""
    folder.mkdir(exist_ok=True)
    (folder / "token").write_text("secret", encoding="ascii")
    (folder / "token").chmod(0o600)
    (folder / "train.jsonl").write_text('{"text": "good", "label": 1}\n', encoding="utf-8")
    settings = {"server": server, "name": name, "token-file": folder / "token", "data": folder / "train.jsonl"}
    settings |= {"state-dir": folder / "state", "cache-dir": folder / "cache"}
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "hosl_edge", *arguments, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def wait_for(folder: Path, name: str, is_met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first status that meets it."""
    ends = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(ConnectionLost):
            document = read_status([folder], name)
            if is_met(document):
                return document
        assert time.monotonic() < ends, "no such status in all that time"
        time.sleep(0.05)


def test_agents_that_wait_tell_their_state_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A path that is too long for a unix socket's address.
    folder = tmp_path / ("long-" * 20)
    state = folder / "state"
    with agent(folder, "pi-1", "ws://localhost:1"), agent(folder, "pi-2", "ws://localhost:1") as second:
        document = wait_for(state, "pi-1", lambda found: found["next_try_s"] is not None)
        assert document["state"] == "waiting to connect"
        assert document["server"] == "ws://localhost:1"
        assert "cannot reach http://" in document["last_error"]
        assert 0.0 <= document["next_try_s"] <= 20.0
        assert document["peak_memory_bytes"] >= document["anonymous_memory_bytes"] > 10**6
        assert document["run"] is None
        wait_for(state, "pi-2", lambda found: found["name"] == "pi-2")
        assert stat.S_IMODE((state / "pi-1.sock").stat().st_mode) == 0o600
        own = ["--state-dir", str(state), "--name"]
        assert main(["status", *own, "pi-2", "--json"]) == ExitCode.OK
        assert json.loads(capsys.readouterr().out)["name"] == "pi-2"
        assert main(["status", *own, "pi-2"]) == ExitCode.OK
        assert "state                   " in capsys.readouterr().out
        assert main(["status", *own, "pi-3"]) == ExitCode.REFUSED
        assert "there are: pi-1, pi-2" in capsys.readouterr().err
        with agent(folder, "pi-2", "ws://localhost:1") as third:
            assert third.wait(PATIENCE_S) == ExitCode.SETTINGS
            assert third.stderr is not None
            assert "another hosl-edge runs under it" in third.stderr.read()
        second.send_signal(signal.SIGTERM)
        assert second.wait(PATIENCE_S) == ExitCode.INTERRUPTED
        assert not (state / "pi-2.sock").exists()


def test_an_agent_without_a_run_says_once_that_it_waits(tmp_path: Path) -> None:
    with answering() as answers:
        answers.by_path[MANIFEST] = 503, {"Retry-After": "1"}, b""
        with agent(tmp_path, "pi", f"ws://127.0.0.1:{answers.port}", "--stay") as process:
            wait_for(tmp_path / "state", "pi", lambda found: len(answers.asked) >= 3)
            found = wait_for(tmp_path / "state", "pi", lambda found: found["state"] == "waiting for a run")
            assert found["last_error"] is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == ExitCode.INTERRUPTED
            assert process.stderr is not None
            said = process.stderr.read()
    # A library may say something of its own as it loads: ONNX Runtime does where there is no /sys.
    own = [line for line in said.splitlines() if " pi: " in line or line.startswith("hosl-edge")]
    assert [line.partition(" pi: ")[2] or line for line in own] == [
        "the cloud has no run to join; asks again in 1 s, and so on until there is one",
        "hosl-edge: interrupted",
    ]


def test_an_agent_stops_where_memory_is_low(tmp_path: Path) -> None:
    with agent(tmp_path, "pi", "ws://localhost:1", "--min-available-memory", "900000G") as process:
        assert process.wait(PATIENCE_S) == ExitCode.RESOURCES
        assert process.stderr is not None
        assert "less than min_available_memory" in process.stderr.read().splitlines()[-1]


def serve_once(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        async with serve_status(folder, "pi", lambda: document):
            return await asyncio.to_thread(read_status, [folder], "pi")

    return asyncio.run(main())


def test_the_socket_of_an_agent_that_was_killed_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(tmp_path / "pi.sock"))
    with pytest.raises(ConnectionLost, match="no hosl-edge named pi answers"):
        read_status([tmp_path], "pi")
    assert serve_once(tmp_path, {"state": "training"}) == {"state": "training"}


def test_a_name_has_one_agent(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve_status(tmp_path, "pi", dict):
            with pytest.raises(SettingsError, match="another hosl-edge"):
                async with serve_status(tmp_path, "pi", dict):
                    pass

    asyncio.run(main())


def test_systemds_runtime_directory_has_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/hosl:/run/other")
    assert status_folder(lambda: "/var/lib/hosl") == Path("/run/hosl")
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    assert status_folder(lambda: "/var/lib/hosl") == Path("/var/lib/hosl")


def test_people_are_shown_figures_with_their_units() -> None:
    document = {
        "name": "pi",
        "run": None,
        "loss": 0.69314718,
        "accuracy": 0.51234,
        "step_seconds": 0.17109079658985138,
        "memory_bytes": 196980736,
        "temperature_c": 48.312,
        "throttled": ["under-voltage", "throttled"],
        "next_try_s": 8.123,
    }
    assert dict(readable(document)) == {
        "name": "pi",
        "run": "",
        "loss": "0.6931",
        "accuracy": "51.2 %",
        "step": "0.17 s",
        "memory": "197.0 MB",
        "temperature": "48.3 °C",
        "throttled": "under-voltage, throttled",
        "next_try": "8.12 s",
    }
