"""Devices' tokens, and what the guard makes of a request's headers and address."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from starlette.requests import HTTPConnection

from hosl_cloud.exceptions import ApiError
from hosl_cloud.service.access import Authenticator, Caller, Denied, DeviceTokens, is_cross_site, is_local
from hosl_cloud.service.limits import Buckets, Limits
from hosl_cloud.storage.store import Store

JOIN, ADMIN = "join-" + "j" * 40, "admin-" + "a" * 40
LOOPBACK, ELSEWHERE = "127.0.0.1", "192.0.2.7"
FINGERPRINT = "F" * 43


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "hosl.sqlite")
    yield store
    store.close()


@pytest.fixture
def access(store: Store) -> DeviceTokens:
    return DeviceTokens(store, FINGERPRINT)


@pytest.fixture
def authenticator(access: DeviceTokens) -> Authenticator:
    return Authenticator(access, JOIN, ADMIN)


def asking(bearer: str | None, address: str = LOOPBACK, **headers: str) -> HTTPConnection:
    """A request with a token from an address."""
    if bearer is not None:
        headers["authorization"] = f"Bearer {bearer}"
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return HTTPConnection({"type": "http", "headers": raw, "client": (address, 5), "path": "/"})


def bearer_of(token: str) -> str:
    """What a device sends of its token."""
    return token.rpartition("~")[0]


def failures(reason: str) -> float:
    return REGISTRY.get_sample_value("hosl_auth_failures_total", {"reason": reason}) or 0.0


def test_a_token_is_its_devices_and_nobody_elses(access: DeviceTokens) -> None:
    token = access.add("pi.kitchen-1")
    name, secret, fingerprint = token.split("~")
    assert (name, fingerprint) == ("pi.kitchen-1", FINGERPRINT)
    assert len(secret) == 43
    row = access.authenticate(bearer_of(token))
    assert row is not None
    assert row.name == "pi.kitchen-1"
    assert access.is_valid(row)
    other = bearer_of(access.add("pi.kitchen-2"))
    for wrong in ("", "~", secret, f"~{secret}", f"pi.kitchen-1~{secret}x", f"pi.kitchen-1~{secret[:-1]}",
                  f"pi.kitchen-2~{secret}", f"nobody~{secret}", f"PI.KITCHEN-1~{secret}", token,
                  f"pi.kitchen-1~{other.partition('~')[2]}", "pi.kitchen-1~", "pi.kitchen-1~é"):  # fmt: skip
        assert access.authenticate(wrong) is None, wrong


def test_without_a_ca_a_token_has_no_fingerprint(store: Store) -> None:
    assert DeviceTokens(store).add("pi").count("~") == 1


def test_the_database_holds_no_secret(access: DeviceTokens, tmp_path: Path) -> None:
    secrets = [access.add(name).split("~")[1] for name in ("a", "b")]
    assert secrets[0] != secrets[1]
    sqlite3.connect(tmp_path / "hosl.sqlite").execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not [secret for secret in secrets if secret.encode() in stored]


def test_tokens_outlive_the_service(access: DeviceTokens, store: Store) -> None:
    kept, gone = bearer_of(access.add("kept")), bearer_of(access.add("gone"))
    access.revoke("gone")
    again = DeviceTokens(store, FINGERPRINT)
    assert again.list() == access.list()
    assert [(row.name, row.revoked_at is None) for row in again.list()] == [("gone", False), ("kept", True)]
    found, revoked = again.authenticate(kept), again.authenticate(gone)
    assert found is not None
    assert revoked is not None
    assert (again.is_valid(found), again.is_valid(revoked)) == (True, False)


def test_a_revoked_device_may_get_a_new_token_and_the_old_one_stays_worthless(access: DeviceTokens) -> None:
    first = bearer_of(access.add("pi"))
    held = access.authenticate(first)
    assert held is not None
    assert access.revoke("pi") == access.revoke("pi"), "the second time changes nothing"
    assert not access.is_valid(held)
    second = bearer_of(access.add("pi"))
    assert access.authenticate(first) is None
    assert not access.is_valid(held), "a connection that was opened with the first one is still nobody's"
    new = access.authenticate(second)
    assert new is not None
    assert access.is_valid(new)


def test_what_cannot_be_made_or_revoked_is_named(access: DeviceTokens) -> None:
    access.add("pi")
    with pytest.raises(ApiError, match="device pi has a token: revoke it first") as taken:
        access.add("pi")
    with pytest.raises(ApiError, match="no device 'nobody' has a token") as unknown:
        access.revoke("nobody")
    assert (taken.value.status, unknown.value.status) == (409, 404)
    for name in ("", ".", "..", "a b", "a/b", "a~b", "é", "n" * 65, "a\n"):
        with pytest.raises(ApiError, match="use 1 to 64 characters") as bad:
            access.add(name)
        assert bad.value.status == 422


def test_each_token_has_its_role(authenticator: Authenticator) -> None:
    token = bearer_of(authenticator.access.add("pi"))
    for address in (LOOPBACK, ELSEWHERE):
        caller = authenticator.identify(asking(token, address))
        assert caller.role == "device"
        assert authenticator.may_be(caller, "pi")
        assert not authenticator.may_be(caller, "other")
        assert authenticator.identify(asking(ADMIN, address)) == Caller("admin")
        assert authenticator.is_admin(asking(ADMIN, address))
        assert not authenticator.is_admin(asking(token, address))
    assert authenticator.identify(asking(JOIN)) == Caller("local")
    assert not authenticator.may_be(Caller("admin"), "pi")


@pytest.mark.parametrize(
    ("bearer", "address", "headers", "reason"),
    [
        (None, LOOPBACK, {}, "missing"),
        ("", LOOPBACK, {}, "missing"),
        (None, LOOPBACK, {"authorization": f"Basic {JOIN}"}, "missing"),
        (None, LOOPBACK, {"authorization": JOIN}, "missing"),
        ("wrong", LOOPBACK, {}, "wrong"),
        (JOIN[:-1], LOOPBACK, {}, "wrong"),
        (JOIN + "x", LOOPBACK, {}, "wrong"),
        ("\xe9", LOOPBACK, {}, "wrong"),
        (JOIN, ELSEWHERE, {}, "remote"),
        (JOIN, "::ffff:192.0.2.7", {}, "remote"),
        (JOIN, "2001:db8::1", {}, "remote"),
        (JOIN, LOOPBACK, {"x_forwarded_for": "192.0.2.7"}, "remote"),
        (JOIN, LOOPBACK, {"forwarded": "for=192.0.2.7"}, "remote"),
    ],
)
def test_nobody_is_denied_and_counted_by_why(
    authenticator: Authenticator, bearer: str | None, address: str, headers: dict[str, str], reason: str
) -> None:
    before = failures(reason)
    with pytest.raises(Denied) as denied:
        authenticator.identify(asking(bearer, address, **headers))
    assert denied.value.status == 401
    assert denied.value.headers == {"WWW-Authenticate": "Bearer"}
    assert failures(reason) == before + 1


def test_a_revoked_token_is_denied_like_an_unknown_one(authenticator: Authenticator) -> None:
    token = bearer_of(authenticator.access.add("pi"))
    caller = authenticator.identify(asking(token))
    authenticator.access.revoke("pi")
    before = failures("revoked")
    with pytest.raises(Denied) as denied:
        authenticator.identify(asking(token))
    assert denied.value.status == 401
    assert failures("revoked") == before + 1
    assert not authenticator.may_be(caller, "pi"), "nor may a connection that was opened before"


def test_the_join_token_takes_no_name_that_has_a_token(authenticator: Authenticator) -> None:
    local = authenticator.identify(asking(JOIN))
    assert authenticator.may_be(local, "pi")
    authenticator.access.add("pi")
    assert not authenticator.may_be(local, "pi")
    authenticator.access.revoke("pi")
    assert not authenticator.may_be(local, "pi"), "nor one whose token was revoked"
    assert authenticator.may_be(local, "other")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_loopback_has_many_addresses(address: str) -> None:
    assert is_local(asking(None, address))


def test_a_peer_without_an_address_is_not_local() -> None:
    assert not is_local(HTTPConnection({"type": "http", "headers": [], "client": None, "path": "/"}))


def test_only_devices_open_connections_and_no_browser_does(authenticator: Authenticator) -> None:
    token = bearer_of(authenticator.access.add("pi"))
    assert authenticator.check_device(asking(token)).role == "device"
    assert authenticator.check_device(asking(JOIN)).role == "local"
    for request in (asking(ADMIN), asking(token, origin="https://example.org"), asking(token, origin="null")):
        with pytest.raises(Denied) as denied:
            authenticator.check_device(request)
        assert denied.value.status == 403


def test_the_admins_routes_are_the_admins_and_not_for_other_sites_pages(authenticator: Authenticator) -> None:
    token = bearer_of(authenticator.access.add("pi"))
    authenticator.check_admin(asking(ADMIN))
    authenticator.check_admin(asking(ADMIN, origin="https://cloud:8765", host="cloud:8765"))
    for request, status in (
        (asking(token), 403),
        (asking(JOIN), 403),
        (asking(None), 401),
        (asking(ADMIN, origin="https://example.org", host="cloud:8765"), 403),
        (asking(ADMIN, origin="null", host="cloud:8765"), 403),
        (asking(ADMIN, origin="https://cloud:8765.example.org", host="cloud:8765"), 403),
    ):
        with pytest.raises(Denied) as denied:
            authenticator.check_admin(request)
        assert denied.value.status == status
    assert not is_cross_site(asking(None, host="cloud:8765"))


def test_an_address_that_fails_too_often_waits_and_shuts_nobody_out(access: DeviceTokens) -> None:
    authenticator = Authenticator(access, JOIN, ADMIN, Limits(failures=Buckets(burst=3, per_second=0.001)))
    token = bearer_of(access.add("pi"))
    statuses = []
    for _ in range(5):
        with pytest.raises(Denied) as denied:
            authenticator.identify(asking("wrong", ELSEWHERE))
        statuses.append(denied.value.status)
    assert statuses == [401, 401, 401, 429, 429]
    assert 900 < int(denied.value.headers["Retry-After"]) <= 1001
    assert authenticator.identify(asking(token, ELSEWHERE)).role == "device", (
        "the right token passes from the same address"
    )
    with pytest.raises(Denied) as elsewhere:
        authenticator.identify(asking("wrong", "192.0.2.8"))
    assert elsewhere.value.status == 401


def test_an_address_that_joins_too_often_waits(access: DeviceTokens) -> None:
    authenticator = Authenticator(access, JOIN, ADMIN, Limits(joins=Buckets(burst=2, per_second=0.1)))
    for _ in range(2):
        authenticator.check_device(asking(JOIN))
    before = failures("rate")
    with pytest.raises(Denied) as denied:
        authenticator.check_device(asking(JOIN))
    assert (denied.value.status, denied.value.headers) == (429, {"Retry-After": "10"})
    assert failures("rate") == before + 1
