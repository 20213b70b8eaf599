"""Every file of the agent, damaged in every way: one line that names it, the right exit code, nothing good lost."""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from damaging import DAMAGES, contents, damage, without_privileges
from hosl_edge.__main__ import main
from hosl_edge.data.images import load_images
from hosl_edge.exceptions import DataError
from hosl_edge.session import Session
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.manifest import MANIFEST, SHARD_GRAPH, SHARD_TOKENIZER, SHARD_WEIGHTS, ImageEntry, load_manifest
from hosl_protocol.run.settings import RunSettings, convert
from hosl_protocol.run.tasks import Task, load_preset
from hosl_protocol.run.updates import update_shape
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.messages import Complete, Welcome

TOKEN = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEF"
SETTINGS: RunSettings = convert(
    {"task": load_preset("reviews"), "batch_size": 2, "max_length": 16, "directions": 2}, RunSettings, "run"
)
ROWS = 6


class Handler(BaseHTTPRequestHandler):
    """Serves a folder as hosl-cloud serves a bundle."""

    def __init__(self, folder: Path, *rest: object) -> None:
        self.folder = folder
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        is_known = self.headers["Authorization"] == f"Bearer {TOKEN}"
        is_there = self.path.startswith("/v1/bundle/")
        body = (self.folder / self.path.removeprefix("/v1/bundle/")).read_bytes() if is_known and is_there else b""
        self.send_response(401 if not is_known else 200 if is_there else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def bundle(make_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(make_bundle("lora", 2), tmp_path / "bundle")


@pytest.fixture
def address(bundle: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, bundle))
    thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield f"ws://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def agent(address: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """`hosl-edge` on its own files in `device/`; all of it but the websocket: joins, takes three updates, and ends."""
    manifest = load_manifest(bundle)

    async def run(session: Session) -> Complete:
        welcome = Welcome(
            run="r1",
            epoch=0,
            round=0,
            width=manifest.width,
            update=update_shape(SETTINGS, manifest),
            settings=SETTINGS,
            plan="continue",
        )
        device = session.device
        device.join(welcome, lambda snapshot, path: None)
        applied = device.applied_round
        updates = [UpdateRecord(n, np.array([n, -n], np.float32) * 1e-3, 0.1) for n in range(applied + 1, 4)]
        device.apply(updates)
        return Complete(run="r1", reason="completed", round=applied)

    monkeypatch.setattr(Session, "take_part", run)
    folder = tmp_path / "device"
    folder.mkdir()
    examples = [f'{{"text": "a film {n}", "label": {n % 2}}}\n' for n in range(ROWS)]
    (folder / "train.jsonl").write_text("".join(examples), encoding="utf-8")
    (folder / "train.csv").write_text(
        "text,label\n" + "".join(f'"a, film {n}",{n % 2}\n' for n in range(ROWS)), encoding="utf-8"
    )
    (folder / "token").write_text(TOKEN + "\n", encoding="ascii")
    lines = {"server": address, "token_file": str(folder / "token"), "state_dir": str(folder / "state")}
    lines |= {"cache_dir": str(folder / "cache"), "name": "pi"}
    (folder / "edge.toml").write_text("".join(f'{key} = "{value}"\n' for key, value in lines.items()), encoding="utf-8")

    def start(data: str = "train.jsonl") -> int:
        options = ["--config", str(folder / "edge.toml"), "--data", str(folder / data), "--threads", "1"]
        with without_privileges():
            return main([*options, "--fields", "text,label", "--json"])

    return start


@pytest.fixture
def folder(agent: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The agent's files after a first start."""
    assert agent("train.jsonl") == ExitCode.OK, capsys.readouterr().err
    capsys.readouterr()
    return tmp_path / "device"


def fails(
    agent: Callable[[str], int], folder: Path, capsys: pytest.CaptureFixture[str], code: ExitCode, data: str
) -> str:
    """The agent ends with this code and one line on stderr, and no file is touched; the line."""
    before = contents(folder)
    assert agent(data) == code
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if " pi: " not in line and "can be read by others" not in line]
    assert len(errors) == 1, errors
    assert errors[0].startswith("hosl-edge: error: ")
    assert contents(folder) == before
    return errors[0]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("token", ExitCode.SETTINGS),
        ("edge.toml", ExitCode.SETTINGS),
        ("train.jsonl", ExitCode.DATA),
        ("train.csv", ExitCode.DATA),
    ],
)
def test_a_damaged_file_of_the_users_is_named(
    agent: Callable[[str], int],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    code: ExitCode,
    how: str,
) -> None:
    data = name if name.startswith("train") else "train.jsonl"
    damage(folder / name, how)
    if (name, how) == ("token", "truncated"):
        # Half a token is a token: only the cloud can tell.
        assert "does not know the token" in fails(agent, folder, capsys, ExitCode.REFUSED, data)
        return
    line = fails(agent, folder, capsys, code, data)
    assert name in line or (name, how) == ("edge.toml", "empty"), line


