"""What the service costs without torch: many devices on real websockets, canned activations, an empty tail.

    python tests/benchmarks/cloud/fleet_load.py [--devices N] [--per-round N] [--rounds N] [--algorithm A] [--batch N]
                                          [--tokens N] [--width N] [--directions P] [--processes N] [--json]

The service, its coordinator, store, mirror and codec are the real ones, in a process of their own; devices share a few
processes. One device takes part in a round and then reads nothing, not even its λ, until it is sampled again.
CPU is the server process's, all threads, over the rounds after the first; megabytes are both directions' frames.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors.numpy
from websockets.asyncio.client import connect

from hosl_protocol.arithmetic.lattice import exponent_for, round_to_lattice
from hosl_protocol.arithmetic.perturbation import LatticeTensor
from hosl_protocol.run.manifest import (
    MANIFEST,
    SHARD_WEIGHTS,
    Manifest,
    TensorEntry,
    describe_file,
    encode_manifest,
    load_manifest,
)
from hosl_protocol.run.ordering import sample_devices
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.weights.client_weights import make_client_weights
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.connection import Connection, Role
from hosl_protocol.wire.messages import (
    Anchor,
    CatchUp,
    Complete,
    CutGradient,
    Hello,
    Message,
    Probe,
    ProbeLoss,
    Projections,
    Ready,
    Refusal,
    Report,
    RoundStart,
    Update,
    Welcome,
)

RUN = "load"
SEED = 1
LORA = (8, 768)
"""What trains: an adapter of this shape."""
AGGREGATION = ("round-start", "projections", "update")
"""Messages that are there only to average over devices."""
JOINING = ("hello", "welcome", "catch-up", "ready", "complete")
LAG_INTERVAL_S = 0.02
LONGEST_SILENCE = 8
"""Rounds; a device that answers no ping for 15 s is cut off."""
SETTLE_S = 2.0
"""Pause before memory is read."""

TASK = {
    "name": "load",
    "kind": "prompt-classification",
    "template": "{text}",
    "labels": ["0", "1"],
    "verbalizers": ["bad", "good"],
}


@dataclass(frozen=True)
class Work:
    """What is asked of the service."""

    devices: int
    per_round: int
    rounds: int
    algorithm: str
    batch: int
    tokens: int
    width: int
    directions: int

    @property
    def names(self) -> list[str]:
        return [f"pi-{number:04}" for number in range(self.devices)]

    def config(self) -> dict[str, Any]:
        """`run.toml`."""
        return {
            "task": TASK,
            "algorithm": self.algorithm,
            "seed": SEED,
            "rounds": self.rounds,
            "directions": self.directions,
            "batch_size": self.batch,
            "max_length": self.tokens,
            "evaluation": {"every": 0},
            "devices": {"start_with": self.devices, "per_round": self.per_round},
        }

    def tensor_bytes(self) -> dict[str, int]:
        """The tensors' own bytes in a round, by message."""
        batch = 4 * self.batch * (self.tokens * self.width + 2)
        coefficients = 4 * self.directions if self.algorithm != "frozen" else 0
        probes = 2 * self.directions if self.algorithm == "hosl" else 0
        of_one = {"anchor": batch, "probe": probes * batch, "probe-loss": 4 * probes}
        if self.algorithm == "ho-sfl":
            of_one |= {"cut-gradient": 4 * (self.batch * self.tokens * self.width + 1), "projections": coefficients}
        return {kind: self.per_round * size for kind, size in of_one.items()} | {
            "update": self.devices * (coefficients + 4)
        }


@dataclass(frozen=True)
class Silence:
    """A device that answers in round `first`, then reads nothing until the update before `last`, its next round."""

    device: str
    first: int
    last: int


