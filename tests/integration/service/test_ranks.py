"""One service on several ranks, with real devices: the trajectory of one process, whatever stops or dies on the way."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from hosl_cloud.__main__ import main
from hosl_cloud.commands.client import ApiClient, service_file
from hosl_cloud.exceptions import CloudError
from hosl_cloud.storage.mirror import replay_client
from hosl_cloud.storage.store import Store
from hosl_cloud.tail.checkpoint import find_checkpoint, read_tensors
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.manifest import load_manifest
from processes import Program
from support import TASK, Crew, free_port, write_reviews

DEVICES, ROUNDS = ("pi-1", "pi-2", "pi-3"), 12
SERVICE = Path(__file__).with_name("ranked_service.py")
WAIT_S = 120.0
CONFIG = f"""
rounds = {ROUNDS}
seed = 5
strict = true
directions = 1
probe_step = 1e-2
batch_size = 4
max_length = 16
report_every = 5
[client]
learning_rate = 0.01
[evaluation]
every = 1000000
[checkpoints]
every = 4
[devices]
start_with = 3
weighting = "examples"
"""


class Site:
    """A data folder, services on it one after the other, on one port, and devices that stay."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.folder, self.bundle, self.port = folder, bundle, free_port()
        self.data_dir = folder / "cloud"
        shutil.copytree(bundle, self.data_dir / "bundles" / "tiny")
        self.log = folder / "log"
        self.processes: list[subprocess.Popen[bytes] | Program] = []
        self.crew = Crew()

    def launch(self, ranks: int) -> None:
        """Start the service under torchrun, and wait until it listens."""
        launcher = ("torch.distributed.run", "--standalone", "--max-restarts", "1", "--nproc-per-node", ranks)
        command = [sys.executable, "-m", *map(str, (*launcher, SERVICE, *self.arguments))]
        with self.log.open("ab") as log:
            self.processes = [subprocess.Popen(command, stdout=log, stderr=log)]
        self.wait_until(self.is_listening)

    def fork(self, ranks: int) -> None:
        """Start the service with what torchrun would tell each rank, but without importing torch in all of them."""
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        places = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        self.processes = [
            Program("hosl_cloud", *self.arguments, errors=self.log, **(place if ranks > 1 else {})) for place in places
        ]
        self.wait_until(self.is_listening)

    @property
    def arguments(self) -> tuple[object, ...]:
        return ("serve", "--data-dir", self.data_dir, "--port", self.port, "--drain-s", 10)

    def is_listening(self) -> bool:
        return (self.data_dir / "service.json").exists()

    def wait_until(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not is_so():
            assert time.monotonic() < deadline, self.said()
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.1)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")[-6000:]

    def stop(self) -> set[int]:
        """SIGTERM to the launcher, or each rank; the exit codes."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.communicate(timeout=WAIT_S)
        return {int(process.wait()) for process in self.processes}

    def rank(self, number: int) -> psutil.Process:
        """One that the launcher started."""
        (launcher,) = self.processes
        return next(
            child for child in psutil.Process(launcher.pid).children() if child.environ()["RANK"] == str(number)
        )

    def begin(self, name: str, algorithm: str, ranks: str = "shard") -> str:
        """Put a run in line; its id."""
        tail = f'\n[tail]\nlearning_rate = 3e-3\nranks = "{ranks}"\ndevice = "cpu"\n'
        # What one process and two compute differs by rounding, which fewer bits of a gradient would make a step of.
        bits = "gradient_bits = 32\n" * (algorithm == "first-order")
        text = f'name = "{name}"\nalgorithm = "{algorithm}"\n{bits}{CONFIG}{tail}{TASK}'
        body = {"bundle": "tiny", "config": msgspec.toml.decode(text)}
        return str(self.client.request("POST", "/v1/runs", body)["id"])

    @property
    def client(self) -> ApiClient:
        token = (self.data_dir / "admin-token").read_text(encoding="ascii").strip()
        return ApiClient(service_file(self.data_dir)["address"], token)

    def wait_for_round(self, run: str, round_: int) -> None:
        def is_there() -> bool:
            with contextlib.suppress(CloudError):
                shown = self.client.request("GET", f"/v1/runs/{run}")
                assert shown["state"] in ("pending", "running", "paused", "completed"), self.said()
                return bool(shown["round"] >= round_) and (round_ < ROUNDS or shown["state"] == "completed")
            return False

        self.wait_until(is_there)

    def attend(self, name: str) -> None:
        """A device, in a thread of this process, for as long as the test runs."""
        number = int(name[-1])
        settings = EdgeSettings(
            server=f"ws://127.0.0.1:{self.port}",
            token_file=str(self.data_dir / "join-token"),
            data=str(write_reviews(self.folder / f"{name}.jsonl", 12 + 2 * number, 40 * number)),
            name=name,
            threads=1,
            state_dir=str(self.folder / "state"),
            cache_dir=str(self.folder / "cache"),
            stay=True,
        )
        self.crew.start(settings)

    def result(self, run: str) -> dict[str, Any]:
        """What a run came to: losses, what the devices trained, and the tail's weights."""
        store = Store(self.data_dir / "hosl.sqlite")
        try:
            row = store.run(run)
            assert row.state == "completed", self.said()
            losses = [each.loss for each in store.rounds(run)]
            client = replay_client(store, row, self.bundle, load_manifest(self.bundle), ROUNDS)
        finally:
            store.close()
        info, tail = read_tensors(find_checkpoint(self.data_dir / "runs" / run, "last").path)
        assert info.round == ROUNDS == len(losses)
        trained = [client[entry.name].ravel() for entry in load_manifest(self.bundle).trainable]
        weights = {name: tensor.numpy() for name, tensor in tail.items() if name.startswith("weights/")}
        return {"losses": losses, "client": np.concatenate(trained), **weights}

    def merged(self, run: str) -> dict[str, Any]:
        """The tensors of the model that `hosl-cloud merge` makes of a run."""
        out = self.folder / f"merged-{run}"
        options = ("--data-dir", str(self.data_dir), "--out", str(out), "--checkpoint", "last")
        assert main(["merge", run, *options]) == ExitCode.OK
        return load_file(out / "model.safetensors")


