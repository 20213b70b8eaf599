"""What preflight asks of the service, of a real one."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from hosl_edge.__main__ import main
from hosl_edge.preflight import FAILED
from hosl_protocol.exceptions import ExitCode
from services import serving
from support import TASK, write_reviews


def preflight(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, SimpleNamespace]]:
    """Exit code, and the checks by name."""
    code = main(["preflight", "--json", *arguments])
    return code, {check["name"]: SimpleNamespace(**check) for check in json.loads(capsys.readouterr().out)}


def test_the_name_is_held_against_the_token_and_the_data_against_the_run_by_a_real_service(
    capsys: pytest.CaptureFixture[str], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    config = msgspec.toml.decode(f"max_length = 16\n{TASK}")
    bundle = make_bundle("lora", 2)
    data = write_reviews(tmp_path / "train.jsonl", 4)
    capsys.readouterr()  # what the export said

    async def ask() -> None:
        async with serving(bundle, tmp_path / "cloud", config) as service:
            token = tmp_path / "kitchen.token"
            token.write_text(await asyncio.to_thread(service.authenticator.access.add, "kitchen"), encoding="ascii")
            arguments = ["--server", service.address, "--data", str(data), "--token-file", str(token)]
            arguments += ["--cache-dir", str(tmp_path / "cache")]
            code, found = await asyncio.to_thread(preflight, capsys, *arguments)
            assert (code, found["device"].detail) == (ExitCode.OK, "the token is that of kitchen")
            assert found["data"].detail.endswith("which task reviews can use")
            # And what the run would read, at the run's own length.
            command = [sys.executable, "-m", "hosl_edge", "data", *arguments, "--json"]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True)
            view = json.loads(done.stdout)
            assert (view["examples"], view["task"], view["max_length"]) == (4, "reviews", 16)
            code, found = await asyncio.to_thread(preflight, capsys, *arguments, "--name", "hall")
            assert (code, found["settings"].outcome) == (ExitCode.SETTINGS, FAILED)
            assert "is that of 'kitchen': leave the name out" in found["settings"].detail
            local = ["--token-file", str(service.token_file), "--name", "kitchen"]
            code, found = await asyncio.to_thread(preflight, capsys, *arguments, *local)
            assert (code, found["device"].outcome) == (ExitCode.REFUSED, FAILED)
            assert found["device"].detail == "the token is not one of device kitchen"

    asyncio.run(ask())