def longest_silence(work: Work) -> Silence | None:
    """Who is left alone for the longest time after the first rounds; None where nobody is for three rounds."""
    taken: dict[str, int] = {}
    best: Silence | None = None
    for round_ in range(3, work.rounds + 1):
        for name in sample_devices(SEED, round_, work.names, work.per_round):
            first = taken.get(name)
            gap = 0 if first is None else round_ - first
            if first is not None and gap <= LONGEST_SILENCE and (best is None or gap > best.last - best.first):
                best = Silence(name, first, round_)
            taken[name] = round_
    return best if best is not None and best.last - best.first > 3 else None


def write_bundle(folder: Path, work: Work) -> None:
    """As much of a bundle as the service reads of it: the manifest, and what trains."""
    (folder / SHARD_WEIGHTS).parent.mkdir(parents=True)
    values = 0.02 * np.random.default_rng(0).standard_normal(LORA, np.float32)
    exponent = exponent_for(float(np.abs(values).max()))
    tensor = LatticeTensor("adapter", 0, round_to_lattice(values, exponent), exponent)
    safetensors.numpy.save_file({tensor.name: tensor.values}, folder / SHARD_WEIGHTS)
    manifest = Manifest(
        model="load",
        family="llama",
        architecture="LlamaForCausalLM",
        split=1,
        blocks=2,
        width=work.width,
        max_length=work.tokens,
        pad_token_id=0,
        train="lora",
        tensors=(TensorEntry(name=tensor.name, shape=LORA, trainable=True, exponent=exponent),),
        files=(describe_file(folder, SHARD_WEIGHTS),),
    )
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))


# The server


@dataclass(frozen=True)
class Mark:
    """Where the server's process stood when a round's last Anchor was in."""

    wall_s: float
    cpu_s: float
    wire_bytes: dict[str, dict[str, int]]


class NullTail:
    """Stands in for hosl_cloud.tail.trainer.TailTrainer: every batch has one loss and one gradient."""

    head_rows = (0, 1)
    at_once = 1

    def __init__(self, work: Work) -> None:
        from hosl_cloud.metrics import wire_bytes_by_kind

        self.marks: list[Mark] = []
        self._lambda_TD = np.full((work.batch * work.tokens, work.width), 1e-3, np.float32)
        self._wire_bytes = wire_bytes_by_kind

    def forward_backward_many(self, batches: Any, weights: Any, **more: bool) -> Any:
        from hosl_cloud.tail.trainer import StepResult

        return [StepResult(0.5, self._lambda_TD[: len(batch[0])], 0, batch[2].size) for batch in batches]

    def evaluate_many(self, batches: Any) -> Any:
        from hosl_cloud.tail.trainer import EvalScore

        return [EvalScore(0.5, 0, batch[2].size) for batch in batches]

    def step(self, round_: int, total_weight: float) -> None:
        self.marks.append(Mark(time.monotonic(), time.process_time(), self._wire_bytes()))

    def discard(self) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def gather(self) -> Any:
        yield from ()

    def close(self) -> None: ...


def serve_main(pipe: Pipe, folder: Path, work: Work) -> None:
    """A server process: says its address and token, and in the end what the rounds took."""
    asyncio.run(_serve(pipe, folder, work))


