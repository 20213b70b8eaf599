"""A link that sends every message of a round twice: each is acted on once, on both sides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from chaos.proxy import Direction, Proxy
from hosl_edge.agent import run_agent
from hosl_edge.settings import EdgeSettings
from services import serving
from support import TASK, write_reviews

MakeBundle = Callable[[str, int], Path]
SETTINGS: dict[str, Any] = {
    **msgspec.toml.decode(TASK),
    "rounds": 4,
    "batch_size": 4,
    "max_length": 16,
    "strict": True,
    "evaluation": {"every": 2},
    "devices": {"start_with": 1},
}


@pytest.mark.parametrize("algorithm", ["ho-sfl", "hosl"])
def test_messages_that_come_twice_count_once(make_bundle: MakeBundle, tmp_path: Path, algorithm: str) -> None:
    repeated, end = asyncio.run(_train(make_bundle("lora", 2), tmp_path / "twice", algorithm, is_repeating=True))
    assert repeated["up"] > 10
    assert repeated["down"] > 10
    assert end == asyncio.run(_train(make_bundle("lora", 2), tmp_path / "once", algorithm, is_repeating=False))[1]


async def _train(
    bundle: Path, folder: Path, algorithm: str, *, is_repeating: bool
) -> tuple[dict[Direction, int], dict[str, Any]]:
    """How many messages came twice, and what the run came to."""
    repeated: dict[Direction, int] = {"up": 0, "down": 0}
    async with serving(bundle, folder, {**SETTINGS, "algorithm": algorithm}) as service:
        proxy = Proxy(urlsplit(service.address).port or 0)

        def arm(direction: Direction) -> None:
            proxy.repeat(direction, lambda: count(direction))

        def count(direction: Direction) -> None:
            repeated[direction] += 1
            arm(direction)

        await proxy.start()
        agent = asyncio.create_task(run_agent(_settings(folder, proxy.port, service.token_file)))
        while is_repeating and not service.coordinator.fleet.ready_names():  # joining takes no repeats
            await asyncio.sleep(0.001)
        if is_repeating:
            arm("up")
            arm("down")
        summary = await asyncio.wait_for(agent, 15.0)
        await service.serving
        await proxy.close()
        run = service.coordinator.run
        end = {
            "digest": summary.weights_digest,
            "accuracy": summary.accuracy,
            "losses": [row.loss for row in await asyncio.to_thread(run.store.rounds, run.id)],
            "evaluations": await asyncio.to_thread(run.store.evaluations, run.id),
        }
    return repeated, end


def _settings(folder: Path, port: int, token: Path) -> EdgeSettings:
    return EdgeSettings(
        server=f"ws://127.0.0.1:{port}",
        token_file=str(token),
        data=str(write_reviews(folder / "train.jsonl", 16)),
        eval=str(write_reviews(folder / "eval.jsonl", 10, 40)),
        name="pi",
        threads=1,
        state_dir=str(folder / "state"),
        cache_dir=str(folder / "cache"),
    )
