"""The devices that are connected, and the driver that leads a round's generator through talking with them.

A round is a generator (rounds/algorithms.py) that computes, and says what to tell and to ask devices. `Fleet.drive`
lends it the two places that it needs: it advances on the compute thread, one step at a time, while devices are told and
waited for on the event loop. The generator is never entered by two threads at once, for `drive` awaits each step.

All methods run on the event loop. `_arrived` is set by a Peer with every answer and with the end of its connection; it
is cleared before the answers are looked at, so that none that comes during the look is slept over. `_changed` tells
that devices came or went.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from hosl_cloud import metrics
from hosl_cloud.rounds.exchange import Answer, Ask, Await, Exchange, Fault, Shared, Tally, Tell
from hosl_cloud.runs.run import Compute
from hosl_protocol.program.waiting import within
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import Message, Refusal, Update, name_of

log = logging.getLogger(__name__)

T = TypeVar("T")


class Participant(Protocol):
    """What a round needs of a device: runs/peer.py with a socket, simulation/virtual_devices.py without one."""

    name: str
    is_ready: bool
    data_digest: str
    """Of its training data; empty where nothing of it may be kept."""
    train_examples: int
    eval_examples: int
    eval_digest: str
    """Of its held-out data; empty without."""
    heard_at: float
    """Unix time of its last message."""
    sent_round: int
    """Once it is ready: the last round whose update it was sent."""
    gone: asyncio.Event

    def tell(self, message: Message, tensors: Mapping[str, Any] | None = None) -> None: ...

    def end(self, message: Message) -> None: ...

    def take(self, ask: Ask) -> Frame | None: ...

    def leave_round(self) -> None: ...

    async def emptied(self, timeout_s: float) -> None: ...


@dataclass(frozen=True)
class Waiting:
    """What the run waits for now."""

    what: str
    """Type of message, or `devices` between rounds."""
    devices: tuple[str, ...]
    since: float
    """Unix time."""
    needed: int = 0
    """How many devices have to be there; 0 where that is not what it waits for."""


@dataclass(frozen=True)
class Deadlines:
    """Until when a round's devices are waited for."""

    stage_s: float
    """For each answer, from when it was first asked for."""
    ends_at: float
    """For all of them, in the event loop's time."""


