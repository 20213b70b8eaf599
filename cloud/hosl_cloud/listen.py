"""Where the service listens; plain text stays on this machine unless somebody insists."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from hosl_cloud.exceptions import ServiceError


@dataclass(frozen=True)
class Listen:
    """Where and how to listen."""

    host: str
    port: int
    """0 takes a free one."""
    tls_cert: Path | None = None
    tls_key: Path | None = None

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
            try:
                ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.tls_cert, self.tls_key)
            except (ssl.SSLError, OSError) as error:
                raise ServiceError(f"--tls-cert {self.tls_cert} and --tls-key cannot be used: {error}") from error
        if self.tls_cert is None and not self._is_loopback() and not insecure:
            raise ServiceError(
                f"--host {self.host} without TLS sends everything as plain text: "
                "give --tls-cert and --tls-key, or --insecure"
            )

    def _is_loopback(self) -> bool:
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