@pytest.mark.parametrize("how", [*DAMAGES[:4]])
def test_a_damaged_manifest_of_the_clouds_is_named(
    agent: Callable[[str], int], folder: Path, bundle: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    # Within a value: what a name becomes may be taken for a field of a later version.
    place = (bundle / MANIFEST).read_bytes().index(b"llama")
    damage(bundle / MANIFEST, how, bit=8 * place + 7)
    line = fails(agent, folder, capsys, ExitCode.BUNDLE, "train.jsonl")
    assert f"{MANIFEST} is not a manifest" in line


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [SHARD_GRAPH, SHARD_WEIGHTS, SHARD_TOKENIZER])
def test_a_damaged_file_of_the_cached_shard_is_fetched_again_or_named(
    agent: Callable[[str], int],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    name: str,
    how: str,
) -> None:
    (path,) = (folder / "cache").rglob(Path(name).name)
    before = contents(folder)
    damage(path, how)
    if how in ("unreadable", "a directory"):
        line = fails(agent, folder, capsys, ExitCode.BUNDLE, "train.jsonl")
        assert str(path) in line
        assert "delete it" in line
        return
    assert agent("train.jsonl") == ExitCode.OK, capsys.readouterr().err
    assert f"{path} is damaged; it is fetched again" in caplog.text
    assert contents(folder) == before


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_journal_is_kept_and_made_anew_or_named(
    agent: Callable[[str], int],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    path = folder / "state" / "pi" / "journal"
    good = path.read_bytes()
    damage(path, how, bit=8 * (len(good) - 60))  # in the first of the three updates
    if how in ("unreadable", "a directory"):
        line = fails(agent, folder, capsys, ExitCode.DATA, "train.jsonl")
        assert f"journal {path}: " in line
        assert "delete it" in line
        return
    damaged = path.read_bytes()
    assert agent("train.jsonl") == ExitCode.OK, capsys.readouterr().err
    assert path.read_bytes() == good
    assert "comes again from the cloud" in caplog.text
    assert path.with_suffix(".damaged").read_bytes() == damaged


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_token_ids_are_made_again(
    agent: Callable[[str], int], folder: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    path = folder / "state" / "pi" / "tokens.safetensors"
    good = path.read_bytes()
    damage(path, how)
    assert agent("train.jsonl") == ExitCode.OK, capsys.readouterr().err
    assert how == "a directory" or path.read_bytes() == good


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_npz_file_is_named(tmp_path: Path, how: str, save: Callable[..., None]) -> None:
    path = tmp_path / "train.npz"
    save(path, images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4) % 2)
    # Bit 3 of a flag in the archive's directory: what zipfile finds it does not know.
    damage(path, how, bit=8 * (path.read_bytes().index(b"PK\x01\x02") + 8) + 5)
    task = Task(name="shapes", kind="image-classification", labels=("0", "1"))
    entry = ImageEntry(channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
    folder = path if how != "a directory" else path / "none"
    with without_privileges(), pytest.raises(DataError, match=r"train\.npz") as caught:
        load_images(folder, task, entry, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": ' + "[" * 100_000, "nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "a number too long"),
        ('{"text": "\\ud800", "label": 0}', "half of a surrogate pair"),
    ],
)
def test_a_line_that_json_knows_and_nothing_else_does_is_named(
    agent: Callable[[str], int], folder: Path, capsys: pytest.CaptureFixture[str], line: str, problem: str
) -> None:
    path = folder / "train.jsonl"
    path.write_text('{"text": "good", "label": 1}\n' + line + "\n", encoding="utf-8")
    error = fails(agent, folder, capsys, ExitCode.DATA, "train.jsonl")
    assert f"{path}:2: " in error
    assert problem in error


def test_zeros_at_the_end_of_a_journal_are_no_updates(
    agent: Callable[[str], int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "state" / "pi" / "journal"
    good = path.read_bytes()
    path.write_bytes(good + bytes(4096))  # as a power cut may leave it
    assert agent("train.jsonl") == ExitCode.OK, capsys.readouterr().err
    assert path.read_bytes() == good
    assert not path.with_suffix(".damaged").exists()
