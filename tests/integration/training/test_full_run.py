"""Whole runs with real processes on loopback: a cloud, devices, crashes of devices, and what merge makes of it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.manifest import load_manifest
from processes import Program
from support import TASK, count_right, write_reviews

DEADLINE_S = 120.0
MakeBundle = Callable[[str, int], Path]


@dataclass
class Site:
    """A folder with data, a cloud, and devices, all of them processes."""

    folder: Path
    bundle: Path
    processes: list[Program] = field(default_factory=list)
    server: str = ""
    token_file: Path = Path()
    run: str = ""

    def start_cloud(self, settings: str, *options: str) -> Program:
        """Start the service and wait until it listens."""
        config = self.folder / "run.toml"
        config.write_text(settings + TASK, encoding="utf-8")
        arguments = ["serve", "--bundle", self.bundle, "--config", config, "--data-dir", self.folder / "cloud"]
        cloud = self._start("hosl_cloud", *arguments, "--port", "0", "--once", *options)
        for line in cloud.stdout:
            if found := re.search(r"run (\S+):", line):
                self.run = found.group(1)
            if found := re.search(r"--server (\S+) --token-file (\S+)", line):
                self.server, self.token_file = found.group(1), Path(found.group(2))
                return cloud
        raise AssertionError(f"the cloud ended with {cloud.wait()}: {self.errors(cloud)}")

    def start_device(self, name: str, *options: str, data: Path | None = None) -> Program:
        number = int(name[-1])
        data = data or write_reviews(self.folder / f"{name}-train.jsonl", 40, 40 * number)
        held_out = write_reviews(self.folder / f"{name}-eval.jsonl", 10, 400 + 10 * number)
        arguments = ["--server", self.server, "--token-file", self.token_file, "--data", data, "--eval", held_out]
        folders = ["--state-dir", self.folder / "state", "--cache-dir", self.folder / "cache"]
        return self._start("hosl_edge", *arguments, *folders, "--name", name, "--threads", "1", "--json", *options)

    def _start(self, module: str, *arguments: object) -> Program:
        self.processes.append(Program(module, *arguments, errors=self.folder / f"stderr-{len(self.processes)}"))
        return self.processes[-1]

    def errors(self, process: Program) -> str:
        return (self.folder / f"stderr-{self.processes.index(process)}").read_text(encoding="utf-8")

    def finish(self, process: Program, code: int = 0) -> str:
        """Wait for a process; what it printed."""
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == code, self.errors(process)
        return output

    def summary(self, device: Program) -> dict[str, Any]:
        return json.loads(self.finish(device))  # type: ignore[no-any-return]

    def get(self, path: str, token: str | None = None) -> tuple[int, bytes]:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(self.server.replace("ws", "http", 1) + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def status(self) -> dict[str, Any]:
        token = (self.folder / "cloud" / "admin-token").read_text(encoding="ascii").strip()
        code, body = self.get("/v1/runs", token)
        assert code == 200
        code, body = self.get(f"/v1/runs/{json.loads(body)['runs'][-1]['id']}", token)
        assert code == 200
        return json.loads(body)  # type: ignore[no-any-return]

    def wait_until(self, is_true: Callable[[dict[str, Any]], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not is_true(self.status()):
            assert time.monotonic() < deadline, self.status()
            time.sleep(0.05)

    def wait_for_round(self, round_: int) -> None:
        self.wait_until(lambda status: status["round"] >= round_)


@pytest.fixture
def site(tmp_path: Path, make_bundle: MakeBundle) -> Iterator[Callable[[str], Site]]:
    sites: list[Site] = []

    def make(train: str = "lora") -> Site:
        sites.append(Site(tmp_path, make_bundle(train, 2)))
        return sites[-1]

    yield make
    for each in sites:
        for process in each.processes:
            process.kill()
            process.communicate()


def settings(algorithm: str, rounds: int = 12, **client: object) -> str:
    lines = [f"{name} = {json.dumps(value)}" for name, value in ({"learning_rate": 0.01} | client).items()]
    return f"""
