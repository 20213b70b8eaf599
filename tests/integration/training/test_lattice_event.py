"""A run whose weights outgrow their lattice: every machine moves to the coarser one, unasked, and agrees."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from hosl_cloud.tail.checkpoint import list_checkpoints
from hosl_edge import EdgeSettings, Summary, run_agent
from services import Service, serving
from support import TASK, write_reviews

ROUNDS = 12
SETTINGS = {
    **msgspec.toml.decode(TASK),
    "rounds": ROUNDS,
    "batch_size": 4,
    "max_length": 16,
    "report_every": 2,
    # AdamW's first steps are as long as its rate: after a few, weights that began below ±1 have passed it.
    "client": {"optimizer": "adamw", "learning_rate": 0.3},
    "tail": {"device": "cpu", "learning_rate": 1e-6},
    "evaluation": {"every": 0},
    "devices": {"start_with": 1},
}


def settings_of(service: Service, name: str) -> EdgeSettings:
    folder = service.folder.parent
    return EdgeSettings(
        server=service.address,
        token_file=str(service.token_file),
        data=str(write_reviews(folder / f"{name}.jsonl", 20)),
        name=name,
        threads=1,
        state_dir=str(folder / "state"),
        cache_dir=str(folder / "cache"),
    )


def test_devices_that_were_there_and_one_that_comes_later_cross_the_event_alike(
    make_bundle: Callable[[str, int], Path], tmp_path: Path
) -> None:
    async def run() -> tuple[list[Summary], Service]:
        async with serving(make_bundle("lora", 2), tmp_path / "cloud", SETTINGS) as service:
            first = asyncio.create_task(run_agent(settings_of(service, "first")))
            while not service.coordinator.run.mirror.coarsenings:
                await asyncio.sleep(0.01)
                assert not first.done(), "the run ended without an event"
            late = asyncio.create_task(run_agent(settings_of(service, "late")))
            summaries = await asyncio.wait_for(asyncio.gather(first, late), 60.0)
            with contextlib.suppress(asyncio.CancelledError):
                await service.serving
            return summaries, service

    summaries, service = asyncio.run(run())
    mirror = service.coordinator.run.mirror
    assert {summary.weights_digest for summary in summaries} == {mirror.digest()}
    rounds = sorted({event.round for event in mirror.coarsenings})
    assert 1 < rounds[0] < ROUNDS
    assert any(f"round {rounds[0]}: " in line and "outgrew its lattice" in line for line in service.said)
    kept = [checkpoint.info.round for checkpoint in list_checkpoints(service.folder / "runs" / "run-1")]
    assert rounds[-1] in kept, "the event can't be taken back: a run that resumes must not begin before it"