def difference(got: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative difference of any of its arrays."""
    assert got.keys() == expected.keys()
    return max(
        float(np.linalg.norm(np.subtract(got[name], expected[name])) / (np.linalg.norm(expected[name]) or 1.0))
        for name in expected
    )


@pytest.fixture
def site(tmp_path: Path, make_bundle: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr("hosl_edge.agent.LONGEST_PAUSE_S", 1.0)  # 20
    site = Site(tmp_path, make_bundle("lora", 2))
    yield site
    site.crew.dismiss()
    for process in site.processes:
        if process.poll() is None:
            for each in (*psutil.Process(process.pid).children(), process):
                each.kill()
            process.communicate()


@pytest.mark.timeout(900)  # several services, one after the other
def test_ranks_that_stop_and_die_end_where_one_process_does(site: Site) -> None:
    kinds = [(algorithm, ranks) for algorithm in ("ho-sfl", "hosl") for ranks in ("shard", "replicate")]
    kinds += [("first-order", "shard")]

    site.launch(2)
    two = [site.begin("two", *kind) for kind in kinds]
    from_two = site.begin("from-two", "ho-sfl")
    for name in DEVICES:
        site.attend(name)
    site.wait_for_round(two[-1], ROUNDS)
    site.wait_for_round(from_two, 5)
    site.rank(1).kill()
    site.wait_for_round(from_two, 9)
    assert len(re.findall("error: rank 0 cannot go on with the others", site.said())) == 1
    assert "resumes after round" in site.said()
    assert site.stop() != {0}  # torchrun's own, for a signal
    assert re.findall("gloo left: (.)", site.said()) == ["0", "0"]
    assert f"run {from_two} paused at round" in site.said()

    site.fork(1)
    one = {algorithm: site.begin("one", algorithm) for algorithm in ("ho-sfl", "hosl", "first-order")}
    from_one = site.begin("from-one", "hosl")
    site.wait_for_round(from_two, ROUNDS)
    site.wait_for_round(from_one, 6)
    assert site.stop() == {ExitCode.OK}

    site.fork(4)
    four = site.begin("four", "hosl", "shard")
    site.wait_for_round(four, ROUNDS)
    assert site.stop() == {ExitCode.OK}

    expected = {algorithm: site.result(run) for algorithm, run in one.items()}
    algorithms = ("ho-sfl", "ho-sfl", "hosl", "hosl", "first-order", "hosl", "ho-sfl", "hosl")
    for run, algorithm in zip((*two, four, from_two, from_one), algorithms, strict=True):
        assert difference(site.result(run), expected[algorithm]) < 1e-5, run
    assert difference(site.merged(two[0]), site.merged(one["ho-sfl"])) < 1e-5
