"""An operator's day: a service in a process of its own, and the commands against it, while devices train."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from hosl_cloud.__main__ import main
from hosl_cloud.storage.data_folder import is_locked
from hosl_edge.agent import Summary
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import ExitCode
from processes import Program
from support import TASK, Crew, write_reviews

MakeBundle = Callable[[str, int], Path]
WAIT_S = 60.0


@dataclass
class Site:
    """A data folder, its service, and whoever operates it."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    process: Program | None = None
    address: str = ""
    crew: Crew = field(default_factory=Crew)

    @property
    def data_dir(self) -> Path:
        return self.folder / "cloud"

    def start(self, *options: str) -> list[str]:
        """Start the service; what it said until it listened."""
        arguments = ["serve", "--data-dir", str(self.data_dir), "--port", "0", "--drain-s", "10", *options]
        self.process = Program("hosl_cloud", *arguments, errors=self.folder / "errors")
        said = []
        for line in self.process.stdout:
            said.append(line)
            if found := re.search(r"listens on ([^\s;]+)", line):
                self.address = found[1]
                break
        return said

    def finish(self) -> int:
        assert self.process is not None
        self.process.communicate(timeout=WAIT_S)
        return self.process.returncode

    def run(self, *command: str, code: int = 0) -> str:
        """What a command prints."""
        self.capsys.readouterr()
        assert main([*command, "--data-dir", str(self.data_dir)]) == code
        captured = self.capsys.readouterr()
        return captured.out if code == 0 else captured.err

    def ask(self, *command: str) -> Any:
        return json.loads(self.run(*command, "--json"))

    def begin(self, bundle: str, rounds: int) -> str:
        config = self.folder / "run.toml"
        text = f'name = "{bundle}"\nrounds = {rounds}\nbatch_size = 4\nmax_length = 16\nreport_every = 1\n'
        config.write_text(text + "[evaluation]\nevery = 1000000\n" + TASK, encoding="utf-8")
        return str(self.ask("run", "start", "--bundle", bundle, "--config", str(config))["id"])

    def wait(self, run: str, is_so: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        deadline = time.monotonic() + WAIT_S
        while not is_so(shown := self.ask("run", "show", run)):
            assert time.monotonic() < deadline, shown
            time.sleep(0.05)
        return shown  # type: ignore[no-any-return]

    def train(self, name: str, bundle: str = "") -> Callable[[], Summary]:
        """Start an agent; the function waits for its end."""
        token = self.folder / f"{name}.token"
        if not token.exists():
            self.run("device", "add", name, "--out", str(token), "--bundle", bundle)
        settings = EdgeSettings(
            server=self.address,
            token_file=str(token),
            data=str(write_reviews(self.folder / "train.jsonl", 16)),
            eval=str(write_reviews(self.folder / "eval.jsonl", 8, 40)),
            threads=1,
            state_dir=str(self.folder / "state"),
            cache_dir=str(self.folder / "cache"),
        )
        return partial(self.crew.start(settings), WAIT_S)


@pytest.fixture
def site(tmp_path: Path, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]) -> Iterator[Site]:
    site = Site(tmp_path, capsys)
    for name, train in (("one", "lora"), ("two", "norm")):
        shutil.copytree(make_bundle(train, 2), site.data_dir / "bundles" / name)
    site.start()
    yield site
    if site.process is not None and site.process.poll() is None:
        site.process.kill()
        site.process.communicate()
    site.crew.dismiss()


def test_runs_begin_stop_go_on_and_are_deleted(site: Site) -> None:
    endless, second = site.begin("one", 10**6), site.begin("one", 3)
    other = site.begin("two", 10**6)
    assert [run["id"] for run in site.ask("run", "list")["runs"]] == [endless, second, other]
    device = site.train("pi", "one")
    shown = site.wait(endless, lambda run: run["round"] >= 3)
    assert [(each["name"], each["is_ready"]) for each in shown["members"]] == [("pi", True)]
    assert site.ask("run", "show", second)["state"] == "pending", "a bundle has one run at a time"
    assert site.ask("run", "show", other)["waits_for"]["what"] == "devices", "another bundle's run need not wait"
    for run, state in ((endless, "running"), (second, "pending")):
        assert f"is {state}: stop it first" in site.run("run", "rm", run, code=ExitCode.REFUSED)
    config = site.folder / "run.toml"
    config.write_text(config.read_text(encoding="utf-8").replace("batch_size", "batchsize"), encoding="utf-8")
    said = site.run("run", "start", "--bundle", "two", "--config", str(config), code=ExitCode.SETTINGS)
    assert "no setting has the name batchsize; did you mean batch_size?" in said

    stopped = site.ask("run", "stop", endless)
    assert (stopped["state"], device().outcome) == ("stopped", "stopped")
    device = site.train("pi")
    assert site.wait(second, lambda run: run["state"] == "completed")["round"] == 3
    assert (device().run, device().rounds) == (second, 3)
    check_evaluation(site, second)

    site.run("run", "resume", endless)
    device = site.train("pi")
    site.wait(endless, lambda run: run["round"] >= stopped["round"] + 2)
    text = site.run("log", endless)
    assert f"run {endless} resumes after round {stopped['round']}" in text
    (newest, *_) = reversed(site.ask("checkpoint", "list", endless)["checkpoints"])
    site.run("checkpoint", "export", endless, "--out", str(site.folder / "tail.safetensors"))
    assert load_file(site.folder / "tail.safetensors")
    assert newest["round"] >= stopped["round"]

    said = site.run("run", "show", "one-", code=ExitCode.SETTINGS)
    assert f"'one-' is the beginning of 2 runs: {endless}, {second}; give more of the name" in said
    for name, run in ((endless, endless), ("two", other)):
        site.run("run", "stop", name)
        assert site.run("run", "rm", name) == f"run {run} is deleted\n"
    assert [run["id"] for run in site.ask("run", "list")["runs"]] == [second]
    assert not (site.data_dir / "runs" / endless).exists()
    assert "no run" in site.run("run", "show", endless, code=ExitCode.REFUSED)


