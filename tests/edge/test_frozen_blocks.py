"""A device that keeps what its frozen blocks compute: a round sends the same bytes, and runs them once an example."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hosl_edge import rounds
from hosl_edge.device import Device
from hosl_edge.model.prefix_cache import FILE
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import load_manifest
from hosl_protocol.run.ordering import batch_indices
from hosl_protocol.run.settings import RunSettings, convert
from hosl_protocol.run.tasks import Task, load_preset
from hosl_protocol.run.updates import update_shape
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import CutGradient, EvalResult, ProbeLoss, Welcome
from support import write_reviews

EXAMPLES, HELD_OUT, BATCH = 8, 5, 4
ALGORITHMS = ("ho-sfl", "hosl", "first-order", "frozen")


class Site:
    """A device, its files, and what its prefix computes."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self.manifest = load_manifest(bundle)
        train, held_out = (
            str(write_reviews(folder / f"{name}.jsonl", count)) for name, count in (("t", EXAMPLES), ("e", HELD_OUT))
        )
        self.settings = EdgeSettings(
            server="", token_file="", data=train, eval=held_out, name="pi", threads=1, state_dir=str(folder / "state")
        )
        self.path = folder / "state" / "pi" / FILE
        self.computed = 0
        """Examples that went through the frozen blocks."""
        self._devices: list[Device] = []

    def start(self, algorithm: str, budget: str | None, **run: Any) -> Device:
        """The device with this budget, another process's for all that it knows, in a run of this algorithm."""
        self.stop()
        settings = msgspec.structs.replace(self.settings, cache_budget=budget)
        device = Device(settings, self.bundle, self.manifest)
        self._devices.append(device)
        task = convert(load_preset("reviews"), Task, "task")
        fields = {"max_length": 16, "batch_size": BATCH, "directions": 2, "algorithm": algorithm, "seed": 1} | run
        run_settings = RunSettings(task=task, **fields)
        shape = update_shape(run_settings, self.manifest)
        self.run_settings = run_settings
        facts: dict[str, Any] = {"run": "r", "epoch": 0, "round": 0, "width": self.manifest.width, "update": shape}
        device.join(Welcome(settings=run_settings, plan="rebuild", **facts), lambda *_: None)
        self._watch(device)
        return device

    def _watch(self, device: Device) -> None:
        prefix = device.shard._prefix
        if prefix is not None:
            compute = prefix.compute

            def counted(given: Any, out: Any) -> None:
                self.computed += len(next(iter(out.values())))
                compute(given, out)

            prefix.compute = counted  # type: ignore[method-assign]

    def stop(self) -> None:
        for device in self._devices:
            device.close()
        self._devices.clear()

    def run(self, device: Device, rounds_: int = 4) -> bytes:
        """So many rounds, and an evaluation: all that the device sends, and the digest of its weights."""
        sent = bytearray()
        for round_ in range(1, rounds_ + 1):
            assert device.train is not None
            indices = batch_indices(1, round_, "pi", len(device.train), BATCH)
            batch = device.train.training_batch(indices, self.run_settings, round_, "pi")
            part = rounds.PARTS[self.run_settings.algorithm](self._context(device, round_), batch)
            sent += drive(part, round_, self.manifest.width, batch.tokens)
            if self.run_settings.algorithm in ("ho-sfl", "hosl"):
                device.apply([UpdateRecord(round_, np.array([0.01, -0.02], np.float32), 0.0)])
        assert device.eval is not None
        part = rounds.evaluate(self._context(device, rounds_), device.eval, lambda *_: None)
        sent += drive(part, rounds_, self.manifest.width, 0)
        return bytes(sent) + device.digest().encode()

    def _context(self, device: Device, round_: int) -> rounds.DeviceRound:
        assert device.weights is not None
        return rounds.DeviceRound("r", "pi", 0, round_, self.run_settings, device.shard, device.weights, 1)


def drive(part: rounds.Step, round_: int, width: int, tokens: int) -> bytes:
    """Answer a part of a round; the bytes of all tensors that it sends."""
    sent, reply = bytearray(), None
    generator = np.random.default_rng(round_)
    names: dict[str, Any] = {"run": "r", "epoch": 0, "round": round_}
    while True:
        try:
            action = part.send(reply)
        except StopIteration:
            return bytes(sent)
        reply, loss = None, np.array(0.5, np.float32)
        if isinstance(action, rounds.Send):
            sent += b"".join(array.tobytes() for array in action.tensors.values())
        elif action.kind is CutGradient:
            lambda_TD = generator.standard_normal((tokens, width)).astype(np.float32)
            reply = Frame(CutGradient(**names), {"lambda": lambda_TD, "loss": loss})
        elif action.kind is ProbeLoss:
            reply = Frame(ProbeLoss(**names, direction=0, sign=1), {"loss": loss})
        else:
            reply = Frame(EvalResult(**names, correct=1, scored=2), {"loss": loss})


