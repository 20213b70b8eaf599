"""A cloud that is killed goes on where its newest checkpoint stands, and a strict run ends with the same bits."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hosl_cloud.storage.store import Store
from hosl_protocol.exceptions import ExitCode
from processes import Program
from support import TASK, free_port, write_reviews

ROUNDS = 14
MakeBundle = Callable[..., Path]


class Site:
    """A cloud on one port and two devices, as processes."""

    def __init__(self, folder: Path, bundle: Path, settings: str) -> None:
        folder.mkdir()
        self.folder, self.bundle, self.port = folder, bundle, free_port()
        (folder / "run.toml").write_text(settings, encoding="utf-8")
        self.processes: list[Program] = []

    def start(self, module: str, *arguments: object) -> Program:
        log = self.folder / f"{module}-{len(self.processes)}.log"
        self.processes.append(Program(module, *arguments, errors=log))
        return self.processes[-1]

    def start_cloud(self) -> Program:
        options = ("--bundle", self.bundle, "--config", self.folder / "run.toml", "--port", self.port, "--once")
        return self.start("hosl_cloud", "serve", *options, "--data-dir", self.folder / "cloud")

    def start_device(self, name: str) -> Program:
        number = int(name[-1])
        files = ("--data", write_reviews(self.folder / f"{name}.jsonl", 20, 40 * number))
        files += ("--eval", write_reviews(self.folder / f"{name}-eval.jsonl", 6, 400 + 10 * number))
        place = ("--state-dir", self.folder / "state", "--cache-dir", self.folder / "cache", "--threads", 1)
        token = self.folder / "cloud" / "join-token"
        while not token.exists():
            time.sleep(0.05)
        server = ("--server", f"ws://127.0.0.1:{self.port}", "--token-file", token)
        return self.start("hosl_edge", *server, *files, *place, "--name", name, "--json")

    def wait_for_round(self, round_: int) -> None:
        deadline = time.monotonic() + 60.0
        while self.rounds() < round_:
            assert time.monotonic() < deadline, self.rounds()
            time.sleep(0.02)

    def rounds(self) -> int:
        try:
            with sqlite3.connect(self.folder / "cloud" / "hosl.sqlite", timeout=5.0) as database:
                (count,) = database.execute("SELECT max(round) FROM runs").fetchone()
        except sqlite3.Error:
            return 0
        return count or 0

    def result(self) -> dict[str, Any]:
        """What a run came to, in bits."""
        store = Store(self.folder / "cloud" / "hosl.sqlite")
        try:
            (run,) = store.run_ids()
            info = sorted((self.folder / "cloud" / "runs" / run).glob(f"epoch-*-round-{ROUNDS:06}.json"))[-1]
            return {
                "state": store.run(run).state,
                "updates": [
                    (update.coefficients.tobytes(), update.codes.tobytes()) for update in store.updates(run, 1, 100)
                ],
                "losses": [row.loss for row in store.rounds(run)],
                "evaluations": store.evaluations(run),
                "tail": json.loads(info.read_text(encoding="utf-8"))["sha256"],
            }
        finally:
            store.close()


@pytest.fixture
def make_site(tmp_path: Path, make_bundle: MakeBundle) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(name: str, optimizer: str = "sgd", more: str = "") -> Site:
        settings = f"""
name = "tiny"
strict = true
rounds = {ROUNDS}
seed = 5
batch_size = 4
max_length = 16
report_every = 4
{more}
[client]
learning_rate = 0.01
optimizer = "{optimizer}"
[tail]
learning_rate = 3e-3
device = "cpu"
[evaluation]
every = 5
[checkpoints]
every = 3
[devices]
start_with = 2
{TASK}"""
        sites.append(Site(tmp_path / name, make_bundle("lora", 2), settings))
        return sites[-1]

    yield make
    for site in sites:
        for process in site.processes:
            process.kill()
            process.wait()
            process.stdout.close()


def finish(processes: list[Program]) -> list[dict[str, Any]]:
    summaries = [json.loads(process.communicate(timeout=120.0)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return summaries


@pytest.mark.parametrize("more", ["", 'algorithm = "first-order"'], ids=["ho-sfl", "first-order"])
def test_a_killed_cloud_resumes_and_ends_with_the_bits_of_an_unbroken_run(
    make_site: Callable[..., Site], more: str
) -> None:
    whole = make_site("whole", "adamw", more)
    whole.start_cloud()
    expected = finish([whole.start_device(name) for name in ("pi-1", "pi-2")])
    whole.processes[0].communicate(timeout=60.0)
    broken = make_site("broken", "adamw", more)
    cloud = broken.start_cloud()
    devices = [broken.start_device(name) for name in ("pi-1", "pi-2")]
    for round_ in (2, 8):
        broken.wait_for_round(round_)
        cloud.kill()
        cloud.communicate()
        cloud = broken.start_cloud()
    summaries = finish(devices)
    text = cloud.communicate(timeout=60.0)[0]
    assert "resumes after round" in text
    assert [summary["weights_digest"] for summary in summaries] == [summary["weights_digest"] for summary in expected]
    assert broken.result() == whole.result()


def test_a_paused_run_is_told_to_the_devices_and_goes_on(make_site: Callable[..., Site]) -> None:
    site = make_site("paused")
    cloud = site.start_cloud()
    devices = [site.start_device(name) for name in ("pi-1", "pi-2")]
    site.wait_for_round(4)
    cloud.send_signal(signal.SIGTERM)
    assert "pauses at round" in cloud.communicate(timeout=60.0)[0]
    assert cloud.returncode == ExitCode.INTERRUPTED
    cloud = site.start_cloud()
    summaries = finish(devices)
    assert {summary["outcome"] for summary in summaries} == {"completed"}
    assert len({summary["weights_digest"] for summary in summaries}) == 1
    text = cloud.communicate(timeout=60.0)[0]
    assert "rounds after it are made again" not in text, "a pause loses nothing"