async def _serve(pipe: Pipe, folder: Path, work: Work) -> None:
    from hosl_cloud.metrics import wire_bytes_by_kind
    from hosl_cloud.runs.coordinator import Coordinator
    from hosl_cloud.runs.queue import RunQueue
    from hosl_cloud.runs.run import Run
    from hosl_cloud.service.access import Authenticator, DeviceTokens
    from hosl_cloud.service.listen import ListenSettings
    from hosl_cloud.service.server import Service, serve
    from hosl_cloud.settings import parse_config
    from hosl_cloud.storage.store import Store

    bundle = folder / "bundle"
    manifest = load_manifest(bundle)
    config = parse_config(work.config(), manifest)
    store = await asyncio.to_thread(Store, folder / "hosl.sqlite")
    tail = NullTail(work)
    run = Run(RUN, config, manifest, bundle, folder / "run", store)
    coordinator = Coordinator(run, lambda sentence: None, make_tail=lambda *_: tail)  # type: ignore[arg-type,return-value]
    await coordinator.prepare()
    await asyncio.to_thread(store.create_run, RUN, bundle, manifest.shard_digest, config)
    lags: list[tuple[float, float]] = []
    watch = asyncio.create_task(_watch_loop(lags))
    runs = RunQueue(store, folder, lambda sentence: None)
    runs.adopt(coordinator)
    authenticator = Authenticator(await asyncio.to_thread(DeviceTokens, store), "token", "admin")
    await serve(Service(runs, authenticator, ListenSettings("127.0.0.1", 0), folder, until=RUN), pipe.send)
    watch.cancel()
    first, last = tail.marks[0], tail.marks[-1]
    pipe.send(
        {
            "round_s": [row.seconds for row in await asyncio.to_thread(store.rounds, RUN)],
            "wall_s": last.wall_s - first.wall_s,
            "cpu_s": last.cpu_s - first.cpu_s,
            "marked_bytes": _total(last.wire_bytes) - _total(first.wire_bytes),
            "wire_bytes": {kind: n for kinds in wire_bytes_by_kind().values() for kind, n in kinds.items()},
            "lag_s": sorted(lag for due, lag in lags if first.wall_s < due < last.wall_s),
            "peak_rss": _peak_rss(),
        }
    )
    store.close()


async def _watch_loop(lags: list[tuple[float, float]]) -> None:
    """When a task was to wake, and how much later the event loop woke it."""
    while True:
        due = time.monotonic() + LAG_INTERVAL_S
        await asyncio.sleep(LAG_INTERVAL_S)
        lags.append((due, time.monotonic() - due))


def _total(wire_bytes: dict[str, dict[str, int]]) -> int:
    return sum(sum(kinds.values()) for kinds in wire_bytes.values())


def _peak_rss() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


# The devices


@dataclass
class Group:
    """The devices of one process: they share their activations and one copy of the weights."""

    url: str
    bundle: Path
    work: Work
    silence: Silence | None
    digests: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        work = self.work
        self.manifest = load_manifest(self.bundle)
        activations = np.random.default_rng(0).standard_normal((work.batch * work.tokens, work.width), np.float32)
        lengths = np.full(work.batch, work.tokens, np.int32)
        self.batch = {"activations": activations, "lengths": lengths, "labels": np.zeros(work.batch, np.int32)}
        self.projections = np.linspace(-1e-3, 1e-3, work.directions, dtype=np.float32)
        self.weights: Any = None
        self.moved = asyncio.Condition()

    def agree(self, settings: RunSettings) -> None:
        """The weights, once."""
        if self.weights is None:
            tensors = safetensors.numpy.load_file(self.bundle / SHARD_WEIGHTS)
            self.weights = make_client_weights(self.manifest, tensors, settings)
            self.digests[0] = self.weights.digest()

    async def apply(self, message: Update, frame: Frame, report_every: int) -> None:
        """Whoever hears of an update first applies it."""
        if message.round != self.weights.applied_round + 1:
            return
        self.weights.apply([UpdateRecord(message.round, frame.tensors["coefficients"], message.learning_rate)])
        if message.round % report_every == 0 or message.round == self.work.rounds:
            self.digests[message.round] = self.weights.digest()
        async with self.moved:
            self.moved.notify_all()


