"""Who follows a run hears of each thing once, when it has happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from hosl_cloud.runs.progress import Evaluated, Evaluates, Event, Over, RoundBegins, RoundDone, Waits
from hosl_cloud.runs.run import Run
from hosl_cloud.settings import parse_config
from hosl_cloud.simulation.partition import Partition
from hosl_cloud.simulation.virtual_devices import simulate
from hosl_cloud.storage.store import Store
from hosl_edge import EdgeSettings, run_agent
from hosl_protocol.run.manifest import load_manifest
from services import serving
from support import TASK, write_reviews

SETTINGS: dict[str, Any] = {
    **msgspec.toml.decode(TASK),
    "rounds": 2,
    "batch_size": 4,
    "max_length": 16,
    "tail": {"learning_rate": 3e-3, "device": "cpu"},
    "evaluation": {"every": 2},
    "devices": {"start_with": 2},
}
MakeBundle = Callable[..., Path]


def make_run(bundle: Path, folder: Path) -> Run:
    manifest = load_manifest(bundle)
    store = Store(folder / "hosl.sqlite")
    run = Run("run-1", parse_config(SETTINGS, manifest), manifest, bundle, folder / "run", store)
    store.create_run("run-1", bundle, manifest.shard_digest, run.config)
    return run


def test_a_simulated_run_is_followed(make_bundle: MakeBundle, tmp_path: Path) -> None:
    run, heard, thread = make_run(make_bundle("lora", 2), tmp_path), list[Event](), ThreadPoolExecutor(1)

    def listen(event: Event) -> None:
        if isinstance(event, RoundDone):
            stored = thread.submit(run.store.run, "run-1").result()  # the store is not for the event loop
            assert stored.round == event.round, "it is told after it is stored"
        heard.append(event)

    run.listeners.append(listen)
    train, held_out = write_reviews(tmp_path / "train.jsonl", 20), write_reviews(tmp_path / "eval.jsonl", 8, 400)
    asyncio.run(simulate(run, train, held_out, Partition(), 1, lambda sentence: None))

    evaluated = [Evaluates, Evaluated]
    kinds = [*evaluated, RoundBegins, RoundDone, RoundBegins, RoundDone, *evaluated, Over]
    assert [type(event) for event in heard] == kinds
    first, second = (event for event in heard if isinstance(event, RoundDone))
    stored = run.store.rounds("run-1")
    assert [each.loss for each in (first, second)] == [row.loss for row in stored]
    assert [each.wire_bytes for each in (first, second)] == [row.wire_bytes for row in stored]
    assert (second.round, second.rounds, second.devices) == (2, 2, 2)
    assert [event.evaluation for event in heard if isinstance(event, Evaluated)] == run.store.evaluations("run-1")
    assert heard[-1] == Over("run-1", 2, "completed")
    run.store.close()
    thread.shutdown()


def test_a_wait_for_devices_is_told_with_how_many_are_there(make_bundle: MakeBundle, tmp_path: Path) -> None:
    heard = list[Event]()

    async def main() -> None:
        async with serving(make_bundle("lora", 2), tmp_path / "cloud", SETTINGS) as service:
            service.coordinator.run.listeners.append(heard.append)

            def agent(name: str) -> EdgeSettings:
                return EdgeSettings(
                    server=service.address,
                    token_file=str(service.token_file),
                    data=str(write_reviews(tmp_path / "train.jsonl", 20)),
                    name=name,
                    threads=1,
                    state_dir=str(tmp_path / "state"),
                    cache_dir=str(tmp_path / "cache"),
                )

            first = asyncio.create_task(run_agent(agent("a")))
            while Waits("run-1", 1, 2) not in heard:
                await asyncio.sleep(0.01)
            await asyncio.wait_for(asyncio.gather(first, run_agent(agent("b"))), 60.0)
            await service.serving

    asyncio.run(main())
    waits = [event for event in heard if isinstance(event, Waits)]
    assert waits[-1] == Waits("run-1", 1, 2)
    assert heard.index(waits[-1]) < next(place for place, event in enumerate(heard) if isinstance(event, RoundBegins))
    assert heard[-1] == Over("run-1", 2, "completed")
