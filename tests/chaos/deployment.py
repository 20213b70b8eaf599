"""A cloud and three devices as processes that are started again when they are killed; a proxy before each device.

One event loop holds it all: a task for each process, the proxies, and the faults that wait for a message to pass. A
process lives as long as its task, so that nothing is left behind where a run is broken off.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import socket
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from chaos import launch
from chaos.proxy import Proxy
from hosl_cloud.service.secrets import load_or_make_token
from hosl_edge.connection.catch_up_speed import save_link
from hosl_protocol.exceptions import ExitCode
from processes import FORKS
from support import TASK, write_reviews

DEVICES = ("pi-1", "pi-2", "pi-3")
ROUNDS = 16
LAST_WORD_S = 8.0
"""How long devices have to end after the cloud."""
LONGEST_OUTAGE_S = 1.5
"""Before a killed process is started again."""
DATABASE = "hosl.sqlite"
LINK_BYTES_PER_S = 1e9
"""What a device that takes snapshots believes; one that does not know its link replays."""

_SPAWNS = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class ChaosSettings:
    """What varies between runs. Those that are equal end with the same bits, if they are strict."""

    algorithm: str
    optimizer: str
    per_round: int
    """Devices sampled each round; 0 takes all."""
    strict: bool
    snapshots: bool = False
    """Devices believe that a download beats a replay, and take snapshots to catch up."""

    def __str__(self) -> str:
        sampled = f", {self.per_round} of {len(DEVICES)}" if self.per_round else ""
        return f"{self.algorithm}, {self.optimizer}{sampled}" + (", snapshots" if self.snapshots else "")

    @property
    def toml(self) -> str:
        """run.toml."""
        patience = "" if self.strict else "quorum = 2\nround_deadline_s = 3.0\nrejoin_deadline_s = 60.0"
        return f"""
name = "chaos"
algorithm = "{self.algorithm}"
rounds = {ROUNDS}
seed = 3
directions = 2
batch_size = 4
max_length = 16
report_every = 4
strict = {json.dumps(self.strict)}
[client]
learning_rate = 0.01
optimizer = "{self.optimizer}"
[tail]
learning_rate = 3e-3
device = "cpu"
threads = 1
[evaluation]
every = 5
[checkpoints]
every = 3
[devices]
start_with = {len(DEVICES)}
per_round = {self.per_round}
{patience}
{TASK}"""


@dataclass
class Worker:
    """A process that is started again whenever it was killed or told to leave, as a system's manager would."""

    name: str
    folder: Path
    command: list[str]
    generator: random.Random
    is_over: Callable[[], bool] = lambda: False
    """Whether there is nothing to start it again for."""
    is_cold: bool = False
    """Whether it imports everything anew."""
    starts: list[float] = field(default_factory=list)
    _process: BaseProcess | None = None
    _is_told_to_leave: bool = False

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.exitcode is None

    @property
    def order(self) -> Path:
        """The file that tells the process to die; see launch.py."""
        return self.folder / f"{self.name}.order"

    @property
    def log(self) -> Path:
        """All that it printed."""
        return self.folder / f"{self.name}.log"

    def send(self, number: signal.Signals) -> None:
        """A signal, where there is a process."""
        self._is_told_to_leave |= number == signal.SIGTERM
        if self.is_running:
            assert self._process is not None
            assert self._process.pid is not None
            os.kill(self._process.pid, number)

    async def attend(self) -> int:
        """Run until it ends by itself; its exit code."""
        try:
            while True:
                code = await self._run_once()
                has_left = self._is_told_to_leave and code in (ExitCode.INTERRUPTED, -signal.SIGTERM)
                self._is_told_to_leave = False
                if not (code == -signal.SIGKILL or has_left) or self.is_over():
                    return code
                await asyncio.sleep(self.generator.uniform(0.0, LONGEST_OUTAGE_S))
        finally:
            if self.is_running:
                assert self._process is not None
                self._process.kill()
                self._process.join()

    async def _run_once(self) -> int:
        module, *arguments = self.command
        self._process = (_SPAWNS if self.is_cold else FORKS).Process(
            target=launch.run, args=(self.order, self.log, module, arguments), name=self.name, daemon=True
        )
        self._process.start()

        self.starts.append(time.monotonic())
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


