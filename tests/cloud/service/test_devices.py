"""The devices' tokens through the admin's API and commands, against a real service with TLS."""

from __future__ import annotations

import asyncio
import json
import shlex
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hosl_cloud.__main__ import main
from hosl_cloud.commands.client import ApiClient
from hosl_cloud.commands.devices import device_command
from hosl_cloud.exceptions import RequestError
from hosl_cloud.service.authority import make_authority
from hosl_cloud.service.listen import ListenSettings, write_service_file
from hosl_edge.__main__ import main as edge
from hosl_edge.data.consent import check_consent
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.tasks import Task, load_preset
from services import Service, serving
from support import TASK

Cli = Callable[..., Awaitable[int]]

SHIPPED = [msgspec.convert(load_preset(name), Task) for name in ("sst2", "lm")]


@pytest.fixture
def run(export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> Callable[..., None]:
    """Run a test against a service with a CA of its own, whose run waits for a device."""

    def run(test: Callable[[Service], Awaitable[None]]) -> None:
        settings = {"batch_size": 4, "max_length": 16, "rounds": 10**6}
        (tmp_path / "cloud").mkdir()
        make_authority(tmp_path / "cloud", ["cloud.example.org"])

        async def run_it() -> None:
            listen = ListenSettings("127.0.0.1", 0).with_authority(tmp_path / "cloud")
            config = {**msgspec.toml.decode(TASK), **settings}
            async with serving(export_bundle(tiny_model, "lora", 2), tmp_path / "cloud", config, listen) as service:
                write_service_file(service.folder, listen, service.address)
                await asyncio.wait_for(test(service), 30.0)

        asyncio.run(run_it())

    return run


async def cli(service: Service, *options: str) -> int:
    """`hosl-cloud device`, with what it needs to find the service."""
    return await asyncio.to_thread(main, ["device", *options, "--data-dir", str(service.folder)])


def client(service: Service, token: str | None = None) -> ApiClient:
    return ApiClient(service.address, token or service.admin_token, service.folder / "tls" / "ca.pem")


def test_a_device_is_added_listed_and_revoked(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    async def test(service: Service) -> None:
        assert await cli(service, "add", "pi.kitchen") == 0
        path = tmp_path / "pi.kitchen.token"
        name, secret, fingerprint = path.read_text().strip().split("~")
        port = service.address.rpartition(":")[2]
        out = capsys.readouterr().out
        assert f"hosl-edge --server wss://127.0.0.1:{port} --token-file pi.kitchen.token --data FILE" in out
        assert "--fields" not in out, "a shipped task's name allows its fields"
        assert secret not in out
        assert path.stat().st_mode & 0o777 == 0o600
        assert (name, fingerprint) == (
            "pi.kitchen",
            ListenSettings("", 0).with_authority(service.folder).authority.fingerprint,
        )  # type: ignore[union-attr]
        assert await cli(service, "add", "pi.kitchen") == 3
        assert "pi.kitchen.token exists: choose another --out" in capsys.readouterr().err
        assert await cli(service, "add", "pi.kitchen", "--out", "other") == 6
        assert "refused: device pi.kitchen has a token: revoke it first" in capsys.readouterr().err
        assert await cli(service, "add", "second", "--out", "-") == 0
        assert capsys.readouterr().out.startswith("second~")
        assert await cli(service, "add", "third", "--json", "--out", "t") == 0
        assert json.loads(capsys.readouterr().out) == {"name": "third", "token_file": "t"}
        assert await cli(service, "revoke", "pi.kitchen") == 0
        assert capsys.readouterr().out == "the token of pi.kitchen is revoked\n"
        assert await cli(service, "list") == 0
        rows = capsys.readouterr().out.splitlines()
        assert [row.split()[0] for row in rows] == ["pi.kitchen", "second", "third"]
        assert ["revoked" in row for row in rows] == [True, False, False]
        assert await cli(service, "list", "--json") == 0
        listed = json.loads(capsys.readouterr().out)["devices"]
        assert {key for device in listed for key in device} == {"name", "created_at", "revoked_at", "bundle"}
        assert await cli(service, "revoke", "nobody") == 6
        assert "refused: no device 'nobody' has a token" in capsys.readouterr().err

    run(test)


def test_the_command_for_a_new_device_has_what_the_waiting_run_asks_for(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    async def test(service: Service) -> None:
        store, bundle = service.coordinator.run.store, service.coordinator.run.bundle.name
        row = await asyncio.to_thread(store.run, "run-1")
        task = Task(name="own", kind="sequence-classification", template="{message}", labels=("a", "b"))
        own = msgspec.structs.replace(row.config, task=task)
        await asyncio.to_thread(store.set_state, "run-1", "stopped")
        assert await cli(service, "add", "first") == 0
        assert "--fields" not in capsys.readouterr().out, "no run waits"
        await asyncio.to_thread(store.create_run, "run-2", row.bundle, row.shard_digest, own)
        assert await cli(service, "add", "second") == 0
        assert "--fields message,label" in capsys.readouterr().out
        assert await cli(service, "add", "third", "--bundle", bundle) == 0
        assert "--fields message,label" in capsys.readouterr().out
        assert await cli(service, "add", "fourth", "--bundle", "another") == 0
        assert "--fields" not in capsys.readouterr().out, "it is kept to the runs of another bundle"

    run(test)


def test_a_path_that_cannot_be_written_costs_no_token(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test(service: Service) -> None:
        path = tmp_path / "a folder" / "garage.token"
        assert await cli(service, "add", "garage", "--out", str(path)) == 3
        assert capsys.readouterr().err.endswith(
            "a folder/garage.token cannot be written (No such file or directory): choose another --out\n"
        )
        path.parent.mkdir()
        assert await cli(service, "add", "garage", "--out", str(path)) == 0
        assert f"--token-file '{path}' --data FILE" in capsys.readouterr().out

    run(test)


@pytest.mark.parametrize("name", ["../run", "a/b", "", ".", "é", "%2e%2e"])
def test_a_name_that_is_none_is_named(run: Callable[..., None], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def test(service: Service) -> None:
        assert await cli(service, "add", name, "--out", str(service.folder / "out")) == ExitCode.SETTINGS
        assert "use 1 to 64 characters of A-Za-z0-9._-" in capsys.readouterr().err
        assert await cli(service, "revoke", name) != ExitCode.OK
        assert not (service.folder / "out").exists()

    run(test)


def test_the_client_names_what_is_wrong_in_one_line(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async def fails(method: str, path: str, body: object = None, token: str | None = None) -> tuple[int, str]:
            with pytest.raises(RequestError) as caught:
                await asyncio.to_thread(client(service, token).request, method, path, body)
            assert "\n" not in str(caught.value)
            return caught.value.status, str(caught.value)

        device = (await asyncio.to_thread(client(service).request, "POST", "/v1/devices", {"name": "pi"}))["token"]
        for token, status, reason in (
            ("wrong" * 9, 401, "it does not know the admin token"),
            (service.token, 403, "the admin's may"),
            (device.rpartition("~")[0], 403, "the admin's may"),
        ):
            for method, path in (("GET", "/v1/devices"), ("POST", "/v1/devices"), ("DELETE", "/v1/devices/pi")):
                got, line = await fails(method, path, {"name": "x"} if method == "POST" else None, token)
                assert (got, reason in line) == (status, True), line
        assert (await fails("GET", "/v1/nowhere"))[0] == 404
        for body in ({}, {"name": 5}, {"name": "x", "more": 1}, [], "x"):
            got, line = await fails("POST", "/v1/devices", body)
            assert got == 422
            assert "the body cannot be used" in line
        assert (await fails("POST", "/v1/devices", {"name": "x" * 2**20}))[0] in (0, 413)
        assert [row.name for row in service.authenticator.access.list()] == ["pi"]

    run(test)


class Canned(BaseHTTPRequestHandler):
    """A server that answers everything alike."""

    def __init__(self, status: int, body: bytes, *rest: Any) -> None:
        self.status, self.body = status, body
        super().__init__(*rest)

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def canned(request: pytest.FixtureRequest) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Canned, *request.param)) as server:
        threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_bundle_that_is_not_there_is_worth_a_warning(
    run: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(service: Service) -> None:
        known = service.coordinator.run.bundle.name
        assert await cli(service, "add", "one", "--bundle", known, "--out", str(tmp_path / "one")) == 0
        assert caplog.text == ""
        assert await cli(service, "add", "two", "--bundle", "nosuch", "--out", str(tmp_path / "two")) == 0
        assert "no bundle 'nosuch' is in the service's folder yet" in caplog.text

    run(test)


@pytest.mark.parametrize(
    ("canned", "status", "reason"),
    [
        ((429, b""), 429, "try again later"),
        ((409, b'{"error": "two\\nlines"}'), 409, "refused: two lines"),
        ((503, b"<html>"), 503, "503 Service Unavailable"),
        ((302, b""), 302, "302 Found"),
        ((200, b"<html>"), 0, "is it a hosl service"),
    ],
    indirect=["canned"],
)
def test_an_answer_that_is_none_is_named(canned: str, status: int, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        ApiClient(canned, "t").request("GET", "/v1/devices")
    assert caught.value.status == status


def test_a_service_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["device", "list", "--data-dir", str(tmp_path)]
    assert main(options) == 6
    assert "no service runs in" in capsys.readouterr().err
    (tmp_path / "admin-token").write_text("a" * 43)
    (tmp_path / "admin-token").chmod(0o600)
    assert main([*options, "--server", "wss://127.0.0.1:1"]) == 6
    assert "cannot reach https://127.0.0.1:1/v1/devices" in capsys.readouterr().err
    assert main([*options, "--server", "127.0.0.1"]) == 3
    assert "use wss://host:port" in capsys.readouterr().err
    assert main([*options, "--server", "wss://127.0.0.1:1", "--ca", str(tmp_path / "absent")]) == 3
    assert "absent does not exist" in capsys.readouterr().err
    (tmp_path / "admin-token").chmod(0o644)
    assert main([*options, "--server", "wss://127.0.0.1:1"]) == 3
    assert "can be read by others: run chmod 600" in capsys.readouterr().err


def test_the_environment_names_service_and_token(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test(service: Service) -> None:
        monkeypatch.setenv("HOSL_SERVER", service.address)
        monkeypatch.setenv("HOSL_ADMIN_TOKEN", service.admin_token)
        ca = str(service.folder / "tls" / "ca.pem")
        options = ["device", "list", "--data-dir", str(tmp_path / "elsewhere")]
        assert await asyncio.to_thread(main, [*options, "--ca", ca]) == 0
        assert await asyncio.to_thread(main, options) == 6
        error = capsys.readouterr().err
        assert "certificate verify failed" in error
        assert "give --ca FILE" in error
        monkeypatch.delenv("HOSL_ADMIN_TOKEN")
        assert await asyncio.to_thread(main, [*options, "--ca", ca]) == 3
        assert "give --admin-token-file FILE" in capsys.readouterr().err

    run(test)


@pytest.mark.parametrize(
    "task",
    [
        *SHIPPED,
        Task(name="tickets", kind="lm", template="{message} {answer|reply}"),
        Task(name="tickets", kind="sequence-classification", template="{message}", labels=("a", "b")),
        Task(name="sst2", kind="sequence-classification", template="{review}", labels=("a", "b")),
        Task(name="pets", kind="image-classification", labels=("cat", "dog")),
    ],
)
def test_the_command_for_a_device_allows_what_the_task_reads(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typed as it stands it needs no second try for consent."""
    words = shlex.split(device_command("ws://127.0.0.1:8765", tmp_path / "join token", task, "device-1"))
    assert words[0] == "hosl-edge"
    assert words[words.index("--name") + 1] == "device-1"
    assert edge(["config", "--json", *words[1:]]) == 0
    settings = {name: setting["value"] for name, setting in json.loads(capsys.readouterr().out).items()}
    check_consent(task, settings["fields"], share_text=settings["share_text"])
    assert (settings["fields"] is None) == (task in SHIPPED)
