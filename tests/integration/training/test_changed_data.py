"""A device whose data changed between two starts, on a real cloud: what it is told, and what it may change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from hosl_edge import EdgeSettings, run_agent
from hosl_edge.exceptions import DataError
from services import Service, serving
from support import TASK, write_reviews


async def is_ready(service: Service) -> None:
    peers = service.coordinator.fleet.peers
    while not ("pi" in peers and peers["pi"].is_ready):
        await asyncio.sleep(0.02)


async def attend(service: Service, settings: EdgeSettings) -> None:
    """Until it is ready, or until it is refused."""
    agent, ready = asyncio.create_task(run_agent(settings)), asyncio.create_task(is_ready(service))
    await asyncio.wait({agent, ready}, timeout=40.0, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    is_refused = agent.done()
    agent.cancel()
    await asyncio.gather(agent, return_exceptions=True)
    while "pi" in service.coordinator.fleet.peers:  # the cloud may hear of it later than the device leaves
        await asyncio.sleep(0.02)
    if is_refused:
        await agent


def test_a_mended_file_and_added_held_out_data_are_taken_and_changed_training_data_is_refused_in_one_line(
    tmp_path: Path, make_bundle: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    config = msgspec.toml.decode(f"batch_size = 2\nmax_length = 16\n{TASK}\n[devices]\nstart_with = 2\n")
    data = tmp_path / "train.jsonl"

    async def main() -> None:
        async with serving(make_bundle("lora", 2), tmp_path / "cloud", config) as service:
            settings = EdgeSettings(
                server=service.address,
                token_file=str(service.token_file),
                data=str(data),
                name="pi",
                threads=1,
                state_dir=str(tmp_path / "state"),
                cache_dir=str(tmp_path / "cache"),
            )
            data.write_text('{"text": "the film was very good"}\n', encoding="utf-8")
            with pytest.raises(DataError, match=r"train.jsonl:1: has no field 'label'"):
                await attend(service, settings)
            assert "device pi is away: its data cannot be used, see its log" in service.said
            write_reviews(data, 8)
            await attend(service, settings)
            held_out = str(write_reviews(tmp_path / "eval.jsonl", 4, 40))
            await attend(service, msgspec.structs.replace(settings, eval=held_out))
            write_reviews(data, 9)
            caplog.clear()
            with pytest.raises(DataError, match=r"train.jsonl: the training data has changed since"):
                await attend(service, settings)
            assert [each for each in caplog.records if each.levelno >= logging.ERROR] == []

    asyncio.run(main())
