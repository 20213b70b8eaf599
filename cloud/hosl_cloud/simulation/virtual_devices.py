"""A whole fleet in one process: the devices' own generators against the real course of a run, without sockets.

Virtual devices share one copy of the client's weights, which are equal on all devices by construction, and one data
set of which each holds a part. Frames go through the real codec: what a device gets has the wire's types.

All of it runs on the event loop's thread but for the tail: a device works when its answer is taken (`take`), one at a
time, so that the shared weights are at rest whenever another begins. The first to hear of an update applies it for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import Tokenizer

from hosl_cloud import metrics
from hosl_cloud.rounds.exchange import Ask, Tally
from hosl_cloud.runs.coordinator import Coordinator, Pace, at_once
from hosl_cloud.runs.run import Ending, Run
from hosl_cloud.settings import RunConfig
from hosl_cloud.simulation.baselines import FirstOrderClient, share_weights, zeroth_order_round
from hosl_cloud.simulation.partition import Indices, Partition
from hosl_edge import rounds
from hosl_edge.data.datasets import Batch, Dataset
from hosl_edge.data.images import load_images
from hosl_edge.data.texts import load_texts
from hosl_edge.model.memory import preferred_rows, useful_sets
from hosl_edge.model.shard import Shard
from hosl_export.bundle.reading import load_client
from hosl_export.tensor_files import read_tensors
from hosl_protocol.arithmetic.rotation import rotation_of
from hosl_protocol.exceptions import HoslError, SettingsError
from hosl_protocol.run.manifest import SHARD_TOKENIZER, SHARD_WEIGHTS, Manifest
from hosl_protocol.run.ordering import batch_indices
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.updates import update_shape
from hosl_protocol.weights.client_weights import ClientWeights, make_client_weights
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.codec import Frame, FrameReader, encode
from hosl_protocol.wire.connection import bounds_for
from hosl_protocol.wire.messages import (
    EvalStart,
    FromCloud,
    FromEdge,
    Late,
    Message,
    Refusal,
    RoundStart,
    Update,
    name_of,
)
from hosl_protocol.wire.packing import Dither
from hosl_protocol.wire.updates import read_update

Say: TypeAlias = Callable[[str], None]


def check_fleet(config: RunConfig) -> None:
    """Raise SettingsError where a round would wait for more devices than are simulated."""
    devices = config.devices
    if devices.quorum > devices.start_with:
        raise SettingsError("devices.quorum", devices.quorum, f"use at most --devices, {devices.start_with}")


async def simulate(
    run: Run,
    data: Path,
    held_out: Path | None,
    partition: Partition,
    threads: int,
    say: Say,
    *,
    skip_broken: bool = False,
    on_loaded: Callable[[Coordinator], None] = lambda coordinator: None,
    pace: Pace = at_once,
) -> Ending:
    """Train to the end with `run.config.devices.start_with` virtual devices on `data`; the first one evaluates.

    `on_loaded` is called when everything is loaded and nothing has begun. Raises DataError, SettingsError, and what a
    run raises.
    """
    shared = await asyncio.to_thread(load_shared_state, run, data, held_out, threads, skip_broken=skip_broken)

    own_round = zeroth_order_round if run.config.baseline == "zeroth-order" else None
    coordinator = Coordinator(run, say, own_round, pace=pace)
    try:
        await coordinator.prepare()
        coordinator.fleet.tally = shared.tally  # the codec's bytes count as the wire's
        for device in make_devices(shared, partition, run.config.devices.start_with):
            coordinator.fleet.peers[device.name] = device  # no admission: they hold the base shard's weights
        on_loaded(coordinator)
        ending = await coordinator.train()
        shared.check()
        assert ending != "paused"  # nobody asks a simulation to
        return ending
    except BaseException:
        with contextlib.suppress(HoslError):  # what ended it is to be heard of
            await asyncio.to_thread(run.store.set_state, run.id, "failed")
        raise
    finally:
        coordinator.close()
        shared.weights.close()


def load_shared_state(
    run: Run, data: Path, held_out: Path | None, threads: int, *, skip_broken: bool = False
) -> SharedState:
    """Load the shard and the data, as one device does."""
    settings, manifest = run.settings, run.manifest
    shard = Shard(run.bundle, manifest, threads)
    weights = make_client_weights(manifest, shard.weights, settings, threads)

    read = partial(open_data, run.bundle, manifest, settings, skip_broken=skip_broken)
    train, evaluated = read(data), None if held_out is None else read(held_out)
    shard.open(with_gradients=settings.traits.sends_gradient)
    shard.max_length = settings.max_length
    shard.rows = preferred_rows(settings, manifest.image)

    if run.config.baseline == "first-order":
        client = load_first_order(run.bundle, run.config, shard)
        return SharedState(settings, shard, weights, train, evaluated, client.round, client.apply, client.tally)
    take_step = rounds.PARTS[settings.algorithm]
    shared = SharedState(settings, shard, weights, train, evaluated, take_step, lambda update: weights.apply([update]))
    shared.state_bytes = run.state_bytes
    return shared


def load_first_order(bundle: Path, config: RunConfig, shard: Shard) -> FirstOrderClient:
    """Load the client half as a torch module over the shard's own weights."""
    half = load_client(bundle, shard.manifest, read_tensors(bundle / SHARD_WEIGHTS))
    share_weights(half, shard.weights, {entry.name for entry in shard.manifest.trainable})
    return FirstOrderClient(half, config)


