"""The service's own CA: what it issues, who may read its keys, and that OpenSSL takes it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509

from hosl_cloud.__main__ import main
from hosl_cloud.exceptions import ServiceError
from hosl_cloud.service.authority import Authority, find_authority, make_authority, renew_certificate
from hosl_cloud.service.listen import ListenSettings
from hosl_cloud.service.secrets import ADMIN_TOKEN_FILE, read_secret

NAMES = ["cloud.example.org", "192.168.1.5", "2001:db8::5"]


def handshake(authority: Authority, host: str, ca: Path | None = None) -> None:
    """Both sides of a TLS handshake, in memory. Raises what the client finds wrong."""
    client = ssl.create_default_context(cafile=ca or authority.ca_cert)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(authority.server_cert, authority.server_key)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there, server_hostname=host), server.wrap_bio(there, back, server_side=True)]
    for end in ends * 3:
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    assert ends[0].getpeercert(), "the handshake did not come to its end"


@pytest.mark.parametrize("host", [*NAMES, "localhost", "127.0.0.1", "::1", socket.gethostname()])
def test_a_device_that_trusts_the_ca_takes_its_certificate_by_each_name(tmp_path: Path, host: str) -> None:
    handshake(make_authority(tmp_path, NAMES), host)


def test_another_name_and_another_ca_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    ours, theirs = (make_authority(tmp_path / name, NAMES) for name in ("a", "b"))
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(ours, "other.example.org")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(unable to get local issuer|signature|self-signed)"):
        handshake(ours, NAMES[0], ca=theirs.ca_cert)
    assert ours.fingerprint != theirs.fingerprint


def test_keys_and_certificates_are_the_owners(tmp_path: Path) -> None:
    authority = make_authority(tmp_path, NAMES)
    assert {path.name: path.stat().st_mode & 0o077 for path in authority.folder.iterdir()} == {
        "ca.key": 0, "ca.pem": 0, "server.key": 0, "server.pem": 0,
    }  # fmt: skip
    assert authority.folder.stat().st_mode & 0o077 == 0
    assert find_authority(tmp_path) == authority
    for path in (authority.ca_key, authority.server_key):
        path.chmod(0o640)
        with pytest.raises(ServiceError, match=f"can be read by others: run chmod 600 {path}"):
            find_authority(tmp_path)
        path.chmod(0o600)


def test_the_fingerprint_is_of_the_cas_certificate(tmp_path: Path) -> None:
    authority = make_authority(tmp_path, NAMES)
    der = ssl.PEM_cert_to_DER_cert(authority.ca_cert.read_text())
    assert base64.urlsafe_b64decode(authority.fingerprint + "=") == hashlib.sha256(der).digest()


def test_the_certificate_says_no_more_than_it_must(tmp_path: Path) -> None:
    authority = make_authority(tmp_path, ["cloud.example.org"])
    ca, server = (
        x509.load_pem_x509_certificate(path.read_bytes()) for path in (authority.ca_cert, authority.server_cert)
    )
    of_ca, of_server = (
        certificate.extensions.get_extension_for_class(x509.BasicConstraints).value for certificate in (ca, server)
    )
    assert (of_ca.ca, of_ca.path_length, of_server.ca) == (True, 0, False)
    assert [int((each.not_valid_after_utc - each.not_valid_before_utc).days) for each in (ca, server)] == [3651, 826]
    assert 824 < authority.days_left() <= 825
    server.verify_directly_issued_by(ca)


def test_the_ca_is_never_overwritten_and_its_certificate_can_be_renewed(tmp_path: Path) -> None:
    first = make_authority(tmp_path, NAMES)
    before = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    with pytest.raises(ServiceError, match="tls exists, and every device's token names its CA: give --renew"):
        make_authority(tmp_path, NAMES)
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == before
    renewed = renew_certificate(tmp_path, [])
    after = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    assert {name for name in before if before[name] == after[name]} == {"ca.pem", "ca.key"}
    assert renewed.names()[:3] == NAMES, "the names stay"
    handshake(renewed, NAMES[0])
    assert renew_certificate(tmp_path, ["new.example.org"]).names()[0] == "new.example.org"
    handshake(renewed, "new.example.org")


def test_an_init_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="--name https://cloud: use a host name"):
        make_authority(tmp_path, ["https://cloud"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ServiceError, match="run hosl-cloud init without --renew first"):
        renew_certificate(tmp_path, [])


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "-a", "a..b", "é.example.org", "n" * 64, "*", "host:8765", "10.0.0.0/8"]
)
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ServiceError, match="use a host name such as"):
        make_authority(tmp_path, [name])


def test_a_damaged_certificate_is_named(tmp_path: Path) -> None:
    authority = make_authority(tmp_path, NAMES)
    authority.ca_cert.write_text("nothing")
    with pytest.raises(ServiceError, match=r"ca\.pem holds no certificate"):
        _ = authority.fingerprint
    authority.ca_cert.unlink()
    with pytest.raises(ServiceError, match=r"ca\.pem cannot be read \(No such file"):
        _ = authority.fingerprint


def test_openssl_takes_the_chain(tmp_path: Path) -> None:
    authority = make_authority(tmp_path, NAMES)
    try:
        subprocess.run(
            ["openssl", "verify", "-x509_strict", "-verify_hostname", NAMES[0], "-CAfile", authority.ca_cert,
             authority.server_cert], check=True, capture_output=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("needs the openssl command")


def test_the_command_makes_it_once_and_serve_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    options = ["init", "--data-dir", str(data), "--name", "cloud.example.org", "--name", "192.168.1.5"]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert "next: hosl-cloud serve --bundle DIR --task PRESET --host 0.0.0.0" in out
    assert " (for a task of your own: --config run.toml in place of --task)\n" in out
    assert "in a second terminal, for each device: hosl-cloud device add NAME" in out
    assert "the certificate is for cloud.example.org, 192.168.1.5, localhost" in out
    assert "ends in 825 days" in out
    assert read_secret(data / ADMIN_TOKEN_FILE) not in out
    assert main(options) == 3
    assert "give --renew" in capsys.readouterr().err
    listen = ListenSettings("0.0.0.0", 8765).with_authority(data)
    listen.check(insecure=False)
    assert listen.public_address(8765) == "wss://cloud.example.org:8765"
    assert listen.local_address(8765) == "wss://127.0.0.1:8765"
    assert main([*options, "--renew"]) == 0


def test_init_asks_for_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--data-dir", str(tmp_path)]) == 3
    assert "--name is missing: say what devices call this machine" in capsys.readouterr().err


def test_other_certificates_come_first(tmp_path: Path) -> None:
    authority = make_authority(tmp_path, NAMES)
    listen = ListenSettings("0.0.0.0", 1, authority.server_cert, authority.server_key)
    assert listen.with_authority(tmp_path) == listen
    assert ListenSettings("0.0.0.0", 1).with_authority(tmp_path / "other") == ListenSettings("0.0.0.0", 1)


def test_a_certificate_that_ends_soon_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("hosl_cloud.service.authority.SERVER_DAYS", 10)
        make_authority(tmp_path, NAMES)
    ListenSettings("127.0.0.1", 1).with_authority(tmp_path)
    assert [record.message for record in caplog.records] == [
        "the certificate ends in 10 days: run hosl-cloud init --renew"
    ]