class Device:
    """One connection that answers at once."""

    def __init__(self, group: Group, name: str) -> None:
        self.group, self.name, self.work = group, name, group.work
        self.is_ready = asyncio.Event()
        self._connection = Connection(Role.EDGE)
        self._probes: list[tuple[int, int]] = []
        self._attempt = 0

    async def run(self) -> None:
        """From Hello to Complete."""
        silence = self.group.silence
        is_silent = silence is not None and silence.device == self.name
        with socket.create_connection(_host_and_port(self.group.url)) as connection:
            if is_silent:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            await self._talk(connection, max_queue=1 if is_silent else 16)

    async def _talk(self, connection: socket.socket, max_queue: int) -> None:
        headers = {"Authorization": "Bearer token"}
        async with connect(
            self.group.url + "/v1/device",
            sock=connection,
            additional_headers=headers,
            compression=None,
            max_queue=max_queue,
            ping_interval=None,
        ) as self.socket:
            digest = self.group.manifest.shard_digest
            await self._send(Hello(software="load", device=self.name, shard_digest=digest, data_digest="d" * 64))
            async for piece in self.socket:
                assert isinstance(piece, bytes)
                frame = self._connection.receive(piece)
                if frame is None:
                    continue
                if isinstance(frame.message, Complete):
                    return
                await self._handle(frame)

    async def _send(self, message: Message, tensors: dict[str, Any] | None = None) -> None:
        for piece in self._connection.send(message, tensors):
            await self.socket.send(piece)

    async def _handle(self, frame: Frame) -> None:
        message = frame.message
        if isinstance(message, Welcome):
            self._settings = message.settings
            self.group.agree(message.settings)
        elif isinstance(message, CatchUp):
            assert len(frame.tensors["learning_rates"]) == 0, "everybody joins before the first round"
            ready = Ready(
                run=RUN,
                epoch=0,
                applied_round=0,
                weights_digest=self.group.digests[0],
                train_examples=1,
                eval_examples=0,
            )
            await self._send(ready)
            self.is_ready.set()
        elif isinstance(message, Update):
            await self._update(message, frame)
        elif isinstance(message, RoundStart):
            self._attempt = message.attempt
            await self._start(message.round)
        elif isinstance(message, ProbeLoss):
            await self._next_probe(message.round)
        elif isinstance(message, CutGradient):
            if not self._is_silent_in(message.round):
                await self._project(message.round)
        elif isinstance(message, Refusal):
            raise AssertionError(message.reason)

    async def _update(self, message: Update, frame: Frame) -> None:
        every = self._settings.report_every
        await self.group.apply(message, frame, every)
        if message.round % every == 0 or message.round == self.work.rounds:
            figures = dict.fromkeys(("peak_rss_bytes", "anonymous_bytes", "sent_bytes", "received_bytes"), 0)
            digest = self.group.digests[message.round]
            await self._send(
                Report(
                    run=RUN, epoch=0, applied_round=message.round, weights_digest=digest, step_seconds=0.0, **figures
                )
            )

    async def _start(self, round_: int) -> None:
        if self.work.algorithm == "hosl":
            self._probes = [(direction, sign) for direction in range(self.work.directions) for sign in (+1, -1)]
            await self._next_probe(round_)
            return
        await self._send(Anchor(**self._named(round_)), self.group.batch)
        if self._is_silent_in(round_):
            if self.work.algorithm == "ho-sfl":
                await self._project(round_)
            assert self.group.silence is not None
            until = self.group.silence.last - 1
            async with self.group.moved:
                await self.group.moved.wait_for(lambda: self.group.weights.applied_round >= until)

    def _is_silent_in(self, round_: int) -> bool:
        silence = self.group.silence
        return silence is not None and (self.name, round_) == (silence.device, silence.first)

    async def _next_probe(self, round_: int) -> None:
        if not self._probes:
            await self._send(Anchor(**self._named(round_, 2 * self.work.directions)), self.group.batch)
            return
        direction, sign = self._probes.pop(0)
        named = self._named(round_, 2 * direction + (sign < 0))
        probe = Probe(**named, direction=direction, sign=+1 if sign > 0 else -1)
        await self._send(probe, self.group.batch)

    def _named(self, round_: int, id_: int = 0) -> dict[str, Any]:
        return {"run": RUN, "epoch": 0, "round": round_, "attempt": self._attempt, "id": id_}

    async def _project(self, round_: int) -> None:
        await self._send(Projections(**self._named(round_, 1)), {"projections": self.group.projections})


