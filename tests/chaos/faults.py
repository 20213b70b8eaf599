"""What can go wrong with a deployment's processes and connections, drawn from a seed, and how it is done to them."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from chaos.deployment import DEVICES, ROUNDS, ChaosSettings, Deployment
from chaos.launch import POINTS
from chaos.proxy import Direction

Kind = Literal["kill", "leave", "crash", "freeze", "cut", "hold", "slow", "repeat"]

KINDS: dict[str, dict[Kind, int]] = {
    "cloud": {"kill": 3, "leave": 1, "crash": 4, "freeze": 1},
    "device": {"kill": 3, "leave": 1, "crash": 3, "freeze": 1, "cut": 3, "hold": 2, "slow": 1, "repeat": 3},
}
"""How often each is drawn, in proportion."""

STAGES = {
    "ho-sfl": ("round-start", "cut-gradient", "update"),
    "hosl": ("round-start", "probe-loss", "update"),
    "first-order": ("round-start", "cut-gradient", "update"),
}
"""Messages from the cloud that open, or close, a stage of a round."""


@dataclass(frozen=True)
class Fault:
    """Something goes wrong once, `delay_s` after the cloud sent a message of type `stage` in round `round`."""

    kind: Kind
    target: str
    """`cloud`, or a device's name."""
    stage: str
    """Type of a message; empty for the start of everything."""
    round: int
    delay_s: float
    seconds: float = 0.0
    """How long a freeze, a hold or a slow connection lasts."""
    direction: Direction = "up"
    bytes: int = 0
    """What a cut lets pass before."""
    order: str = ""
    """Where to crash; see launch.py."""
    does_cut: bool = False
    """Whether a held connection is cut in the end."""

    def __str__(self) -> str:
        when = f"{self.stage} {self.round}" if self.stage else "the start"
        more = {
            "crash": f" at {self.order}",
            "cut": f" after {self.bytes} bytes {self.direction}",
            "freeze": f" for {self.seconds:.1f} s",
            "hold": f" for {self.seconds:.1f} s" + (", then cut" if self.does_cut else ""),
            "slow": f" for {self.seconds:.1f} s",
            "repeat": f" of a message {self.direction}",
        }.get(self.kind, "")
        return f"{self.kind} {self.target}{more}, {self.delay_s:.3f} s after {when}"


def draw_settings(generator: random.Random, *, strict: bool) -> ChaosSettings:
    """A run's settings."""
    return ChaosSettings(
        algorithm=generator.choice(["ho-sfl", "first-order", "hosl"]),
        optimizer=generator.choice(["sgd", "adamw"]),
        per_round=generator.choice([0, 0, 2]) if strict else 0,
        strict=strict,
        snapshots=generator.random() < 0.4,
    )


def draw_faults(generator: random.Random, settings: ChaosSettings, targets: tuple[str, ...]) -> list[Fault]:
    """Five to eight faults of some of `targets`, anywhere from the start to the last round."""
    return [_draw(generator, settings, targets) for _ in range(generator.randint(5, 8))]


def _draw(generator: random.Random, settings: ChaosSettings, targets: tuple[str, ...]) -> Fault:
    target = generator.choice(targets)
    kinds = KINDS["cloud" if target == "cloud" else "device"]
    (kind,) = generator.choices(list(kinds), list(kinds.values()))
    round_ = generator.randint(0, ROUNDS)
    stage = generator.choice(STAGES[settings.algorithm]) if round_ else generator.choice(["", "eval-start"])
    points = POINTS["hosl_cloud" if target == "cloud" else "hosl_edge"]
    point = generator.choice(sorted(points))  # sorted: the same seed draws the same faults
    whens = ["before", "after", *(["half"] if point == "journal-append" else [])]
    return Fault(
        kind=kind,
        target=target,
        stage=stage,
        round=round_,
        delay_s=generator.uniform(0.0, 2.0) if not stage else generator.choice([0.0, generator.uniform(0.0, 0.1)]),
        seconds=generator.choice([0.2, 1.0, 3.0]) * generator.uniform(0.5, 1.5),
        direction=generator.choice(["up", "down"]),
        bytes=int(10 ** generator.uniform(0.0, 4.5)),
        order=f"{point} {generator.choice(whens)} {generator.choice([0, 0, 1, 3])}",
        does_cut=generator.random() < 0.5,
    )


async def do_faults(deployment: Deployment, faults: list[Fault], done: Counter[str]) -> None:
    """All of them, each at its time; `done` counts those that hit something, and is right at any moment."""
    await asyncio.gather(*(_do(deployment, fault, done) for fault in faults))


async def _do(deployment: Deployment, fault: Fault, done: Counter[str]) -> None:
    if fault.stage:
        await deployment.wait_for_message(fault.stage, fault.round)
    await asyncio.sleep(fault.delay_s)
    worker = deployment.workers[fault.target]
    while not worker.is_running:
        await asyncio.sleep(0.01)

    if fault.target in deployment.proxies and fault.kind in ("cut", "hold", "slow", "repeat"):
        await _disturb(deployment, fault, done)
    elif fault.kind == "crash":
        await _crash(deployment, fault, done)
    else:
        number = {"kill": signal.SIGKILL, "leave": signal.SIGTERM, "freeze": signal.SIGSTOP}[fault.kind]
        worker.send(number)
        done[fault.kind] += 1
        if fault.kind == "freeze":
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                worker.send(signal.SIGCONT)


async def _crash(deployment: Deployment, fault: Fault, done: Counter[str]) -> None:
    """Leave the order to crash; the next one waits until it was followed."""
    path = deployment.workers[fault.target].order
    while path.exists():
        await asyncio.sleep(0.01)
    new = path.with_suffix(f".{id(fault)}")
    new.write_text(fault.order, encoding="ascii")
    new.replace(path)

    try:
        while path.exists():
            await asyncio.sleep(0.01)
    finally:  # the run may end by it
        done["crash"] += not path.exists()


async def _disturb(deployment: Deployment, fault: Fault, done: Counter[str]) -> None:
    proxy = deployment.proxies[fault.target]
    if fault.kind in ("cut", "repeat"):
        reached = asyncio.Event()

        def reach() -> None:
            if fault.kind == "cut":
                proxy.cut()
            done[fault.kind] += 1
            reached.set()

        if fault.kind == "cut":
            proxy.after(fault.direction, fault.bytes, reach)
        else:
            proxy.repeat(fault.direction, reach)
        await reached.wait()
        return
    done[fault.kind] += 1
    try:
        if fault.kind == "hold":
            proxy.hold()
        else:
            proxy.delay_s = 0.02
        await asyncio.sleep(fault.seconds)
    finally:
        proxy.delay_s = 0.0
        if fault.does_cut:
            proxy.cut()
        proxy.release()


def targets_of(*, with_cloud: bool) -> tuple[str, ...]:
    """What may be hit: the cloud as often as two devices."""
    return (*DEVICES, "cloud", "cloud") if with_cloud else DEVICES
