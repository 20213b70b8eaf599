"""The agent's settings: files, options, and faults named by field, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from hosl_edge.connection.token import Token, device_name, read_token
from hosl_edge.settings import load_settings, parse_bytes
from hosl_protocol.exceptions import SettingsError

GIVEN = {"server": "wss://host:8765", "token_file": "t", "data": "d.jsonl"}


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "edge.toml"
    path.write_text('server = "wss://a:1"\ntoken_file = "t"\ndata = "d.jsonl"\nthreads = 3\n', encoding="utf-8")
    settings = load_settings({"server": "wss://b:2"}, path)
    assert (settings.server, settings.threads, settings.compute_threads) == ("wss://b:2", 3, 3)


@pytest.mark.parametrize(
    ("text", "count"), [("400M", 400_000_000), ("1.5G", 1_500_000_000), ("2Mi", 2**21), ("512 KB", 512_000), (7, 7)]
)
def test_sizes_are_read_as_people_write_them(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "many", "-1M", "0", "1T", "M"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="memory_budget"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"server": "http://host"}, "server"),
        ({"server": "ws://192.168.1.2:80"}, "--insecure"),
        ({"name": "a b"}, "name"),
        ({"threads": -1}, "threads"),
        ({"memory_budget": "lots"}, "memory_budget"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(more: dict[str, object], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        load_settings(GIVEN | more, None)


@pytest.mark.parametrize("field", GIVEN)
def test_what_is_missing_is_named(field: str) -> None:
    with pytest.raises(SettingsError, match=field):
        load_settings({name: value for name, value in GIVEN.items() if name != field}, None)


def test_plain_text_is_for_this_machine_or_for_those_who_insist() -> None:
    assert load_settings(GIVEN | {"server": "ws://127.0.0.1:1"}, None).server
    assert load_settings(GIVEN | {"server": "ws://192.168.1.2:80", "insecure": True}, None).insecure


def test_a_config_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--config"):
        load_settings({}, tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("server = ", encoding="utf-8")
    with pytest.raises(SettingsError, match="not TOML"):
        load_settings({}, tmp_path / "bad.toml")


def test_a_token_file_holds_one_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("abc\n", encoding="utf-8")
    assert read_token(path) == Token("", "abc")
    path.write_text("\ufeffabc\r\n", encoding="utf-8")
    assert read_token(path) == Token("", "abc")
    path.write_text("abc def\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="one token"):
        read_token(path)
    with pytest.raises(SettingsError, match="No such file"):
        read_token(tmp_path / "absent")


def test_a_device_is_called_as_its_token_says() -> None:
    settings = load_settings(GIVEN, None)
    own, local = Token("kitchen", "kitchen~secret"), Token("", "secret")
    assert device_name(settings, own) == "kitchen"
    named = load_settings(GIVEN | {"name": "kitchen"}, None)
    assert (device_name(named, own), device_name(named, local)) == ("kitchen", "kitchen")
    with pytest.raises(SettingsError, match="name is 'attic': the token in t is that of 'kitchen'"):
        device_name(load_settings(GIVEN | {"name": "attic"}, None), own)