def _host_and_port(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("ws://").rpartition(":")
    return host, int(port)


def devices_main(pipe: Pipe, url: str, bundle: Path, work: Work, silence: Silence | None) -> None:
    """A process of devices: brings those up that it is sent the names of, and says when they are ready."""
    asyncio.run(_attend(pipe, Group(url, bundle, work, silence)))


async def _attend(pipe: Pipe, group: Group) -> None:
    tasks: list[asyncio.Task[None]] = []
    while names := await asyncio.to_thread(pipe.recv):
        devices = [Device(group, name) for name in names]
        tasks += [asyncio.create_task(device.run()) for device in devices]
        ready = asyncio.gather(*(device.is_ready.wait() for device in devices))
        await asyncio.wait({ready, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            raise RuntimeError("a device ended early")
        pipe.send(len(names))
    await asyncio.gather(*tasks)


# The measurement


def measure(work: Work, processes: int) -> dict[str, Any]:
    """Bring devices up in three steps, with the server's memory in between; then all rounds."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_bundle(folder / "bundle", work)
        silence = longest_silence(work)

        def start(target: Any, *arguments: Any) -> tuple[Pipe, Any]:
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(theirs, *arguments))
            process.start()
            stack.callback(_end, process)
            return ours, process

        server, process = start(serve_main, folder, work)
        url = _receive(server, process)
        groups = [start(devices_main, url, folder / "bundle", work, silence) for _ in range(processes)]
        half = max(1, work.devices // 2)
        memory = []
        for names in (work.names[:half], work.names[half:-1], work.names[-1:]):
            busy = [
                (group, names[number::processes]) for number, group in enumerate(groups) if names[number::processes]
            ]
            for (pipe, _), own in busy:
                pipe.send(own)
            for group, _ in busy:
                _receive(*group)
            if len(names) > 1:
                time.sleep(SETTLE_S)
                memory.append(psutil.Process(process.pid).memory_info().rss)
        for pipe, _ in groups:
            pipe.send([])
        return make_row(work, silence, memory, _receive(server, process))


def make_row(work: Work, silence: Silence | None, memory: Sequence[int], served: dict[str, Any]) -> dict[str, Any]:
    """The figures and what follows from them."""
    rounds = work.rounds - 1  # between the first round's mark and the last one's
    wire = {kind: count / work.rounds for kind, count in served["wire_bytes"].items() if kind not in JOINING}
    tensors = work.tensor_bytes()
    joined = work.devices - 1 - max(1, work.devices // 2)
    shares = {kind: work.devices if kind == "update" else work.per_round for kind in AGGREGATION}
    quiet = served["round_s"][silence.first : silence.last - 1] if silence is not None else []
    others = served["round_s"][1 : silence.first] + served["round_s"][silence.last :] if silence is not None else []
    lags = served["lag_s"]
    return {
        "rounds_per_s": rounds / served["wall_s"],
        "round_s": statistics.median(served["round_s"][1:]),
        "wire_bytes_per_round": {kind: round(count) for kind, count in sorted(wire.items())},
        "tensor_bytes_per_round": tensors,
        "wire_ratio": sum(wire.values()) / sum(tensors.values()),
        "aggregation_bytes": sum(wire.get(kind, 0.0) / share for kind, share in shares.items()),
        "cpu_ms_per_round": 1e3 * served["cpu_s"] / rounds,
        "cpu_ms_per_mb": 1e3 * served["cpu_s"] / (served["marked_bytes"] / 1e6),
        "kb_per_idle_device": (memory[1] - memory[0]) / joined / 1e3 if len(memory) > 1 and joined > 0 else None,
        "idle_rss_mb": memory[-1] / 1e6 if memory else None,
        "peak_rss_mb": served["peak_rss"] / 1e6,
        "silent_rounds": len(quiet),
        "round_s_while_silent": statistics.median(quiet) if quiet else None,
        "round_s_otherwise": statistics.median(others) if others else None,
        "loop_lag_p99_ms": 1e3 * lags[int(0.99 * (len(lags) - 1))],
        "loop_lag_max_ms": 1e3 * lags[-1],
    }


def _receive(pipe: Pipe, process: Any) -> Any:
    while not pipe.poll(1.0):
        if not process.is_alive():
            raise SystemExit(f"a process ended with {process.exitcode}")
    return pipe.recv()


def _end(process: Any) -> None:
    process.join(5.0)
    process.terminate()
    process.join()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=200, help="connected; default: %(default)s")
    parser.add_argument("--per-round", type=int, default=20, help="sampled each round; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=12, help="the first is not counted; default: %(default)s")
    parser.add_argument("--algorithm", choices=("ho-sfl", "hosl", "frozen"), default="ho-sfl")
    parser.add_argument("--batch", type=int, default=16, help="examples of a device; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=128, help="of an example; default: %(default)s")
    parser.add_argument("--width", type=int, default=768, help="of the cut layer; default: %(default)s")
    parser.add_argument("--directions", type=int, default=2, help="P; default: %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="that hold the devices; default: %(default)s")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    work = Work(
        devices=options.devices,
        per_round=min(options.per_round, options.devices),
        rounds=options.rounds,
        algorithm=options.algorithm,
        batch=options.batch,
        tokens=options.tokens,
        width=options.width,
        directions=options.directions,
    )
    load = os.getloadavg()[0]
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before",
        "versions": {name: version(name) for name in ("hosl", "uvicorn", "websockets", "numpy")},
        "python": platform.python_version(),
        "work": vars(work),
        "row": measure(work, options.processes),
    }
    print(json.dumps(report) if options.json else describe(report))


def describe(report: dict[str, Any]) -> str:
    """The report as a table."""
    work, row = Work(**report["work"]), report["row"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    silent, idle = row["round_s_while_silent"], row["kb_per_idle_device"]
    lines = [
        f"{report['machine']}; Python {report['python']}, {versions}",
        f"{work.algorithm}, P = {work.directions}; {work.devices} devices, {work.per_round} of them a round; "
        f"{work.rounds} rounds of {work.batch} x {work.tokens} tokens, width {work.width}, float32",
        f"{'rounds per second':<46}{row['rounds_per_s']:>12.2f}",
        f"{'a round, median':<46}{row['round_s']:>12.2f} s",
        *(
            f"{'  ' + kind + ', of which tensors':<46}{count / 1e3:>12.1f} KB a round, "
            f"{row['tensor_bytes_per_round'].get(kind, 0) / 1e3:.1f}"
            for kind, count in row["wire_bytes_per_round"].items()
        ),
        f"{'bytes on the wire / bytes of tensors':<46}{row['wire_ratio']:>12.4f}",
        f"{'round-start, projections, update':<46}{row['aggregation_bytes']:>12.0f} B a device and round",
        f"{'server CPU outside torch':<46}{row['cpu_ms_per_mb']:>12.2f} ms per MB",
        f"{'':<46}{row['cpu_ms_per_round']:>12.1f} ms a round",
        f"{'server memory, each idle device':<46}" + ("" if idle is None else f"{idle:>12.0f} KB"),
        f"{'server memory, idle and at its peak':<46}{row['idle_rss_mb']:>12.0f} MB, {row['peak_rss_mb']:.0f} MB",
        f"{'event loop late, 99th percentile and most':<46}{row['loop_lag_p99_ms']:>12.1f} ms, "
        f"{row['loop_lag_max_ms']:.1f} ms",
    ]
    if silent is not None:
        lines.append(
            f"{'a round while one device reads nothing':<46}{silent:>12.2f} s "
            f"(median of {row['silent_rounds']}; otherwise {row['round_s_otherwise']:.2f} s)"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
