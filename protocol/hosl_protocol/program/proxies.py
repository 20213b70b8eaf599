"""The way to a service: straight, or through the proxy that the environment names. One rule for HTTP and websockets."""

from __future__ import annotations

import ipaddress
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from hosl_protocol.exceptions import SettingsError

_PLAIN = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
_SECURE = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy, and who named it."""

    url: str = field(repr=False)
    """`http://host:port`, with user and password where it wants them."""
    variable: str

    def __str__(self) -> str:
        return f"the proxy {without_password(self.url)} of {self.variable}"


def find_proxy(address: str, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """Find the proxy on the way to `ws://`, `wss://`, `http://` or `https://`; None where there is none.

    This machine is reached without one, and so is what `no_proxy` names. Raises SettingsError for a value that cannot
    be used.
    """
    url = urlsplit(address)
    variables = _SECURE if url.scheme in ("wss", "https") else _PLAIN
    variable = next((name for name in variables if name in environment), "")
    value = environment.get(variable, "").strip()

    if not value or is_loopback(url.hostname or "") or _is_excepted(url.hostname or "", url.port, environment):
        return None
    return Proxy(_usable(variable, value), variable)


def through(proxy: Proxy | None) -> str:
    """Say what an error line says behind the address."""
    return "" if proxy is None else f" through {proxy}"


def proxy_handler(proxy: Proxy | None) -> urllib.request.ProxyHandler:
    """Make urllib's handler, which would else ask the environment by rules of its own."""
    return urllib.request.ProxyHandler({} if proxy is None else {"http": proxy.url, "https": proxy.url})


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its name or number."""
    name = host.lower().rstrip(".")
    number = _number(host)
    return name == "localhost" or name.endswith(".localhost") or (number is not None and number.is_loopback)


def without_password(value: str) -> str:
    """Hide the user and the password in a proxy's address."""
    user, at, rest = value.rpartition("@")
    scheme, mark, _ = user.partition("://")
    return f"{scheme + mark if mark else ''}***@{rest}" if at else value


def _usable(variable: str, value: str) -> str:
    try:
        url = urlsplit(value if "://" in value else f"http://{value}")
        port = url.port or 80
    except ValueError:
        url, port = urlsplit(""), 0
    if url.scheme.lower() != "http" or not url.hostname:
        remedy = "use http://host:port of an HTTP proxy, or name the service's host in no_proxy to go without"
        raise SettingsError(variable, without_password(value), remedy)
    user, at, _ = url.netloc.rpartition("@")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return f"http://{user}{at}{host}:{port}"


def _is_excepted(host: str, port: int | None, environment: Mapping[str, str]) -> bool:
    patterns = environment.get("no_proxy", environment.get("NO_PROXY", ""))
    return any(_matches(pattern.strip().lower(), host.lower(), port) for pattern in patterns.split(","))


def _matches(pattern: str, host: str, port: int | None) -> bool:
    """Match `*`, a name and all below it, a number or a network of numbers; each but `*` also with a port."""
    if pattern == "*":
        return True
    number = _number(host)
    try:
        if number is not None and number in ipaddress.ip_network(pattern.strip("[]"), strict=False):
            return True
    except ValueError:
        pass  # no network, so a name, or something with a port

    name, colon, digits = pattern.rpartition(":")
    if colon and digits.isdecimal() and (":" not in name or name.startswith("[")):
        if int(digits) != port:
            return False
        pattern = name
    pattern = pattern.strip("[]").removeprefix("*").lstrip(".")
    return bool(pattern) and (host == pattern or host.endswith(f".{pattern}"))


def _number(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
