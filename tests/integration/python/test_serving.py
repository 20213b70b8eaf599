"""A service from Python, in the background: real devices join it, and it ends as it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import hosl
from hosl.runs import LEAVING_S
from hosl_cloud.__main__ import main as cloud_main
from hosl_cloud.storage.data_folder import DATABASE
from hosl_cloud.storage.store import Store
from hosl_edge.settings import EdgeSettings
from support import TASK, Crew, count_right, free_port, write_reviews

MakeBundle = Callable[..., Path]

SETTINGS: dict[str, Any] = {
    "task": msgspec.toml.decode(TASK)["task"],
    "port": 0,
    "batch_size": 4,
    "max_length": 16,
    "report_every": 1,
    "tail": {"learning_rate": 3e-3, "device": "cpu"},
    "evaluation": {"every": 2},
}


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew()
    yield crew
    crew.dismiss()


def settings_of(command: str, folder: Path, name: str) -> EdgeSettings:
    """What a device is that is started with a command of the service's."""
    words = shlex.split(command)
    given = dict(zip(words[1::2], words[2::2], strict=True))
    assert words[0] == "hosl-edge"
    assert given["--data"] == "FILE"
    return EdgeSettings(
        server=given["--server"],
        token_file=given["--token-file"],
        data=str(write_reviews(folder / f"{name}.jsonl", 20)),
        eval=str(write_reviews(folder / f"{name}-eval.jsonl", 8, 400)),
        name=name,
        threads=1,
        state_dir=str(folder / "state"),
        cache_dir=str(folder / "cache"),
    )


def test_devices_train_a_run_that_is_followed_and_merged(make_bundle: MakeBundle, tmp_path: Path, crew: Crew) -> None:
    with hosl.serve(make_bundle("norm", 2), devices=2, rounds=4, **SETTINGS) as run:
        assert run.page == run.address.replace("ws", "http") + "/"
        for name in ("a", "b"):
            crew.start(settings_of(run.device_command, tmp_path, name))
        rounds = list(run)
    assert [each.number for each in rounds] == [1, 2, 3, 4]
    assert [each.evaluation is not None for each in rounds] == [False, True, False, True]
    assert {each.devices for each in rounds} <= {1, 2}
    assert run.evaluations[-1].scored == 16
    assert run.state == "completed"
    best = max(run.evaluations, key=lambda each: (each.accuracy, -each.loss))
    files = [tmp_path / "a-eval.jsonl", tmp_path / "b-eval.jsonl"]
    assert count_right(run.merge(tmp_path / "merged"), files) == (best.right, 16)
    assert not [thread for thread in threading.enumerate() if thread.name == "hosl run"]


def test_a_device_has_a_token_of_its_own(make_bundle: MakeBundle, tmp_path: Path, crew: Crew) -> None:
    async def cell() -> hosl.ServedRun:  # a notebook's
        return hosl.serve(make_bundle("norm", 2), rounds=1, **SETTINGS)

    async def add(run: hosl.ServedRun) -> str:
        return run.add_device("kitchen", tmp_path / "k.token")

    run = asyncio.run(cell())
    deadline = time.monotonic() + 30.0
    while "running, 0 of 1 rounds, 0 of 1 devices are there" not in repr(run):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    command = asyncio.run(add(run))
    assert "--token-file k.token" in command
    assert (tmp_path / "k.token").stat().st_mode & 0o777 == 0o600
    with pytest.raises(hosl.HoslError, match="kitchen"):
        run.add_device("kitchen", tmp_path / "other.token")
    assert not (tmp_path / "other.token").exists()

    crew.start(settings_of(command.replace("k.token", str(tmp_path / "k.token")), tmp_path, "kitchen"))
    assert run.wait().state == "completed"
    run.close()


def test_the_end_of_the_block_ends_the_service(make_bundle: MakeBundle, tmp_path: Path) -> None:
    with hosl.serve(make_bundle("norm", 2), data_dir=tmp_path / "d", **SETTINGS) as run:
        file = json.loads((tmp_path / "d" / "service.json").read_text(encoding="utf-8"))
        assert file["address"] == run.address
    assert run.state == "stopped"
    assert not (tmp_path / "d" / "service.json").exists()
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", int(run.address.rpartition(":")[2])))


def test_a_run_goes_on_when_the_loop_is_left_and_after_it_was_cut_off(
    make_bundle: MakeBundle, tmp_path: Path, crew: Crew, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, given = make_bundle("norm", 2), {**SETTINGS, "data_dir": tmp_path / "d", "rounds": 10**6}
    with hosl.serve(bundle, **given) as run:
        crew.start(settings_of(run.device_command, tmp_path, "a"))
        for each in run:
            if each.number == 3:
                break
        assert run.state == "running"
        assert run.merge(tmp_path / "merged").exists(), "what there is until now"
        before, deadline = len(run.rounds), time.monotonic() + 60.0
        while len(run.rounds) == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert run.state == "stopped"
    assert cloud_main(["run", "list", "--data-dir", str(tmp_path / "d")]) == 0
    assert run.id in capsys.readouterr().out

    with contextlib.closing(Store(tmp_path / "d" / DATABASE)) as store:
        store.set_state(run.id, "running")  # as a program leaves it that is killed
    with hosl.serve(bundle, **given) as again:
        assert again.id == run.id
    with hosl.serve(bundle, **given) as another:
        assert another.id != run.id, "one that was stopped stays so"


def test_a_program_may_end_while_it_serves(make_bundle: MakeBundle) -> None:
    code = """
import atexit, json, sys, time
atexit.register(lambda: print(time.monotonic() - ended))  # the last of all: it is the first to be registered
import hosl
run = hosl.serve(sys.argv[1], **json.loads(sys.argv[2]))
print(run.data_dir)
ended = time.monotonic()
"""
    command = [sys.executable, "-W", "error", "-c", code, str(make_bundle("norm", 2)), json.dumps(SETTINGS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    folder, seconds = done.stdout.split()
    assert not Path(folder).parent.exists()
    assert float(seconds) < LEAVING_S


def test_a_port_that_is_taken_is_named(make_bundle: MakeBundle) -> None:
    port = free_port()
    with contextlib.closing(socket.create_server(("127.0.0.1", port))), pytest.raises(hosl.HoslError) as raised:
        hosl.serve(make_bundle("norm", 2), **{**SETTINGS, "port": port})
    assert f"cannot listen on 127.0.0.1:{port}" in str(raised.value)


def test_plain_text_stays_on_this_machine(make_bundle: MakeBundle) -> None:
    with pytest.raises(hosl.HoslError, match="without TLS sends everything as plain text"):
        hosl.serve(make_bundle("norm", 2), host="0.0.0.0", **SETTINGS)
