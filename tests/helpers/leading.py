"""Rounds of the cloud over devices that a test scripts: a real tail on a tiny model, and a driver without a fleet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from hosl_cloud.rounds.exchange import Action, Answer, Ask, Await, CloudRound, Exchange, Tell
from hosl_cloud.settings import DeviceSettings, RunConfig
from hosl_cloud.tail.trainer import TailTrainer
from hosl_protocol.arithmetic.rotation import GradientLayout
from hosl_protocol.run.settings import ClientOptimizer
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import Anchor

NAME: dict[str, Any] = {"run": "r", "epoch": 0, "round": 1}
LENGTHS = {"a": (3, 7), "b": (2, 5, 4, 6), "c": (1, 1, 1)}
RATE, STEP = 0.5, 1e-2
Answers = Callable[[Ask], Frame | None]


class Cloud:
    """A real tail on a tiny model, and rounds over scripted devices."""

    def __init__(self, bundle: Any, algorithm: str, weighting: str = "equal", directions: int = 2) -> None:
        base: RunConfig = bundle.config()
        self.config = msgspec.structs.replace(
            base,
            algorithm=algorithm,
            directions=directions,
            probe_step=STEP,
            client=ClientOptimizer(learning_rate=RATE),
            devices=DeviceSettings(weighting=weighting),  # type: ignore[arg-type]
        )
        self.layout: GradientLayout | None = None
        self.trainer = TailTrainer(bundle.path, bundle.manifest, self.config)
        self.batches = {
            name: bundle.batch("prompt-classification", lengths, seed=place)
            for place, (name, lengths) in enumerate(LENGTHS.items())
        }

    def context(self, devices: Sequence[str] = "abc") -> CloudRound:
        return CloudRound("r", 0, 1, self.config, self.trainer, devices, layout=self.layout)

    def tensors(self, device: str, scale: float = 1.0) -> dict[str, npt.NDArray[Any]]:
        activations, lengths, labels = self.batches[device].sent
        return {"activations": activations * np.float32(scale), "lengths": lengths, "labels": labels}

    def anchor(self, device: str) -> Frame:
        return Frame(Anchor(**NAME), self.tensors(device))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.trainer.parameters.items()}

    def has_gradient(self) -> bool:
        return any(value.grad is not None for value in self.trainer.parameters.values())


def drive(
    exchange: Exchange[Any], answers: Answers, choose: Callable[[Sequence[Ask]], Ask] = lambda asks: asks[0]
) -> tuple[Any, list[Action]]:
    """Lead a round to its end, where `choose` says whose answer comes first; what it comes to, and all that it does."""
    seen: list[Action] = []
    answer: Answer | None = None
    while True:
        try:
            action = exchange.send(answer)
        except StopIteration as stop:
            return stop.value, seen
        seen.append(action)
        ask = choose(action.asks) if isinstance(action, Await) else None
        answer = None if ask is None else Answer(ask, answers(ask))


def run(exchange: Exchange[Any], answers: Answers) -> tuple[Any, list[Tell]]:
    """What a round comes to, and what devices were told."""
    outcome, seen = drive(exchange, answers)
    return outcome, [action for action in seen if isinstance(action, Tell)]
