"""Who may do what: each device by a token of its own, this machine by the join token, the admin by a third.

DeviceTokens knows the devices' tokens, and Authenticator decides about requests, on the event loop, before anything is
done for them. A token is looked up in memory, never in the database. `add` and `revoke` write to it, on other threads,
one at a time by a lock; they replace a token's frozen row, so that a reader has the old one or the new.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response

from hosl_cloud import metrics
from hosl_cloud.exceptions import ApiError
from hosl_cloud.service.limits import Limits
from hosl_cloud.service.secrets import SEPARATOR, token_text
from hosl_cloud.storage.records import TokenRow
from hosl_cloud.storage.store import Store
from hosl_protocol.wire.messages import is_device_name

Endpoint = Callable[[Request], Awaitable[Response]]

_NOBODY = secrets.token_bytes(32)
"""Stands for the digest of a name that is not known, so that unknown names take the same path."""


class DeviceTokens:
    """The devices' tokens. What is stored is a SHA-256 of each secret.

    A secret is 256 random bits, which nobody can guess from a digest however fast it is computed; a slow hash is for
    passwords.
    """

    def __init__(self, store: Store, fingerprint: str = "") -> None:
        """Read all tokens; the `fingerprint` of the service's own CA goes into new ones."""
        self._store, self._fingerprint = store, fingerprint
        self._lock = threading.Lock()
        self._tokens = {row.name: row for row in store.tokens()}

    def add(self, name: str, bundle: str = "") -> str:
        """Make a token for a device, which is not kept. Raises ApiError where the name has one, or is none.

        `bundle` keeps the device to the runs of one bundle.
        """
        if not is_device_name(name):
            raise ApiError(422, f"name is {name[:80]!r}: use 1 to 64 characters of A-Za-z0-9._-, no dot first")

        secret = secrets.token_urlsafe(32)
        with self._lock:
            if (known := self._tokens.get(name)) is not None and known.revoked_at is None:
                raise ApiError(409, f"device {name} has a token: revoke it first, or choose another name")
            self._save(TokenRow(name, _digest(secret), time.time(), None, bundle))
        return token_text(name, secret, self._fingerprint)

    def list(self) -> list[TokenRow]:
        """List all tokens by name, the revoked ones too."""
        return sorted(self._tokens.values(), key=lambda row: row.name)

    def revoke(self, name: str) -> TokenRow:
        """Make a device's token worth nothing from here on. Raises ApiError where it has none."""
        with self._lock:
            known = self._tokens.get(name)
            if known is None:
                raise ApiError(404, f"no device {name[:80]!r} has a token")
            if known.revoked_at is None:
                self._save(known := replace(known, revoked_at=time.time()))
        return known

    def _save(self, row: TokenRow) -> None:
        # The store first: what it does not take must not count until the next start either.
        self._store.set_token(row)
        self._tokens[row.name] = row

    def authenticate(self, bearer: str) -> TokenRow | None:
        """Find whose token `NAME~SECRET` is; it may have been revoked."""
        name, _, secret = bearer.rpartition(SEPARATOR)
        row = self._tokens.get(name)
        # Compared in every case, in constant time: the answer's time tells neither names nor digests.
        is_right = hmac.compare_digest(_digest(secret), row.digest if row is not None else _NOBODY)
        return row if is_right else None

    def is_valid(self, row: TokenRow) -> bool:
        """Tell whether a token is still the one that its device has to show."""
        return row.revoked_at is None and self._tokens.get(row.name) is row

    def has(self, name: str) -> bool:
        """Whether a name belongs to a token, a revoked one included."""
        return name in self._tokens


@dataclass(frozen=True)
class Caller:
    """Who asks, as a token proves it."""

    role: Literal["device", "local", "metrics", "admin"]
    token: TokenRow | None = None
    """A device's own; None for the others."""

    @property
    def bundle(self) -> str:
        """Whose runs are its own; empty: all."""
        return self.token.bundle if self.token is not None else ""


_REASONS = {
    401: "no token, or not a right one: it follows Authorization: Bearer, and of a device's token NAME~SECRET alone",
    403: "this token may not do that",
}


class Denied(Exception):
    """A request that is not answered as asked. Stores the HTTP status and the seconds after which to try again."""

    def __init__(self, status: int, retry_after_s: float = 0.0) -> None:
        self.status, self.retry_after_s = status, retry_after_s
        super().__init__(f"status {status}")

    @property
    def reason(self) -> str:
        """One line for who asked."""
        return _REASONS.get(
            self.status, f"too many requests from this address: try again in {self.retry_after_s:.0f} s"
        )

    @property
    def response(self) -> Response:
        """The refusal as an HTTP answer."""
        return PlainTextResponse(f"{self.reason}\n", self.status, self.headers)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of that answer."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(int(self.retry_after_s) + 1)} if self.retry_after_s else {}


