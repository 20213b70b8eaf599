"""A frozen run whose activations are kept: each goes over the wire once, and nothing of the result changes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hosl_cloud import metrics
from hosl_cloud.storage.kept_data import list_kept, remove_kept
from hosl_edge.agent import run_agent
from hosl_edge.settings import EdgeSettings
from services import serving
from support import TASK, write_reviews

MakeBundle = Callable[[str, int], Path]
ROUNDS, BATCH, EXAMPLES = 12, 4, 10
SETTINGS: dict[str, Any] = {
    **msgspec.toml.decode(TASK),
    "algorithm": "frozen",
    "rounds": ROUNDS,
    "batch_size": BATCH,
    "max_length": 16,
    "strict": True,
    "tail": {"learning_rate": 3e-3},
    "evaluation": {"every": 4},
    "cache": {"bytes": "100M"},
}
FIRST_PASS = -(-EXAMPLES // BATCH)
"""Rounds that bring the first pass, the last of which brings a part of the second."""


@dataclass
class Outcome:
    """What a run came to, in bits, and what came over the wire for it."""

    losses: list[float]
    evaluations: list[Any]
    anchors: int
    eval_batches: int
    said: list[str]

    @property
    def bits(self) -> tuple[list[float], list[Any]]:
        return self.losses, [dataclasses.replace(each, by_class=None) for each in self.evaluations]


def bytes_of(kind: str) -> int:
    return int(metrics.wire_counter("received", kind)._value.get())


def train(bundle: Path, folder: Path, run: str, device: str | None = "pi", **settings: Any) -> Outcome:
    """Train with a device on loopback, or with none."""
    return asyncio.run(_train(bundle, folder, run, device, {**SETTINGS, **settings}))


async def _train(bundle: Path, folder: Path, run: str, device: str | None, settings: dict[str, Any]) -> Outcome:
    before = bytes_of("anchor"), bytes_of("eval-batch")
    async with serving(bundle, folder, settings, run_id=run) as service:
        if device is not None:
            agent = run_agent(agent_settings(folder, service.address, service.token_file, device, run))
            await asyncio.wait_for(agent, 60.0)
        await asyncio.wait_for(service.serving, 60.0)
        store = service.coordinator.store
        return Outcome(
            [row.loss for row in await asyncio.to_thread(store.rounds, run)],
            await asyncio.to_thread(store.evaluations, run),
            bytes_of("anchor") - before[0],
            bytes_of("eval-batch") - before[1],
            service.said,
        )


def agent_settings(folder: Path, address: str, token: Path, device: str, run: str) -> EdgeSettings:
    return EdgeSettings(
        server=address,
        token_file=str(token),
        data=str(write_reviews(folder / "train.jsonl", EXAMPLES)),
        eval=str(write_reviews(folder / "eval.jsonl", 6, 40)),
        name=device,
        threads=1,
        state_dir=str(folder / f"state-{run}"),
        cache_dir=str(folder / "edge-cache"),
    )


@pytest.fixture
def bundle(make_bundle: MakeBundle) -> Path:
    return make_bundle("none", 2)


@pytest.fixture
def without(bundle: Path, tmp_path: Path) -> Outcome:
    """The same run with nothing kept."""
    return train(bundle, tmp_path / "without", "without", cache={"bytes": 0})


def test_each_example_is_sent_once_and_the_bits_stay(bundle: Path, tmp_path: Path, without: Outcome) -> None:
    kept = train(bundle, tmp_path / "with", "kept")
    assert kept.bits == without.bits
    # In bytes, for batches have different lengths: a quarter of the rounds bring the first pass.
    assert kept.anchors < without.anchors * (FIRST_PASS + 1) / ROUNDS
    assert kept.eval_batches < without.eval_batches / 3
    files = list_kept(tmp_path / "with" / "cache")
    assert sorted(each.data.part for each in files) == ["held-out", "train"]


def test_a_second_run_needs_no_device(bundle: Path, tmp_path: Path, without: Outcome) -> None:
    train(bundle, tmp_path / "site", "first")
    other = {"learning_rate": 1e-3}
    alone = train(bundle, tmp_path / "site", "second", device=None, tail=other)
    assert (alone.anchors, alone.eval_batches) == (0, 0)
    assert any("device pi need not be there: 10 examples are kept, 6 held out" in line for line in alone.said)
    again = train(bundle, tmp_path / "without", "again", tail=other, cache={"bytes": 0})
    assert alone.bits == again.bits
    assert alone.losses != without.losses


def test_what_does_not_fit_is_sent_as_before(bundle: Path, tmp_path: Path, without: Outcome) -> None:
    short = train(bundle, tmp_path / "short", "short", cache={"bytes": "6K"})
    assert short.bits == without.bits
    assert short.anchors > 0.7 * without.anchors
    assert len([line for line in short.said if "the cache is full (cache.bytes, 6K)" in line]) == 1
    assert sum(each.size_bytes for each in list_kept(tmp_path / "short" / "cache")) <= 6000


def test_a_damaged_example_is_asked_for_again(bundle: Path, tmp_path: Path) -> None:
    first = train(bundle, tmp_path / "site", "first")
    for each in list_kept(tmp_path / "site" / "cache"):
        content = bytearray(each.path.read_bytes())
        content[-20] ^= 1
        each.path.write_bytes(content)
    second = train(bundle, tmp_path / "site", "second")
    assert second.bits == first.bits
    assert 0 < second.anchors < first.anchors
    assert second.eval_batches > 0


def test_what_is_removed_is_sent_again(bundle: Path, tmp_path: Path) -> None:
    first = train(bundle, tmp_path / "site", "first")
    assert len(remove_kept(tmp_path / "site" / "cache", ["pi"])) == 2
    second = train(bundle, tmp_path / "site", "second")
    assert second.bits == first.bits
    assert second.anchors == pytest.approx(first.anchors, rel=0.02)


def test_a_device_may_leave_once_all_it_has_is_kept(bundle: Path, tmp_path: Path) -> None:
    asyncio.run(_leave(bundle, tmp_path / "site"))


async def _leave(bundle: Path, folder: Path) -> None:
    settings = {**SETTINGS, "rounds": 400, "evaluation": {"every": 100}}
    async with serving(bundle, folder, settings) as service:
        kept = service.coordinator.kept
        assert kept is not None
        agent = asyncio.create_task(
            run_agent(agent_settings(folder, service.address, service.token_file, "pi", "left"))
        )
        while "pi" not in kept.training_names():
            await asyncio.sleep(0.001)
        agent.cancel()
        await asyncio.gather(agent, return_exceptions=True)
        assert service.coordinator.run.round < 400
        assert "completed" in await asyncio.wait_for(service.serving, 120.0)
        evaluations = await asyncio.to_thread(service.coordinator.store.evaluations, "run-1")
        assert [each.examples for each in evaluations] == [6] * 5


@pytest.mark.parametrize("settings", [{"algorithm": "ho-sfl"}, {"cache": {"bytes": 0}}])
def test_nothing_else_is_kept(make_bundle: MakeBundle, tmp_path: Path, settings: dict[str, Any]) -> None:
    train(make_bundle("lora", 2), tmp_path / "site", "other", rounds=3, **settings)
    assert not (tmp_path / "site" / "cache").exists()