@dataclass
class Deployment:
    """One run: the cloud, its devices and their proxies. Its methods run on the event loop."""

    folder: Path
    bundle: Path
    settings: ChaosSettings
    generator: random.Random
    is_cold: bool = False
    workers: dict[str, Worker] = field(default_factory=dict)
    proxies: dict[str, Proxy] = field(default_factory=dict)
    recoveries: dict[str, list[float]] = field(default_factory=lambda: {"device": [], "cloud": []})
    """Seconds from a start that was not the first to the first round, or evaluation, with that process in it."""
    _awaited: list[tuple[str, int, asyncio.Future[None]]] = field(default_factory=list)
    _seen: set[tuple[str, int]] = field(default_factory=set)
    _recovered: dict[str, int] = field(default_factory=dict)

    async def open(self) -> None:
        """Write the settings and the data, and listen."""
        self.folder.mkdir(parents=True)
        config = self.folder / "run.toml"
        config.write_text(self.settings.toml, encoding="utf-8")
        data = self.folder / "cloud"
        data.mkdir()

        # The cloud keeps its port from start to start, for the proxies know it.
        port = _free_port()
        serve = ["hosl_cloud", "serve", "--bundle", self.bundle, "--config", config, "--data-dir", data]
        self._add("cloud", [*serve, "--port", port, "--once"], self.is_completed)
        for number, name in enumerate(DEVICES):
            proxy = self.proxies[name] = Proxy(port, lambda kind, round_, name=name: self._note(name, kind, round_))  # type: ignore[misc]
            await proxy.start()
            self._add(name, self._device(name, number, proxy.port))

    def _add(self, name: str, command: list[object], is_over: Callable[[], bool] = lambda: False) -> None:
        self.workers[name] = Worker(name, self.folder, list(map(str, command)), self.generator, is_over, self.is_cold)

    def _device(self, name: str, number: int, port: int) -> list[object]:
        data = write_reviews(self.folder / f"{name}-train.jsonl", 20, 20 * number)
        held_out = write_reviews(self.folder / f"{name}-eval.jsonl", 10, 400 + 10 * number)
        _, token = load_or_make_token(self.folder / "cloud")
        where = ["--server", f"ws://127.0.0.1:{port}", "--token-file", token, "--data", data, "--eval", held_out]
        if self.settings.snapshots:
            (self.folder / "state" / name).mkdir(parents=True)
            save_link(self.folder / "state" / name, LINK_BYTES_PER_S)
        folders = ["--state-dir", self.folder / "state", "--cache-dir", self.folder / "cache" / name]
        return ["hosl_edge", *where, *folders, "--name", name, "--threads", "1", "--json"]

    def is_completed(self) -> bool:
        """Whether the store says that the run has ended well; the service would begin another."""
        with closing(sqlite3.connect(self.folder / "cloud" / DATABASE)) as database:
            try:
                return database.execute("SELECT state FROM runs").fetchall() == [("completed",)]
            except sqlite3.OperationalError:  # killed before there was a table
                return False

    def _note(self, name: str, kind: str, round_: int) -> None:
        """A message from the cloud passes by."""
        self._seen.add((kind, round_))
        for wanted, wanted_round, future in self._awaited:
            if kind == wanted and round_ >= wanted_round and not future.done():
                future.set_result(None)
        if kind in ("round-start", "eval-start"):
            self._note_recovery(name, "device")
            self._note_recovery("cloud", "cloud")

    def _note_recovery(self, name: str, kind: str) -> None:
        starts = self.workers[name].starts
        if len(starts) > max(self._recovered.get(name, 0), 1):
            self.recoveries[kind].append(time.monotonic() - starts[-1])
        self._recovered[name] = len(starts)

    async def wait_for_message(self, kind: str, round_: int) -> None:
        """Wait until a message of this type, and of this round or a later one, was sent."""
        if not any(kind == seen and round_ <= seen_round for seen, seen_round in self._seen):
            future = asyncio.get_running_loop().create_future()
            self._awaited.append((kind, round_, future))
            await future

    async def run(self, limit_s: float) -> list[str]:
        """Start everything, and restart it, until the run has ended; the devices that were away at its end.

        Raises AssertionError where a process fails, and TimeoutError.
        """
        tasks = {asyncio.create_task(worker.attend(), name=name): name for name, worker in self.workers.items()}
        deadline = time.monotonic() + limit_s
        pending = set(tasks)

        try:
            while pending:
                done, pending = await asyncio.wait(
                    pending, timeout=max(deadline - time.monotonic(), 0.0), return_when=asyncio.FIRST_COMPLETED
                )
                if not done and any(tasks[task] == "cloud" for task in pending):
                    raise asyncio.TimeoutError
                if not done:
                    return sorted(tasks[task] for task in pending)
                for task in done:
                    is_cloud = tasks[task] == "cloud"
                    assert task.result() == 0 or (is_cloud and self.is_completed()), (
                        f"{tasks[task]} ended with {task.result()}"
                    )
                    if is_cloud:
                        deadline = time.monotonic() + LAST_WORD_S
            return []
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    def snapshots(self) -> int:
        """How often a device began to download one."""
        logs = [self.workers[name].log for name in self.proxies]
        return sum(log.read_text(encoding="utf-8").count("downloads a snapshot") for log in logs if log.exists())

    async def close(self) -> None:
        for proxy in self.proxies.values():
            await proxy.close()

    def summary(self, name: str) -> dict[str, Any] | None:
        """What a device printed at its end; None where it was away then."""
        lines = self.workers[name].log.read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
