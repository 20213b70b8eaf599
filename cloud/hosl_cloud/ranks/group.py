"""The processes that PyTorch's launcher started for one service: rank 0 decides and tells, the others hear and obey.

A command is a message as JSON, and the tensors that it announces. All of it goes through gloo, on CPUs, whatever
computes; nothing is pickled.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from hosl_cloud.exceptions import RankLostError
from hosl_cloud.rounds.exchange import BatchArrays, Floats
from hosl_cloud.settings import RunConfig
from hosl_protocol.exceptions import HoslError

log = logging.getLogger(__name__)

BEAT_S = 5.0
"""Pause between rank 0's signs of life, in which it also finds out who is gone."""


MEETING_S = 0.05
"""Pause between looks for ranks that are not there yet."""


class Message(msgspec.Struct, kw_only=True, frozen=True, tag=True, forbid_unknown_fields=True):
    """Root of all commands."""


class Load(Message, frozen=True):
    """Load the tail of a bundle, which every machine has at this path. Answered by a Reply."""

    tail: int
    bundle: str
    digest: str
    """SHA-256 of the manifest at rank 0."""
    config: RunConfig


class Part(msgspec.Struct, kw_only=True, frozen=True):
    """A batch whose arrays follow."""

    tokens: int
    examples: int
    labels: int
    weight: float = 1.0


class Train(Message, frozen=True):
    """Forward and backward through each of a rank's batches. Answered by a Reply, and then λ of each result."""

    tail: int
    shares: tuple[tuple[Part, ...], ...]
    """By rank."""
    passes: int
    """Micro-batches that every rank runs in step with the others; who has fewer runs empty ones."""
    wants_cut_gradient: bool


class Evaluate(Message, frozen=True):
    """Forward alone. Answered by a Reply."""

    tail: int
    shares: tuple[tuple[Part, ...], ...]
    passes: int


class Step(Message, frozen=True):
    """One optimizer step."""

    tail: int
    round: int
    total_weight: float


class Discard(Message, frozen=True):
    """Drop the round's gradients."""

    tail: int


class Gather(Message, frozen=True):
    """Put the tensors of the state together, one after the other."""

    tail: int


class Entry(msgspec.Struct, kw_only=True, frozen=True):
    """A float32 tensor that follows."""

    name: str
    shape: tuple[int, ...]


class Restore(Message, frozen=True):
    """Take the state that follows, tensor by tensor."""

    tail: int
    entries: tuple[Entry, ...]


class Forget(Message, frozen=True):
    """Free a tail."""

    tail: int


class Beat(Message, frozen=True):
    """Say that you are there."""


class Leave(Message, frozen=True):
    """The service ends."""


Command = Load | Train | Evaluate | Step | Discard | Gather | Restore | Forget | Beat | Leave


class Outcome(msgspec.Struct, kw_only=True, frozen=True):
    """What came of one batch."""

    error: str = ""
    """Empty, `not-finite` or `spoilt`."""
    what: str = ""
    """Of an error: which number is not finite."""
    value: str = "0.0"
    """The loss, or that number; as text, for JSON has no infinity."""
    correct: int = 0
    scored: int = 0


class Reply(msgspec.Struct, kw_only=True, frozen=True):
    """What a rank says to a command."""

    outcomes: tuple[Outcome, ...] = ()
    error: str = ""
    """Why the rank cannot load the tail; its exit code beside it."""
    exit_code: int = 0


# Made here, on import: threads that use a type for the first time at once crash msgspec.
_COMMAND: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
_REPLY = msgspec.json.Decoder(Reply)


