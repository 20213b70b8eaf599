"""Where settings come from, which one wins, and the files that ship with the agent."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from hosl_edge import settings as settings_module
from hosl_edge.__main__ import UNIT, main
from hosl_edge.options import option_of
from hosl_edge.settings import ENVIRONMENT, FIELDS, SHOWN, Shown, default_of, load_settings, resolve
from hosl_protocol.exceptions import ExitCode, SettingsError
from support import ROOT

FILE = 'server = "wss://file:1"\ntoken_file = "file"\ndata = "file.jsonl"\nthreads = 3\nname = "file"\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "edge.toml"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_an_option_wins_over_the_environment_over_the_file_over_the_default(config: Path) -> None:
    environment = {"HOSL_EDGE_NAME": "variable", "HOSL_EDGE_THREADS": "2", "HOSL_EDGE_STAY": ""}
    resolved = resolve({"name": "option"}, config, environment)
    settings = resolved.settings()
    assert (settings.name, settings.threads, settings.server, settings.stay) == ("option", 2, "wss://file:1", False)
    assert resolved.sources["name"] == "option"
    assert resolved.sources["threads"] == "environment"
    assert resolved.sources["server"] == str(config)
    assert "stay" not in resolved.sources


def test_the_environment_has_a_variable_of_the_right_type_for_every_field() -> None:
    texts = {
        **dict.fromkeys(FIELDS, "7"),
        **dict.fromkeys(("share_text", "insecure", "stay", "skip_broken"), "true"),
        "fields": "a, b",
        "server": "wss://h:1",
    }
    settings = resolve({}, None, {f"HOSL_EDGE_{name.upper()}": text for name, text in texts.items()}).settings()
    assert (settings.threads, settings.sync_interval_s, settings.max_temperature_c) == (7, 7.0, 7.0)
    assert (settings.fields, settings.stay, settings.name, settings.memory_budget_bytes) == (("a", "b"), True, "7", 7)


def test_the_systems_file_is_read_where_none_is_named(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "CONFIG", config)
    assert load_settings({}, None).name == "file"
    assert load_settings({"server": "wss://o:1", "token_file": "t", "data": "d", "name": "o"}, None).name == "o"


def test_a_credential_of_systemd_is_the_token_where_no_file_is_named(config: Path, tmp_path: Path) -> None:
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    options = {"server": "wss://h:1", "data": "d"}
    with pytest.raises(SettingsError, match="token_file"):
        resolve(options, None, environment).settings()
    (tmp_path / "hosl-token").write_text("secret", encoding="ascii")
    assert resolve(options, None, environment).settings().token_file == str(tmp_path / "hosl-token")
    assert resolve(options, config, environment).settings().token_file == "file"


@pytest.mark.parametrize(
    ("environment", "more", "match"),
    [
        ({"HOSL_EDGE_TREADS": "2"}, "", "environment: HOSL_EDGE_TREADS: .*did you mean HOSL_EDGE_THREADS"),
        ({"HOSL_EDGE_THREADS": "many"}, "", "HOSL_EDGE_THREADS is 'many'"),
        ({}, "memory_bugdet = 1", "edge.toml: memory_bugdet: .*did you mean memory_budget"),
        ({}, "min_available_memory = 'some'", "min_available_memory is 'some'"),
        ({}, "max_temperature_c = -4.0", "max_temperature_c is -4.0"),
        ({}, "stall_timeout_s = 0.5", "stall_timeout_s is 0.5"),
    ],
)
def test_a_name_or_value_that_is_none_is_one_clear_line(
    config: Path, environment: dict[str, str], more: str, match: str
) -> None:
    config.write_text(FILE + more, encoding="utf-8")
    with pytest.raises(SettingsError, match=match) as caught:
        resolve({}, config, environment).settings()
    assert "\n" not in str(caught.value)


def test_config_prints_toml_that_loads_with_sources_and_without_secrets(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("the-secret", encoding="ascii")
    given = ["--config", str(config), "--server", "wss://user:password@host:1", "--token-file", str(token)]
    assert main(["config", *given]) == ExitCode.SETTINGS
    assert "password" not in capsys.readouterr().err
    given[3] = "wss://host:1"
    assert main(["config", *given]) == ExitCode.OK
    text = capsys.readouterr().out
    assert "the-secret" not in text
    assert 'server = "wss://host:1"  # option' in text
    assert f"threads = 3  # {config}" in text
    assert "stay = false  # default" in text
    printed = tmp_path / "printed.toml"
    printed.write_text(text, encoding="utf-8")
    assert load_settings({}, printed).name == "file"
    assert main(["config", "--json", *given]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["name"] == {"value": "file", "source": str(config)}


def test_the_example_names_every_setting_and_loads_with_and_without_its_comments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--example"]) == ExitCode.OK
    text = capsys.readouterr().out
    path = tmp_path / "edge.toml"
    path.write_text(text, encoding="utf-8")
    assert load_settings({"token_file": "t"}, path).data == "/var/lib/hosl/train.jsonl"
    path.write_text(re.sub(r"(?m)^# (\w+ = )", r"\1", text), encoding="utf-8")
    assert set(msgspec.toml.decode(path.read_bytes())) == set(FIELDS)
    settings = load_settings({}, path)
    for name, field in FIELDS.items():
        if field.default not in (msgspec.NODEFAULT, None):
            assert getattr(settings, name) == field.default, f"{name} shows another default"


def row(name: str, shown: Shown) -> str:
    """A setting's row in README's table."""
    option = f"{option_of(name)} {shown.metavar}".rstrip()
    default = shown.default
    if not default and not FIELDS[name].required:
        value = default_of(name)
        default = "no" if value is False else f"{value:g}" if isinstance(value, float) else str(value)
    return f"| `{option}` | `{name}` | `{ENVIRONMENT}{name.upper()}` | {shown.meaning} | {default} |".replace(
        "|  |", "| |"
    )


def test_readmes_table_is_the_settings_own() -> None:
    text = (ROOT / "edge" / "README.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| `--")]
    assert table == [row(name, shown) for name, shown in SHOWN.items()]


@pytest.mark.parametrize("name", SHOWN)
def test_every_setting_has_an_option_of_its_type(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown, numbers = SHOWN[name], {"threads": 3, "max_temperature_c": 75.0}
    value = numbers.get(name) or (default_of(name) if shown.example is None else shown.example) or "pi"
    text = ",".join(value) if isinstance(value, list) else str(value)
    main(["config", "--json", option_of(name), *([text] if shown.metavar else [])])
    found = json.loads(capsys.readouterr().out)[name]
    wanted = value if shown.metavar else True
    assert (found["value"], type(found["value"])) == (wanted, type(wanted))
    assert found["source"] == "option"


def test_the_unit_starts_this_environments_agent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unit"]) == ExitCode.OK
    text = capsys.readouterr().out
    assert f"ExecStart={sys.prefix}/bin/hosl-edge run\n" in text
    assert text.replace(sys.prefix, "/opt/hosl") == UNIT.read_text(encoding="utf-8")


def test_the_unit_does_not_restart_what_a_person_must_mend() -> None:
    codes = re.search(r"RestartPreventExitStatus=(.*)", UNIT.read_text(encoding="utf-8"))
    assert codes is not None
    assert {int(code) for code in codes.group(1).split()} == {ExitCode.USAGE, ExitCode.SETTINGS, ExitCode.DATA}


def test_systemd_understands_the_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    assert main(["unit"]) == ExitCode.OK
    unit = tmp_path / "hosl-edge.service"
    text = re.sub(r"ExecStart=\S+", f"ExecStart={sys.executable}", capsys.readouterr().out)
    unit.write_text(text, encoding="utf-8")
    verify = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    ours = [line for line in verify.stderr.splitlines() if unit.name in line]
    assert all("RestartSteps" in line or "RestartMaxDelaySec" in line for line in ours), "unknown before systemd 254"
    assert verify.returncode == 0, verify.stderr


@pytest.mark.parametrize("folder", ["dev zwei Ünï", "100 % sure", "plain;no", "dollar $HOME"])
def test_systemd_finds_the_program_wherever_it_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    program = tmp_path / folder / "bin" / "hosl-edge"
    program.parent.mkdir(parents=True)
    program.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / folder))
    assert main(["unit"]) == ExitCode.OK
    unit = tmp_path / "hosl-edge.service"
    unit.write_text(capsys.readouterr().out, encoding="utf-8")
    verify = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert verify.returncode == 0, verify.stderr
    assert "ExecStart" not in verify.stderr


def test_a_path_that_systemd_takes_in_no_way_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", "/opt/it's")
    assert main(["unit"]) == ExitCode.SETTINGS
    assert "systemd takes no quotes or backslashes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--threads", "1", "config"], ["--stay", "config", "--threads", "1"], ["--threads=1", "config"]]
)
def test_a_command_may_stand_behind_options(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    main(words)
    assert "threads = 1  # option" in capsys.readouterr().out


def test_the_value_of_an_option_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "--name", "status"])
    assert 'name = "status"  # option' in capsys.readouterr().out
    main(["--name", "status", "config"])
    assert 'name = "status"  # option' in capsys.readouterr().out


def test_what_the_unit_sets_are_settings() -> None:
    found = re.findall(r"(HOSL_EDGE_\w+)=(\S+)", UNIT.read_text(encoding="utf-8"))
    assert len(found) == 3
    resolve({}, None, dict(found))
