"""Twenty real agents in a few processes, killed and started again at random; a device that is stopped for a while."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services import Service, serving
from support import TASK, write_reviews

LIMIT_S = 300.0
"""Of a whole test; it takes a fraction on a machine that has nothing else to do."""
SLACK_S = 2.0
"""What a round may take beyond its deadlines on a busy machine."""

MakeBundle = Callable[[str, int], Path]


@dataclass
class Group:
    """Agents that share a process."""

    names: list[str]
    service: Service
    folder: Path
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.starts += 1
        command = [sys.executable, str(Path(__file__).with_name("agents.py"))]
        command += ["--server", self.service.address, "--token-file", str(self.service.token_file)]
        command += ["--folder", str(self.folder), "--out", str(self.folder / "summaries"), *self.names]
        with self.log.open("ab") as errors:
            self.process = subprocess.Popen(command, stderr=errors)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.names[0]}.log"

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None


@dataclass
class Site:
    """A cloud in this process, and groups of devices in processes of their own."""

    service: Service
    groups: list[Group] = field(default_factory=list)

    @property
    def round(self) -> int:
        return self.service.coordinator.run.round

    @property
    def ready(self) -> set[str]:
        return set(self.service.coordinator.fleet.ready_names())

    async def until(self, is_time: Callable[[], bool]) -> None:
        while not is_time():
            if self.service.serving.done():
                raise AssertionError(f"the run ended: {self.service.serving}")
            await asyncio.sleep(0.01)

    async def stop(self) -> list[dict[str, Any]]:
        """End the run; how the agents ended."""
        await self.service.coordinator.request_stop(pause=False)
        assert await self.service.serving == "stopped"
        for group in self.groups:
            assert group.process is not None
            assert await asyncio.to_thread(group.process.wait) == 0, group.log.read_text(encoding="utf-8")
        lines = (self.service.folder.parent / "summaries").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def check_rounds(self, stages: int) -> None:
        """No round may have taken longer than its stages' deadlines."""
        store, config = self.service.coordinator.store, self.service.coordinator.config
        longest = max(row.seconds for row in store.rounds("run-1"))
        assert longest < stages * config.devices.round_deadline_s + SLACK_S


@asynccontextmanager
async def open_site(bundle: Path, folder: Path, names: list[list[str]], **devices: Any) -> AsyncIterator[Site]:
    """A service and the groups, all started."""
    settings = {
        **msgspec.toml.decode(TASK),
        "rounds": 10**6,
        "batch_size": 4,
        "max_length": 16,
        "report_every": 5,
        "client": {"learning_rate": 1e-4},
        "tail": {"device": "cpu", "learning_rate": 1e-5},
        "evaluation": {"every": 0},
        "devices": {"start_with": sum(map(len, names)), **devices},
    }
    async with serving(bundle, folder / "cloud", settings) as service:
        site = Site(service, [Group(each, service, folder) for each in names])
        with _ended(site.groups):
            for number, name in enumerate(name for each in names for name in each):
                write_reviews(folder / f"{name}.jsonl", 20, 20 * number)
            for group in site.groups:
                group.start()
            yield site


@contextmanager
def _ended(groups: list[Group]) -> Iterator[None]:
    try:
        yield
    finally:
        for group in groups:
            if group.process is not None:
                group.kill()


@dataclass(frozen=True)
class Kill:
    """A group's process is killed at one round and started again at another."""

    group: int
    round: int
    back: int


def schedule(seed: int, groups: int, rounds: int, count: int) -> list[Kill]:
    """`count` kills at random, none of a group that is down."""
    generator = random.Random(seed)
    kills: list[Kill] = []
    for round_ in sorted(generator.sample(range(10, rounds - 40), count)):
        up = [group for group in range(groups) if not any(k.group == group and k.back >= round_ for k in kills)]
        kills.append(Kill(generator.choice(up), round_, round_ + generator.randint(3, 30)))
    return kills


def test_a_fleet_whose_processes_are_killed_at_random_ends_with_the_same_bits(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    rounds = 120
    names = [[f"pi-{group}{number}" for number in range(4)] for group in range(5)]
    kills = schedule(seed=11, groups=len(names), rounds=rounds, count=6)

    async def run() -> None:
        async with open_site(make_bundle("lora", 2), tmp_path, names, per_round=8, round_deadline_s=3.0) as site:
            events = [(kill.round, site.groups[kill.group].kill) for kill in kills]
            events += [(kill.back, site.groups[kill.group].start) for kill in kills]
            for round_, event in sorted(events, key=lambda event: event[0]):
                await site.until(lambda round_=round_: site.round >= round_)  # type: ignore[misc]
                event()
            everybody = {name for each in names for name in each}
            await site.until(lambda: site.round >= rounds and site.ready == everybody)
            summaries = await site.stop()
            assert {summary["device"] for summary in summaries} == everybody
            digests = {summary["weights_digest"] for summary in summaries}
            assert digests == {site.service.coordinator.run.mirror.digest()}
            assert {summary["rounds"] for summary in summaries} == {site.round}
            await asyncio.to_thread(site.check_rounds, stages=2)
            for group in site.groups:
                for name in group.names:
                    assert site.service.said.count(f"device {name} is away") >= group.starts - 1

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def test_an_answer_that_comes_after_its_deadline_is_refused_by_name_and_its_device_catches_up(
    make_bundle: MakeBundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        names = [["slow"], ["pi-1", "pi-2"]]
        async with open_site(make_bundle("lora", 2), tmp_path, names, round_deadline_s=1.0) as site:
            slow = site.groups[0]
            await site.until(lambda: site.round >= 3)
            slow.send(signal.SIGSTOP)
            stopped = site.round
            await site.until(lambda: site.round >= stopped + 3)
            slow.send(signal.SIGCONT)
            refused = r"slow: its anchor of round \d+ was not taken: its stage is over"
            await site.until(lambda: re.search(refused, slow.log.read_text(encoding="utf-8")) is not None)
            while not await asyncio.to_thread(_took_part, site, "slow", after=stopped + 3):
                await asyncio.sleep(0.05)
            summaries = await site.stop()
            digests = {summary["device"]: summary["weights_digest"] for summary in summaries}
            assert digests == dict.fromkeys(("slow", "pi-1", "pi-2"), site.service.coordinator.run.mirror.digest())
            assert site.service.said.count("device slow is ready: 20 examples, 0 held out") == 1, "it stayed connected"
            await asyncio.to_thread(site.check_rounds, stages=2)

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    assert re.search(r"device slow sent no (anchor|projections) of round", caplog.text)
    assert "device slow: its anchor of round" in caplog.text


def _took_part(site: Site, name: str, after: int) -> bool:
    store = site.service.coordinator.store
    rows = store._query("SELECT devices FROM rounds WHERE round > ?", (after,))
    return any(name in json.loads(row["devices"]) for row in rows)