def _join(backend: str, timeout_s: float) -> None:
    timeout = timedelta(seconds=timeout_s)
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    store = _meet(store, rank, size, time.monotonic() + timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _meet(store: Store, rank: int, size: int, deadline: float) -> Store:
    """A part of the launcher's store for this start alone: after a restart it still holds what the last one wrote.

    Rank 0 numbers the start. Who asks for the number does so by a token of its own, which no former start has answered.
    """
    if rank:
        token = uuid.uuid4().hex
        store.set(f"ask/{rank}", token)
        start = store.get(f"answer/{token}").decode()
        store.set(f"here/{start}/{rank}", "")
        return PrefixStore(f"start/{start}", store)
    start, absent = str(store.add("starts", 1)), set(range(1, size))
    while absent:
        for other in sorted(absent):
            if store.check([f"ask/{other}"]):
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", start)
            if store.check([f"here/{start}/{other}"]):
                absent.remove(other)
        if time.monotonic() > deadline:
            raise TimeoutError(f"no sign of rank {min(absent)}")
        time.sleep(MEETING_S)
    return PrefixStore(f"start/{start}", store)


class Group:
    """This process among the ranks. Only one command is under way at a time, whoever tells it."""

    def __init__(self, timeout_s: float) -> None:
        """Meet the others; the launcher's variables say where. `timeout_s` is the longest wait for one of them.

        Raises RankLostError.
        """
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        has_cuda = torch.cuda.is_available()
        if has_cuda:
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        try:
            _join("cpu:gloo,cuda:nccl" if has_cuda else "gloo", timeout_s)
        except (RuntimeError, TimeoutError) as error:
            raise RankLostError(self.rank, error) from error
        self.meshes = {kind: init_device_mesh(kind, (self.size,)) for kind in ("cpu", *(["cuda"] if has_cuda else []))}
        self._lock = threading.Lock()
        self._forgotten: list[int] = []
        self._tails = 0
        self._has_left = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="beat", daemon=True)

    def next_tail(self) -> int:
        """A number for a tail that is to be loaded."""
        self._tails += 1
        return self._tails

    def forget(self, tail: int) -> None:
        """Free a tail on the other ranks, before the next command."""
        self._forgotten.append(tail)

    @contextlib.contextmanager
    def command(self, command: Command) -> Iterator[None]:
        """Tell all ranks, and take part in it within. What goes wrong but by our own errors ends this process."""
        with self._lock:
            try:
                while self._forgotten:
                    self._broadcast(Forget(tail=self._forgotten.pop()))
                self._broadcast(command)
                yield
            except HoslError:
                raise
            except Exception as error:
                self.lose(error)

    def hear(self) -> Command:
        """The next command. Raises RuntimeError where rank 0 is gone."""
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, 0)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return _COMMAND.decode(data.numpy().tobytes())

    def _broadcast(self, command: Command) -> None:
        data = torch.frombuffer(bytearray(msgspec.json.encode(command)), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(data)]), 0)
        dist.broadcast(data, 0)

    def reply(self, reply: Reply) -> None:
        """Answer rank 0."""
        data = torch.frombuffer(bytearray(msgspec.json.encode(reply)), dtype=torch.uint8)
        dist.send(torch.tensor([len(data)]), 0)
        dist.send(data, 0)

    def reply_of(self, rank: int) -> Reply:
        """A rank's answer."""
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, rank)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(data, rank)
        return _REPLY.decode(data.numpy().tobytes())

    def send_batch(self, batch: BatchArrays, rank: int) -> list[tuple[dist.Work | None, Tensor]]:
        """Begin to send; what must be waited for, with what must live until then."""
        tensors = [torch.tensor(batch[0], dtype=torch.float32), *(torch.tensor(each) for each in batch[1:])]
        return [(dist.isend(tensor, rank), tensor) for tensor in tensors]

    def receive_batch(self, part: Part, width: int) -> BatchArrays:
        """A batch that rank 0 sends."""
        activations = torch.empty(part.tokens, width)
        lengths, labels = torch.empty(part.examples, dtype=torch.int32), torch.empty(part.labels, dtype=torch.int32)
        for tensor in (activations, lengths, labels):
            dist.recv(tensor, 0)
        return activations.numpy(), lengths.numpy(), labels.numpy()

    def send_array(self, array: Floats) -> None:
        """Send rank 0 an array of a shape that it knows."""
        dist.send(torch.from_numpy(np.ascontiguousarray(array)), 0)

    def receive_array(self, shape: tuple[int, ...], rank: int) -> Floats:
        """What `send_array` sent."""
        tensor = torch.empty(shape)
        dist.recv(tensor, rank)
        return np.asarray(tensor.numpy())

    def is_true_everywhere(self, is_true: bool) -> bool:
        """Whether all ranks say so."""
        flag = torch.tensor([int(is_true)])
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def sum(self, value: float) -> float:
        """Of all ranks."""
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def begin_beating(self) -> None:
        """Let rank 0 look every `BEAT_S` whether the others are there."""
        self._beating.start()

    def _beat(self) -> None:
        while not self._has_left.wait(BEAT_S):
            # A command that is under way finds out by itself.
            if self._lock.acquire(blocking=False):
                self._lock.release()
                with self.command(Beat()):
                    self.is_true_everywhere(True)

    def leave(self) -> None:
        """Let every rank end its process."""
        self._has_left.set()
        if self._beating.is_alive():
            self._beating.join()
        with self.command(Leave()):
            self.part()

    def part(self) -> None:
        """Part from the others, as every rank does at its end."""
        groups = weakref.WeakSet([dist.group.WORLD, *(mesh.get_group() for mesh in self.meshes.values())])
        dist.destroy_process_group()
        atexit.register(_join_threads, groups, list(self.meshes.values()))

    def lose(self, error: Exception) -> NoReturn:
        """End as a crash does, and at once: what can be saved is on disk, and the run goes on from there.

        Threads of gloo may wait for a rank that is gone, so that they can't be joined.
        """
        lost = RankLostError(self.rank, error)
        log.debug("the group is lost", exc_info=error)
        print(f"hosl-cloud: error: {lost}", file=sys.stderr, flush=True)
        logging.shutdown()
        os._exit(int(lost.exit_code))


def _join_threads(groups: weakref.WeakSet[Any], meshes: list[DeviceMesh]) -> None:
    """Have gloo's threads joined while the interpreter is still whole.

    Such a thread takes Python's lock to free the tensors of its last work; where the interpreter is ending, that aborts
    the process. The threads are joined when nothing refers to their group any more. Torch keeps meshes in its caches
    for ever, and a mesh its group: so it is emptied. A tail's hooks make circles, which only the collector frees, some
    of them at its second look, and none while a frame holds the tail: so this comes after all frames.
    """
    for mesh in meshes:
        vars(mesh).clear()
    while groups and gc.collect():
        pass
