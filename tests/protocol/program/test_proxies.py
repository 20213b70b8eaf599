"""Which way leads to a service: what the environment names, and for whom it does not count."""

from __future__ import annotations

import pytest

from hosl_protocol.exceptions import ExitCode, SettingsError
from hosl_protocol.program.proxies import find_proxy

PROXY = "http://proxy.example.org:3128"


def used(address: str, **environment: str) -> str | None:
    proxy = find_proxy(address, environment)
    return None if proxy is None else f"{proxy.variable} {proxy.url}"


@pytest.mark.parametrize("scheme", ["wss", "https"])
def test_what_is_encrypted_goes_through_the_proxy_of_https(scheme: str) -> None:
    address = f"{scheme}://cloud.example.org:8765"
    assert used(address) is None
    assert used(address, http_proxy=PROXY) is None
    assert used(address, HTTPS_PROXY=PROXY) == f"HTTPS_PROXY {PROXY}"
    assert used(address, https_proxy=PROXY, HTTPS_PROXY="http://other:1") == f"https_proxy {PROXY}"
    assert used(address, all_proxy=PROXY) == f"all_proxy {PROXY}"
    assert used(address, https_proxy="", HTTPS_PROXY=PROXY) is None


@pytest.mark.parametrize("scheme", ["ws", "http"])
def test_plain_text_goes_through_the_proxy_of_http(scheme: str) -> None:
    address = f"{scheme}://cloud.example.org:8765"
    assert used(address, https_proxy=PROXY) is None
    assert used(address, http_proxy=PROXY) == f"http_proxy {PROXY}"
    assert used(address, ALL_PROXY=PROXY) == f"ALL_PROXY {PROXY}"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "a.localhost", "127.0.0.1", "127.9.9.9", "[::1]"])
@pytest.mark.parametrize("value", [PROXY, "socks5://proxy:1080", "http://["])
def test_this_machine_is_reached_without_whatever_the_variable_holds(host: str, value: str) -> None:
    for scheme, variable in (("wss", "https_proxy"), ("ws", "http_proxy")):
        assert used(f"{scheme}://{host}:8765", **{variable: value}) is None


@pytest.mark.parametrize(
    ("host", "patterns"),
    [
        ("cloud.example.org", "*"),
        ("cloud.example.org", "example.org"),
        ("cloud.example.org", "a.b, .example.org"),
        ("cloud.example.org", "*.example.org"),
        ("Cloud.Example.org", "cloud.EXAMPLE.org"),
        ("cloud.example.org", "cloud.example.org:8765"),
        ("10.1.2.3", "10.1.2.3"),
        ("10.1.2.3", "10.0.0.0/8"),
        ("[fd00::7]", "fd00::/8"),
        ("[fd00::7]", "[fd00::7]"),
        ("[fd00::7]", "[fd00::7]:8765"),
    ],
)
def test_no_proxy_names_what_is_reached_without(host: str, patterns: str) -> None:
    assert used(f"wss://{host}:8765", https_proxy=PROXY, no_proxy=patterns) is None
    assert used(f"wss://{host}:8765", https_proxy=PROXY, NO_PROXY=patterns) is None


@pytest.mark.parametrize(
    ("host", "patterns"),
    [
        ("cloud.example.org", ""),
        ("cloud.example.org", " , "),
        ("myexample.org", "example.org"),
        ("cloud.example.org", "cloud.example.org:443"),
        ("cloud.example.org", "10.0.0.0/8"),
        ("11.1.2.3", "10.0.0.0/8"),
    ],
)
def test_no_proxy_names_nobody_else(host: str, patterns: str) -> None:
    assert used(f"wss://{host}:8765", https_proxy=PROXY, no_proxy=patterns) == f"https_proxy {PROXY}"


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("proxy:3128", "http://proxy:3128"),
        ("127.0.0.1:9", "http://127.0.0.1:9"),
        ("http://proxy", "http://proxy:80"),
        ("HTTP://proxy:3128/", "http://proxy:3128"),
        (" http://me:p%40ss@proxy:3128 ", "http://me:p%40ss@proxy:3128"),
        ("http://[fd00::1]:3128", "http://[fd00::1]:3128"),
    ],
)
def test_a_proxy_is_a_host_and_a_port(value: str, url: str) -> None:
    assert used("wss://cloud.example.org", https_proxy=value) == f"https_proxy {url}"


@pytest.mark.parametrize(
    "value",
    [
        "socks5://me:hunter2@proxy:1080",
        "https://me:hunter2@proxy:3128",
        "http://me:hunter2@proxy:http",
        "http://me:hunter2@:3128",
        "http://me:hunter2@[::1",
        "me:hunter2@proxy:99999",
        "://me:hunter2@proxy",
    ],
)
def test_a_value_that_cannot_be_used_is_named_without_its_password(value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        used("wss://cloud.example.org:8765", HTTPS_PROXY=value)
    line = str(caught.value)
    assert line.startswith("HTTPS_PROXY is ")
    assert "use http://host:port" in line
    assert "no_proxy" in line
    assert "hunter2" not in line
    assert caught.value.exit_code == ExitCode.SETTINGS


def test_a_proxy_is_shown_without_its_password() -> None:
    proxy = find_proxy("wss://cloud.example.org", {"https_proxy": "http://me:hunter2@proxy:3128"})
    assert str(proxy) == "the proxy http://***@proxy:3128 of https_proxy"
    assert "hunter2" not in repr(proxy)
