"""Where the service may listen, and who may read its token."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hosl_cloud.exceptions import ServiceError
from hosl_cloud.service.listen import ListenSettings
from hosl_cloud.service.secrets import TOKEN_FILE, load_or_make_token


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_plain_text_may_stay_on_this_machine(host: str) -> None:
    ListenSettings(host, 0).check(insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_plain_text_leaves_this_machine_only_for_those_who_insist(host: str) -> None:
    with pytest.raises(ServiceError, match=f"--host {host} without TLS sends everything as plain text"):
        ListenSettings(host, 0).check(insecure=False)
    ListenSettings(host, 0).check(insecure=True)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate that vouches for itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(
        ["openssl", "req", "-x509", *curve, *files, "-subj", "/CN=localhost"], check=True, capture_output=True
    )
    return certificate, key


def test_with_tls_any_address_will_do(certificate: tuple[Path, Path]) -> None:
    listen = ListenSettings("0.0.0.0", 0, *certificate)
    listen.check(insecure=False)
    assert listen.scheme == "wss"
    assert ListenSettings("127.0.0.1", 0).scheme == "ws"


def test_a_certificate_that_cannot_be_used_is_refused_before_anything_starts(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.touch()
    key.touch()
    with pytest.raises(ServiceError, match=r"--tls-cert .*cert.pem and --tls-key cannot be used"):
        ListenSettings("127.0.0.1", 0, certificate, key).check(insecure=True)


def test_a_certificate_needs_its_key(tmp_path: Path) -> None:
    certificate = tmp_path / "cert.pem"
    certificate.touch()
    for listen in (ListenSettings("127.0.0.1", 0, certificate), ListenSettings("127.0.0.1", 0, None, certificate)):
        with pytest.raises(ServiceError, match="give both"):
            listen.check(insecure=True)
    with pytest.raises(ServiceError, match=r"absent\.pem does not exist"):
        ListenSettings("127.0.0.1", 0, certificate, tmp_path / "absent.pem").check(insecure=True)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ServiceError, match=f"--port {port}"):
        ListenSettings("127.0.0.1", port).check(insecure=False)


def test_a_token_is_made_once_in_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    token, path = load_or_make_token(tmp_path)
    assert path == tmp_path / TOKEN_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(token) >= 40
    assert load_or_make_token(tmp_path) == (token, path)


def test_a_service_that_dies_while_it_makes_its_token_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*names: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.link", die)
        with pytest.raises(KeyboardInterrupt):
            load_or_make_token(tmp_path)
    assert not (tmp_path / "join-token").exists()
    assert load_or_make_token(tmp_path) == load_or_make_token(tmp_path)


def test_every_service_has_a_token_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert load_or_make_token(tmp_path / "a")[0] != load_or_make_token(tmp_path / "b")[0]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
def test_a_token_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    token, path = load_or_make_token(tmp_path)
    path.chmod(mode)
    with pytest.raises(ServiceError, match=f"can be read by others: run chmod 600 {path}"):
        load_or_make_token(tmp_path)
    path.chmod(0o600)
    assert load_or_make_token(tmp_path)[0] == token


@pytest.mark.parametrize("text", ["", "\n", "short\n", "two words that together are long enough\n", "é" * 40])
def test_a_damaged_token_is_refused(tmp_path: Path, text: str) -> None:
    _, path = load_or_make_token(tmp_path)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ServiceError, match="holds no token"):
        load_or_make_token(tmp_path)
