"""An agent that stays: from one run to the next, on a real cloud."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from hosl_edge import EdgeSettings, run_agent
from hosl_edge.health import Guard, Health
from hosl_edge.status import Document, read_status
from support import TASK, free_port, serving, write_reviews

TOKEN = "the-token-of-both-services"


async def status_where(state: Path, is_met: Callable[[Document], bool]) -> Document:
    while not is_met(document := await asyncio.to_thread(read_status, [state], "pi")):
        await asyncio.sleep(0.02)
    return document


def test_an_agent_that_stays_takes_part_in_the_next_run_and_a_throttled_one_pauses_before_rounds(
    tmp_path: Path,
    make_bundle: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("support.load_or_make_token", lambda folder, fingerprint: (TOKEN, folder / "join-token"))
    bundle, state = make_bundle("lora", 2), tmp_path / "state"
    config = msgspec.toml.decode(f"rounds = 2\nbatch_size = 2\nmax_length = 16\n{TASK}\n[evaluation]\nevery = 0\n")
    port = free_port()
    monkeypatch.setattr("hosl_edge.agent.Guard", partial(Guard, read_health=lambda: Health(40.0, ("under-voltage",))))

    async def attend(run_id: str) -> None:
        async with serving(bundle, tmp_path / run_id, config, run_id=run_id, port=port) as service:
            assert await asyncio.wait_for(service.serving, 60.0) == "completed"

    async def main() -> None:
        settings = EdgeSettings(
            server=f"ws://127.0.0.1:{port}",
            token_file=str(tmp_path / "token"),
            data=str(write_reviews(tmp_path / "train.jsonl", 8)),
            name="pi",
            threads=1,
            state_dir=str(state),
            cache_dir=str(tmp_path / "cache"),
            stay=True,
        )
        (tmp_path / "token").write_text(TOKEN, encoding="ascii")
        agent = asyncio.create_task(run_agent(settings))
        try:
            await attend("first")
            waiting = await asyncio.wait_for(status_where(state, lambda found: found["run"] is None), 10.0)
            assert waiting["state"].startswith("waiting")
            serving_second = asyncio.create_task(attend("second"))
            training = await asyncio.wait_for(status_where(state, lambda found: found["round"] >= 1), 40.0)
            assert (training["run"], training["rounds"]) == ("second", 2)
            assert training["loss"] > 0
            await asyncio.wait_for(status_where(state, lambda found: found["state"] == "paused: under-voltage"), 10.0)
            await serving_second
            assert not agent.done()
        finally:
            agent.cancel()
            await asyncio.gather(agent, return_exceptions=True)

    asyncio.run(main())
    said = capsys.readouterr().err
    assert "pi: run first completed at round 2" in said
    assert "pi: run second completed at round 2" in said
    assert said.count("under-voltage: pauses before each round") == 1