@dataclass
class Fleet:
    """The connected devices of one run, by name; `compute` runs a generator's work."""

    compute: Compute
    on_fault: Callable[[Fault], Awaitable[None]]
    bundle: str = ""
    """Its name, for the figures."""
    peers: dict[str, Participant] = field(default_factory=dict)
    waiting: Waiting | None = None
    tally: Tally = field(default_factory=Tally)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def on_arrival(self) -> Callable[[], None]:
        """For devices to say that an answer is there."""
        return self._arrived.set

    def ready_names(self) -> list[str]:
        """Devices that can take part in a round."""
        return sorted(name for name, peer in self.peers.items() if peer.is_ready)

    async def notify(self) -> None:
        """Wake who waits for devices: one came or went, or the run is to stop."""
        metrics.devices_connected.labels(self.bundle).set(len(self.ready_names()))
        async with self._changed:
            self._changed.notify_all()

    async def wait_until(
        self, is_time: Callable[[], bool], timeout_s: float | None, needed: int, devices: Collection[str] = ()
    ) -> None:
        """Wait for so many devices, or for these. Raises TimeoutError."""
        self.waiting = Waiting("devices", tuple(devices), time.time(), needed)
        try:
            async with self._changed:
                await within(timeout_s, self._changed.wait_for(is_time))
        finally:
            self.waiting = None

    def broadcast(self, update: Update, tensors: Mapping[str, Any]) -> None:
        """Send an update to every ready device."""
        self.send_update([self.peers[name] for name in self.ready_names()], update, tensors)

    def send_update(self, peers: Iterable[Participant], update: Update, tensors: Mapping[str, Any]) -> None:
        """Send an update to these devices, whose next it is."""
        # One mapping for all, in which the first peer that sends it leaves the encoded frame.
        shared = Shared(tensors)
        for peer in peers:
            peer.tell(update, shared)
            peer.sent_round = update.round

    async def drive(self, exchange: Exchange[T], stage_deadline_s: float, deadline_s: float = math.inf) -> T:
        """Run a round's generator to its end, its work on the compute thread.

        It talks to the devices that were ready at its start, so that one that comes back joins in peace and waits for
        the next round. A device that is late at a stage has left the round; after `deadline_s` as a whole, all have.
        """
        # Fixed for the round: a device that connects again is another Peer under the same name, and not in it.
        peers = {name: peer for name, peer in self.peers.items() if peer.is_ready}
        deadlines = Deadlines(stage_deadline_s, asyncio.get_running_loop().time() + deadline_s)
        asked: dict[Ask, float] = {}
        answer: Answer | None = None

        told: deque[Tell] = deque()
        loop = asyncio.get_running_loop()

        # What the generator tells goes out while it still computes: λ of one device does not wait for the next batch.
        def deliver() -> None:
            while told:
                _deliver(told.popleft(), peers)

        def tell(action: Tell) -> None:  # called on the compute thread
            told.append(action)
            loop.call_soon_threadsafe(deliver)

        try:
            while True:
                action, result = await self.compute(partial(_advance, exchange, answer, tell))
                deliver()  # before the generator's next question, and before its end
                answer = None
                if action is None:
                    return result  # type: ignore[no-any-return]
                if isinstance(action, Await):
                    answer = await self._first(action, peers, asked, deadlines)
                else:
                    await self.on_fault(action)
        finally:
            # However it ends, devices get what was told, and their answers are late from here on.
            deliver()
            self.waiting = None
            for peer in peers.values():
                peer.leave_round()

    async def _first(
        self, wanted: Await, peers: Mapping[str, Participant], asked: dict[Ask, float], deadlines: Deadlines
    ) -> Answer | None:
        """The first answer that is in; what already waits is taken even after its stage's deadline.

        `asked` holds when each ask was first made, in the event loop's time.
        """
        now, asks = asyncio.get_running_loop().time, wanted.asks
        for ask in asks:
            asked.setdefault(ask, now())

        while True:
            self._arrived.clear()  # before the look
            for ask in asks:
                peer = peers.get(ask.device)
                if deadlines.ends_at <= now():
                    _give_up(ask, peer, "before the deadline of it all")
                    return Answer(ask, None)
                frame = peer.take(ask) if peer is not None else None
                if frame is not None:
                    del asked[ask]  # the same ask in a later batch of an evaluation has a deadline of its own
                    return Answer(ask, frame)
                # After the look at what is there: an answer that came before its device left, or late, still counts.
                if peer is None or peer.gone.is_set() or asked[ask] + deadlines.stage_s <= now():
                    _give_up(ask, peer, "in time")
                    return Answer(ask, None)
            if not wanted.waits:
                return None

            # Sleep until something arrives, or the first deadline passes, and look again.
            oldest = min(asked[ask] for ask in asks)
            devices = tuple(ask.device for ask in asks)
            self.waiting = Waiting(name_of(asks[0].kind), devices, time.time() - (now() - oldest))
            await self._wait_for_arrival(min(oldest + deadlines.stage_s, deadlines.ends_at) - now())

    async def _wait_for_arrival(self, timeout_s: float) -> None:
        try:
            await within(None if math.isinf(timeout_s) else max(timeout_s, 0.0), self._arrived.wait())
        except asyncio.TimeoutError:
            return


def _deliver(action: Tell, peers: Mapping[str, Participant]) -> None:
    peer = peers.get(action.device)
    if peer is None:
        return
    if isinstance(action.message, Refusal):
        peer.is_ready = False  # at once: the next round must not count on it
        peer.end(action.message)
    else:
        peer.tell(action.message, action.tensors)


def _give_up(ask: Ask, peer: Participant | None, when: str) -> None:
    what = name_of(ask.kind)
    if peer is None or peer.gone.is_set():
        log.warning(
            "device %s left before its %s of round %d", ask.device, what, ask.round, extra={"device": ask.device}
        )
        return
    log.warning("device %s sent no %s of round %d %s", ask.device, what, ask.round, when, extra={"device": ask.device})
    peer.leave_round()


def _advance(
    exchange: Exchange[Any], answer: Answer | None, tell: Callable[[Tell], None]
) -> tuple[Await | Fault | None, Any]:
    """Run the generator, on the compute thread, up to the next thing that the event loop must do before it goes on.

    What it tells is on its way at once. The action is None at its end, with the generator's result beside it.
    """
    try:
        action = exchange.send(answer)  # the first one is None, which starts it
        while isinstance(action, Tell):
            tell(action)
            action = next(exchange)
    except StopIteration as stop:
        return None, stop.value
    return action, None
