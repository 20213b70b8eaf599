"""The processes that PyTorch's launcher started for one service: rank 0 decides and tells, the others hear and obey.

A command (ranks/commands.py) is a message as JSON, and the tensors that it announces. All of it goes through gloo, on
CPUs, whatever computes; nothing is pickled.

The invariant: every rank makes the same collective calls in the same order, or all of them hang until the timeout. So
at rank 0 everything happens within `Group.command`, whose lock keeps the compute threads of several runs, and the
heartbeat's thread, from telling two commands at once. A collective call outside of it would break it, or an error on
one rank alone: `command` ends the process then, and the launcher starts all ranks again.
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
from hosl_cloud.ranks.commands import (
    COMMAND_DECODER,
    REPLY_DECODER,
    BatchShape,
    Command,
    Free,
    Heartbeat,
    Reply,
    ShutDown,
)
from hosl_cloud.rounds.exchange import BatchArrays, Floats
from hosl_protocol.exceptions import HoslError

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
"""Pause between rank 0's heartbeats, by which it also finds out who is gone."""

RENDEZVOUS_POLL_S = 0.05
"""Pause between looks for ranks that are not there yet."""


def _init_process_group(backend: str, timeout_s: float) -> None:
    timeout = timedelta(seconds=timeout_s)
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    store = _rendezvous(store, rank, size, time.monotonic() + timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _rendezvous(store: Store, rank: int, size: int, deadline: float) -> Store:
    """Agree on a part of the launcher's store for this start: after a restart it holds what the last one wrote.

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
        time.sleep(RENDEZVOUS_POLL_S)

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
            _init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo", timeout_s)
        except (RuntimeError, TimeoutError) as error:
            raise RankLostError(self.rank, error) from error

        self.meshes = {kind: init_device_mesh(kind, (self.size,)) for kind in ("cpu", *(["cuda"] if has_cuda else []))}

        self._lock = threading.Lock()
        self._freed: list[int] = []
        self._tails = 0
        self._has_left = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="beat", daemon=True)

    def new_tail_id(self) -> int:
        """Number a tail that is to be loaded."""
        self._tails += 1
        return self._tails

    def free_tail(self, tail: int) -> None:
        """Free a tail on the other ranks, before the next command."""
        # Not at once: this may be called in the middle of another command.
        self._freed.append(tail)

    @contextlib.contextmanager
    def command(self, command: Command) -> Iterator[None]:
        """Tell all ranks, and take part in it within the `with`. Any error but our own ends this process.

        Our own are raised where all ranks find the same, as in a bad batch; after any other they no longer agree.
        """
        with self._lock:
            try:
                while self._freed:
                    self._broadcast(Free(tail=self._freed.pop()))

                self._broadcast(command)
                yield
            except HoslError:
                raise
            except Exception as error:
                self.abort(error)

    def receive_command(self) -> Command:
        """Wait for the next command. Raises RuntimeError where rank 0 is gone."""
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, 0)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return COMMAND_DECODER.decode(data.numpy().tobytes())

    def _broadcast(self, command: Command) -> None:
        data = torch.frombuffer(bytearray(msgspec.json.encode(command)), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(data)]), 0)
        dist.broadcast(data, 0)

    def send_reply(self, reply: Reply) -> None:
        """Answer rank 0."""
        data = torch.frombuffer(bytearray(msgspec.json.encode(reply)), dtype=torch.uint8)
        dist.send(torch.tensor([len(data)]), 0)
        dist.send(data, 0)

    def receive_reply(self, rank: int) -> Reply:
        """Wait for a rank's answer."""
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, rank)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(data, rank)
        return REPLY_DECODER.decode(data.numpy().tobytes())

    def send_batch(self, batch: BatchArrays, rank: int) -> list[tuple[dist.Work | None, Tensor]]:
        """Begin to send a batch; what must be waited for, with the tensor that must live until then."""
        # Copies: a frame's arrays are read-only, and must not be freed while gloo reads them.
        tensors = [torch.tensor(batch[0], dtype=torch.float32), *(torch.tensor(each) for each in batch[1:])]
        return [(dist.isend(tensor, rank), tensor) for tensor in tensors]

    def receive_batch(self, part: BatchShape, width: int) -> BatchArrays:
        """Wait for a batch that rank 0 sends: activations [T, D], lengths [B], labels [N]."""
        activations = torch.empty(part.tokens, width)
        lengths, labels = torch.empty(part.examples, dtype=torch.int32), torch.empty(part.labels, dtype=torch.int32)
        for tensor in (activations, lengths, labels):
            dist.recv(tensor, 0)
        return activations.numpy(), lengths.numpy(), labels.numpy()

    def send_array(self, array: Floats) -> None:
        """Send rank 0 an array of a shape that it knows."""
        dist.send(torch.from_numpy(np.ascontiguousarray(array)), 0)

    def receive_array(self, shape: tuple[int, ...], rank: int) -> Floats:
        """Wait for what `send_array` sends."""
        tensor = torch.empty(shape)
        dist.recv(tensor, rank)
        return np.asarray(tensor.numpy())

    def is_true_everywhere(self, is_true: bool) -> bool:
        """Ask whether all ranks say so; a collective call, which all ranks make."""
        flag = torch.tensor([int(is_true)])
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def sum(self, value: float) -> float:
        """Sum a number over all ranks; a collective call."""
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def start_heartbeat(self) -> None:
        """Let rank 0 look every `BEAT_S` whether the others are there."""
        self._heartbeat.start()

    def _beat(self) -> None:
        while not self._has_left.wait(HEARTBEAT_S):
            # A command that is under way finds out by itself, and a heartbeat that waits for it would come late.
            if self._lock.acquire(blocking=False):
                self._lock.release()
                with self.command(Heartbeat()):
                    self.is_true_everywhere(True)

    def shut_down(self) -> None:
        """Let every rank end its process."""
        # The heartbeat ends first, for after ShutDown nobody would answer it.
        self._has_left.set()
        if self._heartbeat.is_alive():
            self._heartbeat.join()
        with self.command(ShutDown()):
            self.disband()

    def disband(self) -> None:
        """Leave the process group, as every rank does at its end."""
        groups = weakref.WeakSet([dist.group.WORLD, *(mesh.get_group() for mesh in self.meshes.values())])
        dist.destroy_process_group()
        atexit.register(_join_threads, groups, list(self.meshes.values()))

    def abort(self, error: Exception) -> NoReturn:
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
