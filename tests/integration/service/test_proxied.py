"""A device and an admin behind a proxy: everything goes through it, and every line that fails names it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from forwarding import forwarding
from hosl_cloud.__main__ import main as cloud_main
from hosl_cloud.service.authority import make_authority
from hosl_cloud.service.listen import ListenSettings
from hosl_edge.__main__ import main
from hosl_edge.agent import run_agent
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import ExitCode
from services import serving
from support import TASK, free_port, write_reviews

BRIEF = f"rounds = 2\nbatch_size = 2\nmax_length = 16\n{TASK}\n[evaluation]\nevery = 0\n"
VARIABLES = [name for each in ("http", "https", "all", "no") for name in (f"{each}_proxy", f"{each.upper()}_PROXY")]


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def settings_of(folder: Path, server: str, token_file: Path) -> EdgeSettings:
    return EdgeSettings(
        server=server,
        token_file=str(token_file),
        data=str(write_reviews(folder / "train.jsonl", 8)),
        name="pi",
        threads=1,
        state_dir=str(folder / "state"),
        cache_dir=str(folder / "cache"),
        insecure=True,
    )


def options_of(settings: EdgeSettings) -> list[str]:
    names = ("server", "token_file", "data", "name", "state_dir", "cache_dir")
    return [part for name in names for part in (f"--{name.replace('_', '-')}", getattr(settings, name))]


@pytest.mark.parametrize("scheme", ["wss", "ws"])
def test_a_run_a_preflight_and_a_command_go_through_the_proxy(
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scheme: str,
) -> None:
    bundle = make_bundle("lora", 2)
    capsys.readouterr()
    (tmp_path / "cloud").mkdir()
    if scheme == "wss":
        make_authority(tmp_path / "cloud", ["cloud.example.org"])

    async def attend(proxy: str) -> str:
        monkeypatch.setenv({"wss": "https_proxy", "ws": "http_proxy"}[scheme], proxy)
        listen = ListenSettings("127.0.0.1", 0).with_authority(tmp_path / "cloud")
        config = msgspec.toml.decode(BRIEF)
        async with serving(bundle, tmp_path / "cloud", config, listen) as service:
            port = service.address.rpartition(":")[2]
            server = f"{scheme}://cloud.example.org:{port}"
            token = await asyncio.to_thread(service.authenticator.access.add, "pi")
            (tmp_path / "pi.token").write_text(token, encoding="ascii")
            settings = settings_of(tmp_path, server, tmp_path / "pi.token")
            await asyncio.to_thread(main, ["preflight", "--json", "--insecure", *options_of(settings)])
            ca = ["--ca", str(tmp_path / "cloud" / "tls" / "ca.pem")] if scheme == "wss" else []
            admin = [*ca, "--admin-token-file", str(tmp_path / "cloud" / "admin-token")]
            command = ["run", "list", "--server", server, "--data-dir", str(tmp_path / "none"), *admin]
            assert await asyncio.to_thread(cloud_main, command) == ExitCode.OK
            summary = await asyncio.wait_for(run_agent(settings), 60.0)
            assert (summary.outcome, summary.rounds) == ("completed", 2)
        return port

    with forwarding("me:hunter2") as forwarder:
        port = asyncio.run(attend(forwarder.address))
    captured = capsys.readouterr()
    shown = f"the proxy http://***@127.0.0.1:{forwarder.port} of {'https' if scheme == 'wss' else 'http'}_proxy"
    assert f"pi: goes through {shown}" in captured.err
    text, _, commands = captured.out.partition("\n]\n")
    found = {check["name"]: check for check in json.loads(text + "]")}
    assert found["proxy"]["detail"] == f"goes through {shown}"
    assert {found[name]["outcome"] for name in ("name", "connection", "token", "device", "run")} == {"ok"}
    assert "run-1" in commands
    assert "hunter2" not in captured.out + captured.err
    tunnels, plain = [
        [path for method, path in forwarder.asked if (method == "CONNECT") == is_tunnel] for is_tunnel in (True, False)
    ]
    assert set(tunnels) == {f"cloud.example.org:{port}"}
    assert all(path.startswith(f"http://cloud.example.org:{port}/") for path in plain)
    assert bool(plain) == (scheme == "ws")


def test_every_line_of_what_a_proxy_refuses_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:hunter2@127.0.0.1:{free_port()}")
    (tmp_path / "token").write_text("pi~secret", encoding="ascii")
    settings = settings_of(tmp_path, "wss://cloud.example.org:8765", tmp_path / "token")

    async def attend() -> None:
        await asyncio.wait_for(run_agent(settings), 0.9)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(attend())
    said = [line for line in capsys.readouterr().err.splitlines() if "next try in" in line]
    assert said
    assert all("cannot reach https://cloud.example.org:8765/v1/" in line for line in said)
    assert all(" through the proxy http://***@127.0.0.1:" in line and "of HTTPS_PROXY" in line for line in said)
    assert main(["preflight", *options_of(settings)]) == ExitCode.REFUSED
    (connection,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")]
    assert "cloud.example.org:8765 does not answer through the proxy http://***@127.0.0.1:" in connection
    assert "name cloud.example.org in no_proxy" in connection
    (tmp_path / "admin-token").write_text("s" * 43, encoding="ascii")
    (tmp_path / "admin-token").chmod(0o600)
    command = ["run", "list", "--server", settings.server, "--data-dir", str(tmp_path)]
    assert cloud_main(command) == ExitCode.REFUSED
    line = capsys.readouterr().err
    assert "through the proxy http://***@127.0.0.1:" in line
    assert "no_proxy" in line
    assert "hunter2" not in line


@pytest.mark.parametrize("value", ["socks5://me:hunter2@proxy:1080", "https://me:hunter2@proxy"])
def test_a_proxy_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv("https_proxy", value)
    for name in ("token", "admin-token"):
        (tmp_path / name).write_text("s" * 43, encoding="ascii")
        (tmp_path / name).chmod(0o600)
    settings = settings_of(tmp_path, "wss://cloud.example.org:8765", tmp_path / "token")
    assert main(options_of(settings)) == ExitCode.SETTINGS
    lines = [capsys.readouterr().err]
    assert main(["preflight", *options_of(settings)]) == ExitCode.SETTINGS
    lines += [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")]
    assert cloud_main(["run", "list", "--server", settings.server, "--data-dir", str(tmp_path)]) == ExitCode.SETTINGS
    lines.append(capsys.readouterr().err)
    assert len(lines) == 3
    for line in lines:
        assert line.count("\n") <= 1
        assert "https_proxy is '" in line
        assert "***@proxy" in line
        assert "no_proxy" in line
        assert "hunter2" not in line


def test_this_machine_is_reached_whatever_the_environment_says(
    make_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")

    async def attend() -> None:
        async with serving(make_bundle("lora", 2), tmp_path / "cloud", msgspec.toml.decode(BRIEF)) as service:
            settings = settings_of(tmp_path, service.address, service.token_file)
            assert await asyncio.to_thread(main, ["preflight", *options_of(settings)]) == ExitCode.OK
            summary = await asyncio.wait_for(run_agent(settings), 60.0)
            assert summary.outcome == "completed"

    asyncio.run(attend())
