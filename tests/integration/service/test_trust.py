"""Whom a device trusts: real TLS servers, right and wrong ones, and the certificate that it keeps."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request

import pytest

pytest.importorskip("cryptography")

from hosl_cloud.service.authority import Authority, make_authority
from hosl_edge.connection.fetch import fetch_bundle
from hosl_edge.connection.token import Token, parse_token
from hosl_edge.connection.trust import Cloud, connect_securely, ssl_context
from hosl_edge.exceptions import ConnectionLost, RefusedError, SignerError, TrustError
from hosl_edge.host.display import Progress
from hosl_edge.session import Session


@dataclass
class Site:
    """A TLS server: what it serves, and what it was asked with which token."""

    authority: Authority
    address: str = ""
    ca_pem: bytes = b""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    location: str = ""
    """Where it sends everybody."""

    @property
    def token(self) -> Token:
        return Token("pi", "pi~secret", self.authority.fingerprint)

    def count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, site: Site, *rest: object) -> None:
        self.site = site
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.site.asked.append((self.path, self.headers["Authorization"]))
        self.close_connection = True
        if self.site.location:
            self.send_response(302)
            self.send_header("Location", self.site.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = self.site.ca_pem if self.path == "/v1/ca.pem" else b"{}"
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Authority]:
    return {name: make_authority(tmp_path_factory.mktemp(name), ["cloud.example.org"]) for name in ("ours", "theirs")}


@pytest.fixture
def start(authorities: dict[str, Authority]) -> Iterator[Callable[[str], Site]]:
    servers: list[ThreadingHTTPServer] = []

    def start(name: str) -> Site:
        site = Site(authorities[name], ca_pem=authorities[name].ca_cert.read_bytes())
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, site))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(site.authority.server_cert, site.authority.server_key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
        servers.append(server)
        site.address = f"wss://127.0.0.1:{server.server_address[1]}"
        return site

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def site(start: Callable[[str], Site]) -> Site:
    return start("ours")


def ask(cloud: Cloud) -> bytes:
    with cloud.open(Request(cloud.url("x"), headers=cloud.headers), 5.0) as response:
        body: bytes = response.read()
        return body


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("secret", Token("", "secret")),
        ("~secret~F", Token("", "secret", "F")),
        ("pi.kitchen-1~secret", Token("pi.kitchen-1", "pi.kitchen-1~secret")),
        ("pi~secret~F", Token("pi", "pi~secret", "F")),
        ("pi~", None),
        ("pi~~F", None),
        ("pi~secret~", None),
        ("pi~secret~F~more", None),
    ],
)
def test_a_token_says_whose_it_is_and_whom_to_trust(text: str, token: Token | None) -> None:
    assert parse_token(text) == token


def test_a_token_does_not_show_its_secret() -> None:
    token = Token("pi", "pi~secret", "F")
    assert "secret" not in f"{token!r} {Cloud('wss://host', token)!r}"


def test_the_ca_of_the_fingerprint_is_fetched_once_and_kept(site: Site, tmp_path: Path) -> None:
    assert ask(connect_securely(site.address, site.token, tmp_path)) == b"{}"
    assert ask(connect_securely(site.address, site.token, tmp_path)) == b"{}"
    assert site.asked == [("/v1/ca.pem", None), ("/v1/x", "Bearer pi~secret"), ("/v1/x", "Bearer pi~secret")]
    kept = tmp_path / "ca" / f"{site.authority.fingerprint}.pem"
    assert ssl.PEM_cert_to_DER_cert(kept.read_text()) == ssl.PEM_cert_to_DER_cert(site.ca_pem.decode())


def test_a_ca_of_another_fingerprint_is_refused_and_nothing_is_sent_or_kept(
    start: Callable[[str], Site], tmp_path: Path
) -> None:
    ours, theirs = start("ours"), start("theirs")
    with pytest.raises(TrustError) as caught:
        connect_securely(theirs.address, ours.token, tmp_path)
    assert str(caught.value) == (
        f"{theirs.address} is not the service that this token is for: its CA has the fingerprint "
        f"{theirs.authority.fingerprint}, expected {ours.authority.fingerprint}; check --server, or make a new token "
        "with hosl-cloud device add"
    )
    assert theirs.asked == [("/v1/ca.pem", None)]
    assert not list(tmp_path.iterdir())


def test_the_right_ca_from_a_server_that_it_does_not_vouch_for_is_refused(
    start: Callable[[str], Site], tmp_path: Path
) -> None:
    ours, theirs = start("ours"), start("theirs")
    theirs.ca_pem = ours.ca_pem  # anybody may know it
    cloud = connect_securely(theirs.address, ours.token, tmp_path)
    with pytest.raises(ConnectionLost, match="certificate verify failed"):
        fetch_bundle(cloud, tmp_path, lambda done, size: None)
    assert theirs.asked == [("/v1/ca.pem", None)], "it never saw the token"


def test_what_comes_along_with_the_ca_is_not_trusted(start: Callable[[str], Site], tmp_path: Path) -> None:
    ours, theirs = start("ours"), start("theirs")
    theirs.ca_pem = ours.ca_pem + theirs.authority.ca_cert.read_bytes()
    try:
        cloud = connect_securely(theirs.address, ours.token, tmp_path)
    except TrustError:
        return
    with pytest.raises(ConnectionLost, match="certificate verify failed"):
        fetch_bundle(cloud, tmp_path, lambda done, size: None)


def test_the_name_counts(site: Site, tmp_path: Path) -> None:
    named = site.address.replace("127.0.0.1", "127.0.0.2")
    site_token = site.token
    connect_securely(site.address, site_token, tmp_path)  # keeps the CA
    context = ssl_context(named, site_token, tmp_path)
    assert context is not None
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        _handshake(context, site.address, "127.0.0.2")
    _handshake(context, site.address, "cloud.example.org")


def _handshake(context: ssl.SSLContext, address: str, name: str) -> None:
    host, port = address.removeprefix("wss://").split(":")
    with (
        socket.create_connection((host, int(port)), timeout=5.0) as plain,
        context.wrap_socket(plain, server_hostname=name),
    ):
        pass


def test_without_a_fingerprint_the_systems_authorities_decide(site: Site, tmp_path: Path) -> None:
    with pytest.raises(SignerError, match="certificate verify failed"):
        fetch_bundle(connect_securely(site.address, Token("pi", "pi~s"), tmp_path), tmp_path, lambda done, size: None)
    assert not site.asked
    assert ssl_context("ws://127.0.0.1:1", site.token, tmp_path) is None


@pytest.mark.parametrize("damage", [b"", b"nothing", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_kept_certificate_that_was_damaged_is_fetched_again(
    site: Site, tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    connect_securely(site.address, site.token, tmp_path)
    (tmp_path / "ca" / f"{site.authority.fingerprint}.pem").write_bytes(damage)
    assert ask(connect_securely(site.address, site.token, tmp_path)) == b"{}"
    assert site.count("/v1/ca.pem") == 2
    assert "it is fetched again" in caplog.text


@pytest.mark.parametrize("body", [b"nothing", b"\xff" * 100, b"-----BEGIN CERTIFICATE-----\n" * 5000])
def test_a_ca_that_is_none_is_refused(site: Site, tmp_path: Path, body: bytes) -> None:
    site.ca_pem = body
    with pytest.raises(TrustError, match="has the fingerprint no certificate, expected"):
        connect_securely(site.address, site.token, tmp_path)


def test_a_service_that_is_away_or_has_no_ca_yet_is_tried_again(site: Site, tmp_path: Path) -> None:
    site.ca_pem = b""
    with pytest.raises(ConnectionLost, match=r"/v1/ca\.pem answered 404"):
        connect_securely(site.address, site.token, tmp_path)
    with pytest.raises(ConnectionLost, match=r"cannot reach https://127\.0\.0\.1:1/v1/ca\.pem"):
        connect_securely("wss://127.0.0.1:1", site.token, tmp_path)


def test_the_cloud_sends_a_device_nowhere_else(site: Site, start: Callable[[str], Site], tmp_path: Path) -> None:
    victim = start("ours")
    cloud = connect_securely(site.address, site.token, tmp_path)
    site.location = victim.address.replace("wss", "https") + "/v1/open-the-door"
    with pytest.raises(ConnectionLost, match="answered 302"):
        fetch_bundle(cloud, tmp_path, lambda done, size: None)
    with pytest.raises(ConnectionLost, match="answered 302"):
        connect_securely(site.address, site.token, tmp_path / "another")
    assert not victim.asked


def test_a_redirect_of_the_websocket_is_not_followed(site: Site, start: Callable[[str], Site], tmp_path: Path) -> None:
    victim, nothing = start("ours"), SimpleNamespace(say=print)
    cloud = connect_securely(site.address, site.token, tmp_path)
    site.location = victim.address + "/v1/device"
    device: Any = nothing
    display: Any = nothing
    with pytest.raises(ConnectionLost, match="answered 302"):
        asyncio.run(Session(device, display, Progress(), "test", cloud).take_part())
    assert not victim.asked


def test_an_unknown_token_ends_the_agent(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = connect_securely(site.address, site.token, tmp_path)
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.send_error(401))
    with pytest.raises(RefusedError, match="has revoked it") as caught:
        fetch_bundle(cloud, tmp_path, lambda done, size: None)
    assert not caught.value.retry