def open_data(
    bundle: Path, manifest: Manifest, settings: RunSettings, path: Path, *, skip_broken: bool = False
) -> Dataset:
    """Read a data file, as a device does. Raises DataError."""
    if manifest.image is not None:
        return load_images(path, settings.task, manifest.image, manifest.max_length, skip_broken=skip_broken)
    tokenizer = Tokenizer.from_file(str(bundle / SHARD_TOKENIZER))
    return load_texts(path, settings.task, tokenizer, settings.max_length, manifest)


def make_devices(shared: SharedState, partition: Partition, count: int) -> list[VirtualDevice]:
    """Make `device-0`, `device-1`, ... with the parts of the data that they hold."""
    parts = partition.deal(shared.train.labels, len(shared.train), count, shared.settings.seed)
    width = len(str(count - 1))
    return [
        VirtualDevice(f"device-{place:0{width}}", shared, part, is_evaluator=place == 0)
        for place, part in enumerate(parts)
    ]


@dataclass
class SharedState:
    """What all virtual devices share: the weights, the data, and how a round is done with them."""

    settings: RunSettings
    shard: Shard
    weights: ClientWeights
    train: Dataset
    held_out: Dataset | None
    take_step: Callable[[rounds.DeviceRound, Batch], rounds.Step]
    """A device's part of a round."""
    update: Callable[[UpdateRecord], None]
    """A round's step of the client's weights."""
    tally: Tally = field(default_factory=Tally)
    state_bytes: int = 0
    """Of a snapshot."""
    round: int = 0
    failure: Exception | None = None
    """Of a device: all of them end with it, for here nobody starts it again."""

    def check(self) -> None:
        """Raise what a device has failed with."""
        if self.failure is not None:
            raise self.failure

    def apply(self, update: UpdateRecord) -> None:
        """Take a round's step, once for all devices."""
        # Several devices are told, sooner or later; the first one moves the weights that all share.
        if update.round > self.round:
            self.round = update.round
            self.update(update)

    def context(self, message: RoundStart | EvalStart, device: str) -> rounds.DeviceRound:
        """Make what a device's generator needs to know; sets are held as by a device without a memory budget."""
        return rounds.DeviceRound(
            run=message.run,
            device=device,
            epoch=message.epoch,
            round=message.round,
            settings=self.settings,
            shard=self.shard,
            weights=self.weights,
            held_sets=useful_sets(self.settings, self.shard.manifest),
            attempt=message.attempt,
        )