@pytest.fixture
def site(make_bundle: Callable[[str, int], Path], tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path, make_bundle("norm:-1", 2))
    assert made.manifest.prefix is not None
    yield made
    made.stop()


@pytest.mark.parametrize(
    ("algorithm", "anchor"), [*((name, "clean") for name in ALGORITHMS), ("ho-sfl", "midpoint"), ("hosl", "midpoint")]
)
def test_a_run_sends_the_same_bytes_with_and_without_and_computes_each_example_once(
    site: Site, algorithm: str, anchor: str
) -> None:
    run = {"anchor": anchor}
    expected = site.run(site.start(algorithm, None, **run))
    assert site.computed == 4 * BATCH + HELD_OUT
    assert not site.path.exists()

    site.computed = 0
    device = site.start(algorithm, "1M", **run)
    assert site.run(device) == expected, "while it fills"
    assert site.computed == EXAMPLES + HELD_OUT
    assert device.cache_written_bytes == site.path.stat().st_size

    device = site.start(algorithm, "1M", **run)
    assert site.run(device) == expected, "after another start"
    assert site.computed == EXAMPLES + HELD_OUT
    assert device.cache_written_bytes == 0


@pytest.mark.parametrize("budget", ["100", "1K", "2K", "3K"])
def test_what_the_budget_does_not_hold_is_computed_to_the_same_bytes(site: Site, budget: str) -> None:
    expected = site.run(site.start("ho-sfl", None))
    site.computed = 0
    device = site.start("ho-sfl", budget)
    cache = device.shard.cache
    assert cache is not None
    assert cache.room < EXAMPLES + HELD_OUT
    assert f"{cache.room} of {EXAMPLES + HELD_OUT} examples" in device.cache_sentence
    assert site.run(device) == expected
    again = 4 * BATCH - EXAMPLES
    assert site.computed == EXAMPLES + HELD_OUT + again - min(cache.room, EXAMPLES) * again // EXAMPLES
    assert site.path.stat().st_size <= device.settings.cache_budget_bytes  # type: ignore[operator]


def test_a_damaged_file_and_one_of_other_data_give_the_same_bytes(site: Site) -> None:
    expected = site.run(site.start("first-order", None))
    site.run(site.start("first-order", "1M"))
    data = bytearray(site.path.read_bytes())
    for place in range(60, len(data), 200):
        data[place] ^= 1
    site.path.write_bytes(data)
    site.computed = 0
    assert site.run(site.start("first-order", "1M")) == expected
    assert site.computed > 0

    # The same names, and other texts.
    Path(site.settings.data).write_text(
        "".join(f'{{"text": "word{n} other", "label": {n % 2}}}\n' for n in range(EXAMPLES)), encoding="utf-8"
    )
    other = site.run(site.start("first-order", None))
    assert other != expected
    assert site.run(site.start("first-order", "1M")) == other


def test_a_longer_max_length_finds_nothing_of_a_shorter_one(site: Site) -> None:
    site.run(site.start("ho-sfl", "1M", max_length=4))
    expected = site.run(site.start("ho-sfl", None))
    assert site.run(site.start("ho-sfl", "1M")) == expected


def test_a_run_goes_on_where_the_disk_is_full(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    expected = site.run(site.start("frozen", None))
    device = site.start("frozen", "1M")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        assert site.run(device) == expected
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in caplog.text
    assert site.path.stat().st_size < 1500
    assert site.run(site.start("frozen", "1M")) == expected


def test_a_bundle_without_a_prefix_says_so_and_computes_as_ever(
    make_bundle: Callable[[str, int], Path], tmp_path: Path
) -> None:
    site = Site(tmp_path, make_bundle("norm", 2))
    device = site.start("ho-sfl", "1M")
    assert device.cache_sentence.startswith("cache_budget keeps nothing")
    assert device.shard.cache is None
    sent = site.run(device)
    assert not site.path.exists()
    assert site.run(site.start("ho-sfl", None)) == sent
    site.stop()


def test_zero_removes_the_file_and_no_budget_leaves_it_alone(site: Site) -> None:
    site.run(site.start("frozen", "1M"))
    site.start("frozen", None)
    assert site.path.exists()
    site.start("frozen", "0")
    assert not site.path.exists()


@pytest.mark.parametrize("value", ["many", "-1", ""])
def test_a_budget_that_is_none_is_named(value: str) -> None:
    settings = EdgeSettings(server="ws://127.0.0.1:1", token_file="t", data="d", cache_budget=value)
    with pytest.raises(SettingsError, match="cache_budget"):
        assert settings.cache_budget_bytes
