"""Where the service listens; plain text stays on this machine unless somebody insists."""

from __future__ import annotations

import ipaddress
import json
import logging
import ssl
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hosl_cloud.exceptions import ServiceError
from hosl_cloud.storage.data_folder import SERVICE_FILE

if TYPE_CHECKING:
    from hosl_cloud.service.authority import Authority

log = logging.getLogger(__name__)

FEW_DAYS = 30
"""A certificate that ends sooner is worth a warning."""


@dataclass(frozen=True)
class ListenSettings:
    """Where and how to listen."""

    host: str
    port: int
    """0 takes a free one."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    authority: Authority | None = None
    """The service's own CA, where its certificate is of that."""

    def with_authority(self, data_dir: Path) -> ListenSettings:
        """Add the certificate of the data folder's own CA, where there is one and no other was given."""
        from hosl_cloud.service.authority import find_authority

        authority = None if self.tls_cert or self.tls_key else find_authority(data_dir)
        if authority is None:
            return self
        if (days := authority.days_left()) < FEW_DAYS:
            log.warning("the certificate ends in %.0f days: run hosl-cloud init --renew", days)
        return replace(self, tls_cert=authority.server_cert, tls_key=authority.server_key, authority=authority)

    @property
    def scheme(self) -> str:
        """Scheme of the address that devices are given."""
        return "wss" if self.tls_cert else "ws"

    def check(self, *, insecure: bool) -> None:
        """Raise ServiceError where tokens and data would cross a network as plain text, or a file is missing."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ServiceError("--tls-cert and --tls-key belong together: give both")
        for path in (self.tls_cert, self.tls_key):
            if path is not None and not path.is_file():
                raise ServiceError(f"{path} does not exist")
        if not 0 <= self.port <= 65535:
            raise ServiceError(f"--port {self.port}: use a number from 0 (any free one) to 65535")

        if self.tls_cert is not None:
            try:  # uvicorn would say so only once everything is loaded
                ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.tls_cert, self.tls_key)
            except (ssl.SSLError, OSError) as error:
                raise ServiceError(f"--tls-cert {self.tls_cert} and --tls-key cannot be used: {error}") from error
        if self.tls_cert is None and not self.is_loopback() and not insecure:
            raise ServiceError(
                f"--host {self.host} without TLS sends everything as plain text: "
                "run hosl-cloud init --name HOST once, or give --tls-cert and --tls-key, or --insecure"
            )

    def public_address(self, port: int) -> str:
        """Name the service as devices on other machines reach it."""
        if self.authority is None or self.is_loopback():
            return self.local_address(port)
        return f"{self.scheme}://{_bracketed(self.authority.names()[0])}:{port}"

    def bound_address(self, port: int) -> str:
        """Name what it listens on, as it was told."""
        return f"{self.scheme}://{_bracketed(self.host)}:{port}"

    def local_address(self, port: int) -> str:
        """Name it as this machine reaches it."""
        anywhere = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}
        return f"{self.scheme}://{_bracketed(anywhere.get(self.host, self.host))}:{port}"

    def is_loopback(self) -> bool:
        """Tell whether this machine alone can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def write_service_file(data_dir: Path, listen: ListenSettings, address: str) -> None:
    """Tell the commands on this machine where the service is."""
    port = urlsplit(address).port or 0
    found = {"address": listen.local_address(port), "public_address": listen.public_address(port)}
    # Whole or not at all: commands may read it just now.
    part = data_dir / (SERVICE_FILE + ".part")
    part.write_text(json.dumps(found) + "\n", encoding="utf-8")
    part.replace(data_dir / SERVICE_FILE)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