def check_evaluation(site: Site, run: str) -> None:
    """The last evaluation is shown class by class, with the same numbers wherever it is."""
    shown = site.ask("run", "show", run)["evaluation"]
    assert (shown["round"], shown["scored"], shown["examples"], shown["of_examples"]) == (3, 8, 8, 8)
    assert [each["name"] for each in shown["classes"]] == ["0", "1"]
    assert sum(shown["confusion"][k][k] for k in (0, 1)) == shown["right"]
    assert sum(map(sum, shown["confusion"])) == 8
    words = f"accuracy {100 * shown['right'] / 8:.1f} % ({shown['right']} of 8 right, 8 of 8 examples scored)"
    text = site.run("run", "show", run)
    assert f"evaluation at round 3: {words}, loss {shown['loss']:.4f}, macro F1 {shown['macro_f1']:.3f}\n" in text
    assert "class  examples  accuracy  precision     F1  most often taken for\n" in text
    for said in (site.run("log", run), site.run("run", "list"), site.run("checkpoint", "list", run)):
        assert words in said


def test_a_service_that_is_drained_leaves_and_goes_on_when_it_is_back(site: Site) -> None:
    run = site.begin("one", 10**6)
    site.train("pi")
    site.wait(run, lambda shown: shown["round"] >= 2)
    assert site.ask("drain")["runs"] == [run]
    assert not is_locked(site.data_dir), "drain waits until the service has left"
    assert site.finish() == 0
    (at_rest,) = site.ask("run", "list")["runs"]
    assert (at_rest["id"], at_rest["state"]) == (run, "paused"), "the folder says so where no service runs"
    for name in (run, "one", "latest"):
        assert site.ask("run", "show", name)["round"] == at_rest["round"]
        assert f"run {run} paused" in site.run("log", name)
    assert site.ask("checkpoint", "list", "latest")["checkpoints"][-1]["round"] == at_rest["round"]
    exported = site.folder / "tail.safetensors"
    assert site.ask("checkpoint", "export", "one", "--out", str(exported))["round"] == at_rest["round"]
    assert load_file(exported)
    exported.unlink()
    said = site.run("checkpoint", "export", "one", "--round", "999", "--out", str(exported), code=ExitCode.SETTINGS)
    assert "no checkpoint of round 999; there are: " in said
    assert "no run 'two'" in site.run("run", "show", "two", code=ExitCode.SETTINGS)
    assert "hosl-cloud serve" in site.run("run", "resume", "latest"), "it goes on with the next service"
    assert "killed" not in "".join(site.start())
    assert site.ask("run", "show", run)["round"] >= 2
    site.train("pi-2")
    reached = site.wait(run, lambda shown: shown["round"] >= 2)["round"]
    site.wait(run, lambda shown: shown["round"] > reached)
    assert site.process is not None
    site.process.send_signal(signal.SIGTERM)
    assert site.finish() == 0


def test_a_service_killed_outright_goes_on_with_every_run_whoever_began_it(site: Site) -> None:
    started = site.begin("one", 10**6)
    begin = ("--bundle", str(site.data_dir / "bundles" / "one"), "--task", "sequence-classification")
    begin = (*begin, "--set", "rounds=2", "--set", "batch_size=4")
    assert site.process is not None
    site.process.kill()
    site.process.communicate()
    said = site.start(*begin)
    first, second = site.ask("run", "list")["runs"]
    assert (first["id"], first["state"]) == (started, "pending"), "not stopped"
    assert second["id"].startswith("sequence-classification-"), "a run without a file is called as its task is"
    assert second["rounds"] == 2
    assert "the service that was here before was killed, or crashed" in "".join(said)
    assert any(f"run {started} goes on first, and run {second['id']} after it" in line for line in said)
    assert "those without --stay have ended" in site.run("run", "stop", started)  # while it is loaded, or soon after
    device = site.train("pi")
    site.wait(second["id"], lambda run: run["state"] == "completed")
    assert device().run == second["id"]
    site.run("drain")
    assert site.finish() == 0
    text = site.run("serve", *begin, "--once", "--port", "0")
    assert f"run {second['id']} of these settings is completed; --new begins another" in text

    assert "is completed" in site.run("run", "resume", second["id"], code=ExitCode.SETTINGS)
    assert site.ask("run", "resume", started)["state"] == "pending", "a stopped run goes on with the next service"


def test_a_run_takes_bundles_from_the_services_folder_alone(site: Site) -> None:
    config = site.folder / "run.toml"
    config.write_text(TASK, encoding="utf-8")
    for bundle in ("absent", "../cloud/bundles/one", "/etc", "one/shard", ""):
        error = site.run("run", "start", "--bundle", bundle, "--config", str(config), code=ExitCode.REFUSED)
        assert error.count("\n") == 1, bundle
        assert "bundle" in error, bundle
    assert site.ask("run", "list") == {"runs": []}