name = "tiny"
algorithm = "{algorithm}"
rounds = {rounds}
seed = 5
directions = 2
batch_size = 8
max_length = 16
report_every = 4
[client]
{chr(10).join(lines)}
[tail]
learning_rate = 3e-3
[evaluation]
every = 6
[devices]
start_with = 2
"""


@pytest.mark.parametrize(
    ("algorithm", "train", "client"),
    [
        ("ho-sfl", "lora", {}),
        ("ho-sfl", "norm:-1", {"optimizer": "adamw"}),
        ("hosl", "lora", {}),
        ("frozen", "lora", {}),
    ],
)
def test_a_run_with_two_devices_ends_in_a_checkpoint_that_computes_what_the_halves_do(
    site: Callable[[str], Site], tmp_path: Path, algorithm: str, train: str, client: dict[str, object]
) -> None:
    here = site(train)
    cloud = here.start_cloud(settings(algorithm, **client))
    devices = [here.start_device(name) for name in ("pi-1", "pi-2")]
    first, second = (here.summary(device) for device in devices)
    text = here.finish(cloud)
    assert f"run {here.run} completed at round 12" in text
    assert first["weights_digest"] == second["weights_digest"] != ""
    assert first["outcome"] == "completed"
    assert first["sent_bytes"] > 12 * 8 * 4 * 32 * 4, "twelve Anchors weigh more than this"
    merged = merge(here, tmp_path / "merged")
    accuracy = re.findall(r"evaluation at round 12: accuracy (\S+) % \((\d+) of (\d+) right, ", text)
    assert accuracy, text
    right, scored = int(accuracy[0][1]), int(accuracy[0][2])
    assert count_right(merged, [tmp_path / f"pi-{n}-eval.jsonl" for n in (1, 2)]) == (right, scored)


def merge(here: Site, out: Path) -> Path:
    process = here._start(
        "hosl_cloud", "merge", here.run, "--data-dir", here.folder / "cloud", "--out", out, "--checkpoint", "last"
    )
    here.finish(process)
    return out


def test_a_device_that_is_killed_comes_back_and_holds_the_same_bits(site: Callable[[str], Site]) -> None:
    here = site("lora")
    text = kill_and_restart_a_device(here, lambda journal: None)
    assert "device pi-1 is away" in text
    assert text.count("device pi-1 is ready") == 2


def test_a_device_with_a_corrupt_journal_rebuilds_its_weights(site: Callable[[str], Site]) -> None:
    here = site("lora")
    torn = kill_and_restart_a_device(here, lambda journal: journal.write_bytes(journal.read_bytes()[:-7]))
    assert torn.count("device pi-1 is ready") == 2


def test_a_device_whose_disk_was_lost_starts_at_the_base_and_catches_up(site: Callable[[str], Site]) -> None:
    here = site("norm")
    fresh = kill_and_restart_a_device(here, lambda journal: journal.unlink())
    assert fresh.count("device pi-1 is ready") == 2


def test_a_device_with_a_corrupt_shard_fetches_it_again_and_goes_on_from_a_snapshot(
    site: Callable[[str], Site],
) -> None:
    here = site("lora")

    def damage(journal: Path) -> None:
        # A link so fast that the download pays, whatever was missed.
        (journal.parent / "pace.json").write_text('{"link_bytes_per_s": 1e12}', encoding="ascii")
        (shard,) = (here.folder / "cache").rglob("shard.safetensors")
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.unlink()  # pi-2 has it mapped
        shard.write_bytes(bytes(data))

    text = kill_and_restart_a_device(here, damage)
    assert "device pi-1 takes a snapshot of round" in text
    assert text.count("device pi-1 is ready") == 2
    assert "shard.safetensors is damaged; it is fetched again" in here.errors(here.processes[-1])


def kill_and_restart_a_device(here: Site, damage: Callable[[Path], object]) -> str:
    """Kill pi-1 in the middle of a run, damage its journal, start it again; what the cloud printed."""
    cloud = here.start_cloud(settings("ho-sfl", rounds=10**6, learning_rate=1e-6))
    first, second = (here.start_device(name) for name in ("pi-1", "pi-2"))
    here.wait_for_round(5)
    first.kill()
    first.wait()
    here.wait_for_round(10)
    damage(here.folder / "state" / "pi-1" / "journal")
    again = here.start_device("pi-1", data=here.folder / "pi-1-train.jsonl")
    here.wait_until(lambda status: any(each["name"] == "pi-1" and each["is_ready"] for each in status["members"]))
    here.wait_for_round(here.status()["round"] + 5)
    cloud.send_signal(signal.SIGINT)
    text = here.finish(cloud, ExitCode.INTERRUPTED)
    ends = [here.summary(device) for device in (again, second)]
    assert ends[0]["rounds"] == ends[1]["rounds"] > 10
    assert ends[0]["weights_digest"] == ends[1]["weights_digest"] != ""
    return text


def test_strangers_are_refused(site: Callable[[str], Site], tmp_path: Path) -> None:
    here = site("lora")
    here.start_cloud(settings("ho-sfl"))
    assert here.token_file.stat().st_mode & 0o777 == 0o600
    token = here.token_file.read_text(encoding="ascii").strip()
    for path in ("/metrics", "/v1/bundle/manifest.json", "/v1/bundle/shard/shard.onnx"):
        assert here.get(path)[0] == 401
        assert here.get(path, "wrong")[0] == 401
        assert here.get(path, token)[0] == 200
    assert here.get("/healthz")[0] == 200
    for path in ("tail/tail.safetensors", "shard/../tail/config.json", "../run.toml", "shard/absent"):
        assert here.get(f"/v1/bundle/{path}", token)[0] == 404
    here.token_file = tmp_path / "wrong-token"
    here.token_file.write_text("wrong\n", encoding="ascii")
    stranger = here.start_device("pi-1")
    here.finish(stranger, ExitCode.REFUSED)
    assert "does not know the token" in here.errors(stranger)


def test_data_that_has_changed_since_the_run_began_is_named(site: Callable[[str], Site]) -> None:
    here = site("lora")
    here.start_cloud(settings("ho-sfl", rounds=10**6, learning_rate=1e-6))
    first, _ = (here.start_device(name) for name in ("pi-1", "pi-2"))
    here.wait_for_round(2)
    first.kill()
    first.wait()
    again = here.start_device("pi-1", data=write_reviews(here.folder / "pi-1-train.jsonl", 39))
    here.finish(again, ExitCode.DATA)
    assert "pi-1-train.jsonl: the training data has changed since this device joined" in here.errors(again)


def test_a_data_error_ends_the_device_and_names_the_line(site: Callable[[str], Site], tmp_path: Path) -> None:
    here = site("lora")
    here.start_cloud(settings("ho-sfl"))
    data = write_reviews(tmp_path / "bad.jsonl", 3)
    data.write_text(data.read_text(encoding="utf-8") + '{"text": "the film"}\n', encoding="utf-8")
    device = here.start_device("pi-1", data=data)
    here.finish(device, ExitCode.DATA)
    assert f"hosl-edge: error: {data}:4: has no field 'label'" in here.errors(device)


def test_a_budget_that_cannot_hold_the_shard_is_refused_with_figures(site: Callable[[str], Site]) -> None:
    here = site("lora")
    here.start_cloud(settings("ho-sfl"))
    device = here.start_device("pi-1", "--memory-budget", "10M")
    here.finish(device, ExitCode.RESOURCES)
    assert re.search(r"memory budget is 10 MB, this run needs \d+ MB", here.errors(device))


def test_a_stopped_service_tells_its_devices(site: Callable[[str], Site]) -> None:
    here = site("lora")
    cloud = here.start_cloud(settings("ho-sfl", rounds=10**6, learning_rate=1e-6))
    devices = [here.start_device(name) for name in ("pi-1", "pi-2")]
    here.wait_for_round(2)
    cloud.send_signal(signal.SIGINT)
    text = here.finish(cloud, ExitCode.INTERRUPTED)
    assert f"run {here.run} stopped" in text
    assert {here.summary(device)["outcome"] for device in devices} == {"stopped"}


def test_a_device_fetches_only_the_shard_and_keeps_it(site: Callable[[str], Site]) -> None:
    here = site("lora")
    here.start_cloud(settings("ho-sfl", rounds=2))
    for device in [here.start_device(name) for name in ("pi-1", "pi-2")]:
        here.finish(device)
    manifest = load_manifest(here.bundle)
    folder = here.folder / "cache" / "shards" / manifest.shard_digest
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files - {".lock"} == {entry.path for entry in manifest.shard_files}


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["serve", "--bundle", "absent", "--config", "run.toml"], ExitCode.BUNDLE, "no bundle at absent"),
        (["serve", "--bundle", "{bundle}", "--config", "absent.toml"], ExitCode.SETTINGS, "absent.toml"),
        (
            ["serve", "--bundle", "{bundle}", "--config", "absent.toml", "--host", "0.0.0.0"],
            ExitCode.SETTINGS,
            "without TLS sends everything as plain text",
        ),
        (["serve", "--bundle", "{bundle}"], ExitCode.SETTINGS, "say what to train: --task PRESET"),
        (["serve", "--bundle", "{bundle}", "--task", "sst"], ExitCode.SETTINGS, "task.preset is 'sst': use one of"),
        (["serve", "--task", "sst2"], ExitCode.SETTINGS, "--bundle is not given"),
        (["merge", "nothing", "--out", "x", "--data-dir", "absent"], ExitCode.SETTINGS, "no service has run there"),
    ],
)
def test_what_the_service_cannot_use_is_named(
    make_bundle: MakeBundle, tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    bundle = make_bundle("lora", 2)
    command = [sys.executable, "-m", "hosl_cloud", *(argument.format(bundle=bundle) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=DEADLINE_S, check=False)
    assert done.returncode == code
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1, "one clear line"
