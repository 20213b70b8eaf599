"""An agent that stays: from one run to the next, on a real cloud."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from hosl_cloud.commands.client import ApiClient
from hosl_edge import EdgeSettings, run_agent
from hosl_edge.host.health import Health, HealthMonitor
from hosl_edge.host.status import Document, read_status
from services import Service, serving
from support import TASK, free_port, write_reviews

BRIEF = f"rounds = 2\nbatch_size = 2\nmax_length = 16\n{TASK}\n[evaluation]\nevery = 0\n"
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
    monkeypatch.setattr("services.load_or_make_token", lambda folder, fingerprint: (TOKEN, folder / "join-token"))
    bundle, state = make_bundle("lora", 2), tmp_path / "state"
    config = msgspec.toml.decode(BRIEF)
    port = free_port()
    monkeypatch.setattr(
        "hosl_edge.agent.HealthMonitor", partial(HealthMonitor, read_health=lambda: Health(40.0, ("under-voltage",)))
    )

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


def test_an_agent_whose_run_has_ended_asks_for_the_next_one_and_neither_joins_nor_fetches_the_last_one_again(
    tmp_path: Path,
    make_bundle: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hosl_cloud.runs.retry_schedule.SHORTEST_S", 1)
    bundle, state, config = make_bundle("lora", 2), tmp_path / "state", msgspec.toml.decode(BRIEF)

    async def main() -> None:
        async with serving(bundle, tmp_path / "cloud", config, stays=True) as service:
            client = ApiClient(service.address, service.admin_token)
            settings = EdgeSettings(
                server=service.address,
                token_file=str(service.token_file),
                data=str(write_reviews(tmp_path / "train.jsonl", 8)),
                name="pi",
                threads=1,
                state_dir=str(state),
                cache_dir=str(tmp_path / "cache"),
                stay=True,
            )
            agent = asyncio.create_task(run_agent(settings))
            try:
                waiting = status_where(state, lambda found: found["state"] == "waiting for a run")
                assert (await asyncio.wait_for(waiting, 40.0))["run"] is None
                await asyncio.sleep(2.0)  # it asks twice meanwhile
                body = {"bundle": bundle.name, "config": {**config, "rounds": 10**6}}
                started = await asyncio.to_thread(client.request, "POST", "/v1/runs", body)
                assert started["returning"] == {"devices": 1, "within_s": 2}
                training = status_where(state, lambda found: found["run"] == started["id"] and found["round"] >= 1)
                found = await asyncio.wait_for(training, 40.0)
                assert found["rounds"] == 10**6, "nothing of the last run is left"
            finally:
                agent.cancel()
                await asyncio.gather(agent, return_exceptions=True)

    asyncio.run(main())
    said = capsys.readouterr().err
    assert said.count("joins run run-1 ") == 1
    assert said.count("the cloud has no run to join; asks again in 1 s") == 1


def test_a_rounds_time_begins_when_its_devices_are_there(tmp_path: Path, make_bundle: Callable[..., Path]) -> None:
    config = {**msgspec.toml.decode(BRIEF), "rounds": 10**6}

    async def attend(service: Service, settings: EdgeSettings) -> None:
        agent, target = asyncio.create_task(run_agent(settings)), service.coordinator.run.round + 2
        try:
            while service.coordinator.run.round < target:
                assert not agent.done()
                await asyncio.sleep(0.02)
        finally:
            agent.cancel()
            await asyncio.gather(agent, return_exceptions=True)

    async def main() -> list[float]:
        async with serving(make_bundle("lora", 2), tmp_path / "cloud", config) as service:
            settings = EdgeSettings(
                server=service.address,
                token_file=str(service.token_file),
                data=str(write_reviews(tmp_path / "train.jsonl", 8)),
                name="pi",
                threads=1,
                state_dir=str(tmp_path / "state"),
                cache_dir=str(tmp_path / "cache"),
            )
            await asyncio.wait_for(attend(service, settings), 40.0)
            await asyncio.sleep(4.0)  # nobody is there
            await asyncio.wait_for(attend(service, settings), 40.0)
            rounds = await asyncio.to_thread(service.coordinator.store.rounds, "run-1")
            return [row.seconds for row in rounds]

    assert max(asyncio.run(main())) < 4.0