class Authenticator:
    """Decides about every request before anything is done for it."""

    def __init__(
        self,
        access: DeviceTokens,
        join_token: str,
        admin_token: str,
        limits: Limits | None = None,
        metrics_token: str | None = None,
    ) -> None:
        self.access, self.limits = access, limits or Limits()
        self._join_digest, self._admin_digest = _digest(join_token), _digest(admin_token)
        self._metrics_digest = _NOBODY if metrics_token is None else _digest(metrics_token)

    def identify(self, connection: HTTPConnection) -> Caller:
        """Recognize who asks. Raises Denied.

        A right token always passes: what somebody else fails at from the same address must not shut a device out.
        """
        caller = self.check_metrics(connection)
        if caller.role == "metrics":
            raise self._count(connection, "role", 403)
        return caller

    def check_metrics(self, connection: HTTPConnection) -> Caller:
        """Recognize who asks for the figures: who has the metrics token, too, and may do no more. Raises Denied."""
        caller, reason = self._recognize(connection)
        if caller is None:
            raise self._count(connection, reason)
        return caller

    def check_device(self, connection: HTTPConnection) -> Caller:
        """Recognize who opens a device's connection. Raises Denied."""
        caller = self.identify(connection)
        # A browser sends an Origin; nothing but our agent has business here.
        if "origin" in connection.headers:
            raise self._count(connection, "origin", 403)
        if caller.role == "admin":
            raise self._count(connection, "role", 403)

        # Last, so that only connections that may join count: what is refused counts as a failure.
        if wait_s := self.limits.joins.take(address_of(connection)):
            metrics.auth_failures.labels("rate").inc()
            raise Denied(429, wait_s)
        return caller

    def is_admin(self, connection: HTTPConnection) -> bool:
        """Whether the admin asks."""
        return self._recognize(connection)[0] == Caller("admin")

    def check_admin(self, connection: HTTPConnection) -> None:
        """Raise Denied where somebody else asks, or a page of another site does."""
        if self.identify(connection).role != "admin":
            raise self._count(connection, "role", 403)
        if is_cross_site(connection):
            raise self._count(connection, "origin", 403)

    def may_be(self, caller: Caller, name: str) -> bool:
        """Whether the device that says this name is who its token says, now."""
        if caller.token is not None:
            return caller.token.name == name and self.access.is_valid(caller.token)
        # The join token is shared by this machine's devices: it is good for any name that has no token of its own.
        return caller.role == "local" and not self.access.has(name)

    def _recognize(self, connection: HTTPConnection) -> tuple[Caller | None, str]:
        """Find the caller, or why it is nobody."""
        scheme, _, bearer = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not bearer:
            return None, "missing"

        # Digests have one length, and tell nothing of the token by how soon they differ.
        digest = _digest(bearer)
        if hmac.compare_digest(digest, self._admin_digest):
            return Caller("admin"), ""
        if hmac.compare_digest(digest, self._metrics_digest):
            return Caller("metrics"), ""
        if hmac.compare_digest(digest, self._join_digest):
            return (Caller("local"), "") if is_local(connection) else (None, "remote")

        row = self.access.authenticate(bearer)
        if row is None:
            return None, "wrong"
        return (Caller("device", row), "") if row.revoked_at is None else (None, "revoked")

    def _count(self, connection: HTTPConnection, reason: str, status: int = 401) -> Denied:
        """Count a failure against its address, which has to wait after too many."""
        metrics.auth_failures.labels(reason).inc()
        wait_s = self.limits.failures.take(address_of(connection))
        return Denied(429, wait_s) if wait_s else Denied(status)


def address_of(connection: HTTPConnection) -> str:
    """Read the peer's address; empty where there is none."""
    return connection.client.host if connection.client is not None else ""


def is_local(connection: HTTPConnection) -> bool:
    """Tell whether the peer is on this machine, and no proxy that speaks for another."""
    if any(header in connection.headers for header in ("forwarded", "x-forwarded-for", "x-real-ip", "via")):
        return False
    try:
        address = ipaddress.ip_address(address_of(connection))
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def is_cross_site(connection: HTTPConnection) -> bool:
    """Tell whether a browser sends this for a page of another site."""
    origin = connection.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != connection.headers.get("host")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def guarded(endpoint: Endpoint, identify: Callable[[Request], Caller]) -> Endpoint:
    """Wrap an endpoint so that only those reach it whom `identify` knows, as `request.state.caller`."""

    async def checked(request: Request) -> Response:
        try:
            request.state.caller = identify(request)
        except Denied as denied:
            return denied.response
        return await endpoint(request)

    return checked
