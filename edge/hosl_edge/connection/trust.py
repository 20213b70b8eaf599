"""Whom the device trusts: the system's certificate authorities, or the one whose fingerprint is in its token.

The token leaves the machine only on a connection that was checked so: `_fetch_ca` and preflight, which talk to servers
that nobody has vouched for yet, send none, and believe only bytes that have the fingerprint.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import logging
import os
import ssl
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hosl_edge.connection.token import Token
from hosl_edge.exceptions import ConnectionLost, TrustError
from hosl_protocol.program.proxies import Proxy, find_proxy, proxy_handler, through

log = logging.getLogger(__name__)

TIMEOUT_S = 30.0
UNKNOWN_TOKEN = (
    "it does not know the token, or has revoked it, or takes it on its own machine only: "
    "copy the token again, or have a new one made (hosl-cloud device add)"
)
_MAX_CA_BYTES = 65536


@dataclass(frozen=True)
class Cloud:
    """The cloud as a device reaches it."""

    address: str
    """`wss://host:port` or `ws://host:port`."""
    token: Token
    context: ssl.SSLContext | None = None
    """None without TLS."""
    proxy: Proxy | None = None
    """What stands between; None for the straight way."""

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {"Authorization": f"Bearer {self.token.bearer}"}

    def url(self, path: str) -> str:
        """Make the address of something that is fetched over HTTP."""
        return http_address(self.address) + "/v1/" + path

    def open(self, request: urllib.request.Request, timeout_s: float) -> Any:
        """Send a request and return the response; raises as urllib does."""
        return opener(self.context, self.proxy).open(request, timeout=timeout_s)


def connect_securely(server: str, token: Token, cache: Path) -> Cloud:
    """Find out how to reach the cloud; its CA is fetched where the token names one and `cache` lacks it.

    Raises ConnectionLost (try again), TrustError (it is not the service that the token is for), and SettingsError for
    a proxy that cannot be used.
    """
    server, proxy = with_port(server), find_proxy(server)
    return Cloud(server, token, ssl_context(server, token, cache, proxy), proxy)


def ssl_context(server: str, token: Token, cache: Path, proxy: Proxy | None = None) -> ssl.SSLContext | None:
    """What checks the cloud's certificate and its name; None for `ws://`. Raises as `connect_securely` does."""
    if not server.startswith("wss:"):
        return None
    # A token of a service with a public certificate: the system's authorities decide.
    if not token.fingerprint:
        return ssl.create_default_context()
    # These bytes alone are trusted: nothing else that the cloud may have sent along with them.
    return ssl.create_default_context(cadata=_ca_certificate(server, token.fingerprint, cache / "ca", proxy))


def explain(error: object) -> str:
    """Say what kept a connection from being made, and for TLS a remedy."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}; {tls_remedy(error)}; hosl-edge preflight explains"
    if isinstance(error, http.client.RemoteDisconnected):
        return f"{error}; a server that speaks TLS wants wss://"
    return f"{error}; {tls_remedy(error)}" if isinstance(error, ssl.SSLError) else str(error)


def tls_remedy(error: ssl.SSLError) -> str:
    """Say what to do about a handshake that failed."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        return "the server speaks no TLS here: see that the port is right, and that no proxy stands between"
    if error.verify_code in (9, 10):  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
        return "set this machine's clock, or renew the server's certificate"
    if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
        return "the certificate is not for this name: use one that it is for; hosl-cloud serve prints them"
    return (
        "this machine does not know who signed it: copy the whole token again (its last part, after the second ~, "
        "names the service's own CA), or let this machine trust the signer"
    )


def is_unknown_signer(error: object) -> bool:
    """Whether a handshake failed for want of a known authority, which no waiting mends."""
    # X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT and the three after it: no chain leads to an authority that is trusted.
    return isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in (18, 19, 20, 21)


def with_port(server: str) -> str:
    """Add the port that an address means, so that every line about it says it."""
    url = urlsplit(server)
    port = url.port or (443 if url.scheme == "wss" else 80)
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    return url._replace(netloc=f"{host}:{port}").geturl()


def http_address(server: str) -> str:
    """Turn the websocket's address into that of what is fetched over HTTP."""
    return server.replace("ws", "http", 1).rstrip("/")


def _ca_certificate(server: str, fingerprint: str, folder: Path, proxy: Proxy | None) -> bytes:
    """The CA's certificate, DER, from the cache or from the cloud. Raises ConnectionLost and TrustError."""
    path = folder / f"{fingerprint}.pem"
    try:
        certificate = _der(path.read_bytes())
        if _fingerprint(certificate) == fingerprint:
            return certificate
        log.warning("%s is damaged; it is fetched again", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("%s cannot be used (%s); it is fetched again", path, error)

    certificate = _fetch_ca(server, fingerprint, proxy)
    _cache_ca(path, certificate)
    return certificate


def _fetch_ca(server: str, fingerprint: str, proxy: Proxy | None) -> bytes:
    """Fetch the CA's certificate from nobody knows whom: its fingerprint alone makes it worth something."""
    url = http_address(server) + "/v1/ca.pem"
    try:
        with opener(unverified(), proxy).open(url, timeout=TIMEOUT_S) as response:
            certificate = _der(response.read(_MAX_CA_BYTES))
    except urllib.error.HTTPError as error:
        error.close()
        raise ConnectionLost(f"{url}{through(proxy)} answered {error.code}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = explain(getattr(error, "reason", error))
        raise ConnectionLost(f"cannot reach {url}{through(proxy)}: {reason}") from error
    except ValueError:
        raise TrustError(server, fingerprint, "no certificate") from None

    if (found := _fingerprint(certificate)) != fingerprint:
        raise TrustError(server, fingerprint, found)
    return certificate


def _der(pem: bytes) -> bytes:
    """The one certificate. Raises ValueError where it is none."""
    return ssl.PEM_cert_to_DER_cert(pem.decode("ascii").strip())


def _fingerprint(certificate: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(certificate).digest()).rstrip(b"=").decode()


def _cache_ca(path: Path, certificate: bytes) -> None:
    """Keep the certificate for the next start; without it, it is fetched and checked again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under a name of its own at first: agents share the cache, and one may read while another writes.
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(ssl.DER_cert_to_PEM_cert(certificate))
        Path(name).replace(path)
    except OSError as error:
        log.warning("%s cannot be kept: %s", path, error)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The cloud may not send a device anywhere else, least of all with its token."""

    def redirect_request(self, *arguments: Any) -> None:
        """Follow none."""


def opener(context: ssl.SSLContext | None, proxy: Proxy | None) -> urllib.request.OpenerDirector:
    """Make what opens the cloud's addresses: no redirects, and no proxy but this one."""
    secure = [urllib.request.HTTPSHandler(context=context)] if context is not None else []
    return urllib.request.build_opener(_NoRedirects(), proxy_handler(proxy), *secure)


def unverified() -> ssl.SSLContext:
    """Make TLS with whoever answers: nothing secret may go there, and nothing that comes is believed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
