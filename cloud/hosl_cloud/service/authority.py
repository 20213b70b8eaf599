"""The service's own certificate authority, for networks whose machines no public one vouches for.

Devices know it by the fingerprint in their tokens; its key never leaves the data folder. So the CA must stay the same
for as long as any token does: a certificate is renewed under it, and it is never made anew in its place.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import ipaddress
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from hosl_cloud.exceptions import ServiceError
from hosl_cloud.service.secrets import check_private

CA_DAYS, SERVER_DAYS = 3650, 825
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Authority:
    """The files of a CA and of the certificate that it gave the service."""

    folder: Path

    @property
    def ca_cert(self) -> Path:
        """What devices trust."""
        return self.folder / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """Mode 0600; only `init --renew` reads it, so it may be kept elsewhere."""
        return self.folder / "ca.key"

    @property
    def server_cert(self) -> Path:
        """What the service shows."""
        return self.folder / "server.pem"

    @property
    def server_key(self) -> Path:
        """Mode 0600."""
        return self.folder / "server.key"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the CA's certificate, base64url without padding."""
        digest = hashlib.sha256(_load(self.ca_cert).public_bytes(Encoding.DER)).digest()
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()

    def names(self) -> list[str]:
        """What the service's certificate is for, in the order in which it was asked for."""
        names = _load(self.server_cert).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [str(name.value) for name in names]

    def days_left(self) -> float:
        """Days until the service's certificate ends."""
        return (_load(self.server_cert).not_valid_after_utc - _now()) / _DAY


def find_authority(data_dir: Path) -> Authority | None:
    """The data folder's CA; None where there is none. Raises ServiceError where others may read its keys."""
    authority = Authority(data_dir / "tls")
    if not authority.folder.exists():
        return None
    for path in (authority.ca_key, authority.server_key):
        if path.exists():
            check_private(path)
    return authority


def make_authority(data_dir: Path, names: Sequence[str]) -> Authority:
    """A new CA and a certificate of it for `names`; all or nothing. Raises ServiceError."""
    folder = data_dir / "tls"
    if folder.exists():
        raise ServiceError(
            f"{folder} exists, and every device's token names its CA: "
            "give --renew for a new certificate of the same CA, or move the folder away"
        )

    parsed = _parse_names(names)
    # Named before it is made: a signal may come between any two steps, and what has a name can be removed.
    making = Authority(data_dir / f"tls-{secrets.token_hex(4)}")
    try:
        making.folder.mkdir(mode=0o700)
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"hosl CA of {socket.gethostname()[:40]}")
        builder = _builder(name, name, key, CA_DAYS, is_ca=True)
        _replace({making.ca_key: _private_bytes(key), making.ca_cert: _sign(builder, key)})
        _issue(making, parsed)
        making.folder.rename(folder)  # whole, or not there
    except BaseException:
        shutil.rmtree(making.folder, ignore_errors=True)
        raise
    return Authority(folder)


def renew_certificate(data_dir: Path, names: Sequence[str]) -> Authority:
    """A new certificate and key of the same CA, for the names of the old one where none are given."""
    authority = find_authority(data_dir)
    if authority is None:
        raise ServiceError(f"{data_dir / 'tls'} does not exist: run hosl-cloud init without --renew first")
    _issue(authority, _parse_names(names or authority.names()))
    return authority


def _issue(authority: Authority, names: Sequence[x509.GeneralName]) -> None:
    issuer_key = load_pem_private_key(_read(authority.ca_key), password=None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name("hosl-cloud"), _load(authority.ca_cert).subject, key, SERVER_DAYS, is_ca=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    _replace({authority.server_key: _private_bytes(key), authority.server_cert: _sign(builder, issuer_key)})


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int, *, is_ca: bool
) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )

    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    # A day back: a small device's clock may be behind.
    builder = builder.not_valid_before(_now() - _DAY).not_valid_after(_now() + days * _DAY)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    constraints = x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None)
    return builder.add_extension(constraints, critical=True).add_extension(usage, critical=True)


def _sign(builder: x509.CertificateBuilder, issuer: ec.EllipticCurvePrivateKey) -> bytes:
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())
    return builder.add_extension(authority, critical=False).sign(issuer, SHA256()).public_bytes(Encoding.PEM)


def _private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _parse_names(names: Sequence[str]) -> list[x509.GeneralName]:
    """Parse names and addresses to what a certificate holds, those of this machine at the end."""
    host = socket.gethostname()
    parsed: list[x509.GeneralName] = []
    for name in dict.fromkeys([*names, *_LOCAL_NAMES, *([host] if _is_host_name(host) else [])]):
        try:
            parsed.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            if not _is_host_name(name):
                raise ServiceError(f"--name {name}: use a host name such as cloud.example.org, or an address") from None
            parsed.append(x509.DNSName(name))
    return parsed


def _is_host_name(name: str) -> bool:
    label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    return len(name) <= 253 and re.fullmatch(rf"{label}(\.{label})*", name) is not None


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise ServiceError(f"{path} holds no certificate: put the right one back") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServiceError(f"{path} cannot be read ({error.strerror}): put it back, or mend it") from error


def _replace(files: Mapping[Path, bytes]) -> None:
    """Write files that only their owner can read; none takes its name before all are whole, as a key and its
    certificate belong together."""
    with contextlib.ExitStack() as leaving:
        parts = {path: leaving.enter_context(_part(path.parent, data)) for path, data in files.items()}
        for path, part in parts.items():
            part.replace(path)


@contextlib.contextmanager
def _part(folder: Path, data: bytes) -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(dir=folder)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
