"""The agent between connections, and what `hosl-edge` ends with."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hosl_edge import agent as agent_module
from hosl_edge.__main__ import main
from hosl_edge.agent import LONGEST_PAUSE_S, Agent, backoff_s, run_agent
from hosl_edge.connection.token import Token
from hosl_edge.exceptions import RefusedError, WrongDigestError
from hosl_edge.host.display import Display
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import ExitCode


def pauses(attempt: int) -> list[float]:
    random.seed(attempt)
    return [backoff_s(attempt) for _ in range(200)]


def test_pauses_grow_are_jittered_and_end_at_twenty_seconds() -> None:
    ceilings = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0]
    for attempt, ceiling in enumerate(ceilings, 1):
        drawn = pauses(attempt)
        assert 0.5 * ceiling <= min(drawn) < 0.6 * ceiling
        assert 0.9 * ceiling < max(drawn) <= ceiling
    assert max(pauses(10**6)) <= LONGEST_PAUSE_S == 20.0


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    token, data = tmp_path / "token", tmp_path / "train.jsonl"
    token.write_text("secret\n", encoding="ascii")
    token.chmod(0o600)
    data.write_text('{"text": "good", "label": 1}\n', encoding="utf-8")
    return {"--server": "ws://127.0.0.1:1", "--token-file": str(token), "--data": str(data)}


def flatten(options: dict[str, str]) -> list[str]:
    return [part for pair in options.items() for part in pair]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"--server": "http://127.0.0.1:1"}, "server is 'http://127.0.0.1:1'"),
        ({"--server": "ws://example.org:1"}, "--insecure"),
        ({"--token-file": "absent"}, "token_file is 'absent'"),
        ({"--memory-budget": "lots"}, "memory_budget is 'lots'"),
        ({"--threads": "-2"}, "threads is -2"),
        ({"--name": "a b"}, "name is 'a b'"),
        ({"--config": "absent.toml"}, "--config is 'absent.toml'"),
    ],
)
def test_an_option_that_cannot_be_used_is_one_line_and_code_3(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(flatten(files | changed)) == ExitCode.SETTINGS
    errors = capsys.readouterr().err
    assert errors.startswith("hosl-edge: error: ")
    assert sentence in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("missing", ["--server", "--token-file", "--data"])
def test_an_option_that_is_missing_is_named(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    del files[missing]
    assert main(flatten(files)) == ExitCode.SETTINGS
    assert f"give {missing}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--colour", "red"], ["--threads", "many"], ["train.jsonl"]])
def test_an_option_that_is_unknown_is_a_usage_error(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*flatten(files), *arguments])
    assert caught.value.code == ExitCode.USAGE
    assert "usage: hosl-edge" in capsys.readouterr().err


@pytest.mark.parametrize("tell_again_s", [0.0, agent_module.TELL_AGAIN_S])
def test_a_cloud_that_is_away_is_tried_again_and_again_and_that_is_said_now_and_then(
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tell_again_s: float,
) -> None:
    monkeypatch.setattr(agent_module, "TELL_AGAIN_S", tell_again_s)
    settings = EdgeSettings(
        server=files["--server"],
        token_file=files["--token-file"],
        data=files["--data"],
        name="pi",
        state_dir=str(tmp_path / "state"),
        cache_dir=str(tmp_path / "cache"),
    )

    async def run() -> None:
        await asyncio.wait_for(run_agent(settings), 0.9)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(run())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 if tell_again_s else len(lines) >= 2
    assert all("pi: cannot reach http://127.0.0.1:1" in line and "next try in" in line for line in lines)


def test_a_file_of_the_wrong_digest_is_fetched_again_with_the_manifest_and_not_for_ever(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EdgeSettings(
        server=files["--server"], token_file=files["--token-file"], data=files["--data"], state_dir=str(tmp_path)
    )
    expected = iter(["first", "second", "second", "third"])

    async def fetch(agent: Agent, cloud: object) -> None:
        raise WrongDigestError("shard", "another", next(expected))

    monkeypatch.setattr(Agent, "_open_device", fetch)
    with pytest.raises(WrongDigestError) as caught:
        asyncio.run(run_agent(settings))
    assert (caught.value.expected, next(expected)) == ("second", "third")


def test_a_shard_that_is_fetched_again_and_refused_again_is_not_fetched_for_ever(
    files: dict[str, str], tmp_path: Path
) -> None:
    settings = EdgeSettings(
        server=files["--server"], token_file=files["--token-file"], data=files["--data"], state_dir=str(tmp_path)
    )
    agent = Agent(settings, Token("pi", "pi~secret"), Display("pi"))
    refusal = RefusedError("another shard", retry=False, code="shard")

    def refuse(shard: str) -> None:
        device: Any = SimpleNamespace(manifest=SimpleNamespace(shard_digest=shard), close=lambda: None)
        agent._device = device
        agent._fetch_anew(refusal)

    try:
        refuse("first")
        refuse("second")
        with pytest.raises(RefusedError, match="another shard"):
            refuse("second")
    finally:
        agent._network.close()