class VirtualDevice:
    """A device without a process: a name and its part of the data. A Participant of runs/fleet.py."""

    def __init__(self, name: str, shared: SharedState, examples: Indices, *, is_evaluator: bool = False) -> None:
        self.name, self._train = name, shared.train.subset(examples)
        self.is_ready, self.sent_round = True, 0
        self.eval_examples = len(shared.held_out) if is_evaluator and shared.held_out is not None else 0
        self.data_digest = self.eval_digest = ""  # nothing is kept: to send costs nothing here
        self.train_examples = len(self._train)
        self.heard_at = time.time()
        self.gone = asyncio.Event()
        self._shared = shared
        manifest = shared.shard.manifest
        bounds = bounds_for(shared.settings, manifest.width, update_shape(shared.settings, manifest))
        self._up, self._down = FrameReader(FromEdge, bounds), FrameReader(FromCloud, bounds)
        self._steps: rounds.Step | None = None
        self._replies: deque[Frame] = deque()

    def tell(self, message: Message, tensors: Mapping[str, Any] | None = None) -> None:
        """Do what the device would do about it; what it fails with is raised where its answer is taken."""
        try:
            self._hear(message, tensors)
        except Exception as error:  # nobody who tells waits for an answer
            self._shared.failure = self._shared.failure or error

    def _hear(self, message: Message, tensors: Mapping[str, Any] | None) -> None:
        frame = self._carry("sent", self._down, message, tensors or {})

        if isinstance(message, RoundStart):
            self._begin(self._shared.take_step(self._shared.context(message, self.name), self._draw(message)))
        elif isinstance(message, EvalStart):
            assert self._shared.held_out is not None
            self._begin(
                rounds.evaluate(self._shared.context(message, self.name), self._shared.held_out, lambda *result: None)
            )
        elif isinstance(message, Update):
            self._shared.apply(read_update(frame))
        elif isinstance(message, Late):
            self.leave_round()
        else:
            self._replies.append(frame)

    def _draw(self, message: RoundStart) -> Batch:
        settings = self._shared.settings
        chosen = batch_indices(settings.seed, message.round, self.name, len(self._train), settings.batch_size)
        return self._train.training_batch(chosen, settings, message.round, self.name)

    def _begin(self, steps: rounds.Step) -> None:
        self._steps = steps  # begun only when an answer is taken
        self._replies.clear()

    def take(self, ask: Ask) -> Frame | None:
        """Take the answer to `ask`: the device works until it has it. Raises what it, or another, has failed with."""
        self._shared.check()
        if self._steps is None:
            return None

        action = next(self._steps, None)
        while isinstance(action, rounds.Receive):
            if not self._replies:  # it was left out of the round
                return None
            try:
                action = self._steps.send(self._replies.popleft())
            except StopIteration:
                return None

        if action is None:
            return None
        # A device's generator sends in the order in which the cloud asks.
        assert isinstance(action.message, ask.kind)
        return self._carry("received", self._up, action.message, action.tensors)

    def _carry(self, direction: str, reader: FrameReader, message: Message, tensors: Mapping[str, Any]) -> Frame:
        """Carry a message through the codec, as over a socket."""
        count = metrics.wire_bytes.labels(direction, name_of(message))
        frame = None
        settings = self._shared.settings
        for piece in encode(message, tensors, settings.wire_dtype, Dither(settings.seed, rotation_of(self.name))):
            count.inc(len(piece))
            self._shared.tally.wire_bytes += len(piece)
            frame = reader.feed(piece)
        assert frame is not None
        return frame

    async def emptied(self, timeout_s: float) -> None:
        """Nothing waits: what it is told it has taken."""

    def end(self, message: Message) -> None:
        """End the device's part, where a connection would end; one that is to fetch a snapshot is back at once."""
        if isinstance(message, Refusal) and message.code == "run" and message.retry:
            self._shared.tally.wire_bytes += self._shared.state_bytes
            self.is_ready, self.sent_round = True, self._shared.round
            return
        self.is_ready = False
        self.gone.set()

    def leave_round(self) -> None:
        """Drop what this device does for the round."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None
