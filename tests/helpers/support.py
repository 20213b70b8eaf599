"""Small data, and devices without sockets or in threads of this process: of what a device has, and no more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from safetensors.numpy import load_file, save_file

from hosl_edge import rounds
from hosl_edge.agent import Summary, run_agent
from hosl_edge.data.datasets import TextBatch
from hosl_edge.model.shard import Shard
from hosl_edge.settings import EdgeSettings
from hosl_protocol.run.manifest import SHARD_WEIGHTS, Manifest, sha256_of_file
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.weights.client_weights import ClientWeights, make_client_weights
from hosl_protocol.weights.state import ClientState, SnapshotHeader
from hosl_protocol.wire.codec import Frame
from hosl_protocol.wire.messages import RoundStart, Snapshot

ROOT = Path(__file__).parents[2]
"""Of the checkout."""

NICE = ("good", "great", "fine", "nice", "happy", "lovely", "warm", "bright", "clever", "fresh")
NASTY = ("bad", "awful", "poor", "sad", "dull", "cold", "weak", "dark", "slow", "stale")
FILLERS = ("the", "a", "film", "story", "plot", "scene", "cast", "song", "end", "start", "but", "quite")
WORDS = (*NICE, *NASTY, *FILLERS, "it", "was", "is", "and", "very")


def write_reviews(path: Path, count: int, offset: int = 0) -> Path:
    """`count` made-up reviews in JSON Lines: the first adjective of each decides its label."""
    rows = []
    for index in range(offset, offset + count):
        label = index % 2
        word = (NICE if label else NASTY)[index // 2 % 10]
        filler = " ".join(FILLERS[index * step % len(FILLERS)] for step in range(1, 2 + index % 7))
        rows.append({"text": f"the {filler} was very {word}", "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def count_right(folder: Path, files: list[Path], *, is_classifier: bool = False) -> tuple[int, int]:
    """Right answers of a merged model to the reviews, with what it has of a soft prompt, and out of how many.

    Of hosl it uses nothing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    tokenizer, model = AutoTokenizer.from_pretrained(folder), auto.from_pretrained(folder)
    if (folder / "prompt").exists():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "prompt")
    model, answers = model.eval(), tokenizer.convert_tokens_to_ids(["bad", "good"])
    examples = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    right = 0
    for example in examples:
        text = example["text"] if is_classifier else f"{example['text']} it was"
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        right += int((logits if is_classifier else logits[-1, answers]).argmax()) == example["label"]
    return right, len(examples)


def run_card(folder: Path) -> dict[str, Any]:
    """Run the code of the folder's card, as somebody does who has it before him; the names that it defines."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile("\n".join(code), str(folder / "README.md"), "exec"), names)
    finally:
        os.chdir(before)
    return names


def count_right_by_card(folder: Path, files: list[Path]) -> tuple[int, int]:
    """Right answers to the reviews by the code of the folder's card, and out of how many."""
    classify = run_card(folder)["classify"]
    examples = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return sum(classify(example) == str(example["label"]) for example in examples), len(examples)


TASK = """
[task]
name = "reviews"
kind = "prompt-classification"
template = "{text} it was"
labels = ["0", "1"]
verbalizers = ["bad", "good"]
"""


def free_port() -> int:
    """A port that nobody listens on now, for a service that is to come back on it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Device:
    """A device without sockets: it takes what a round tells it, and gives what a round asks for."""

    def __init__(
        self, bundle: Path, manifest: Manifest, settings: RunSettings, batch: TextBatch, held_sets: int = 1
    ) -> None:
        self.shard = Shard(bundle, manifest, threads=1)
        self.shard.open(with_gradients=settings.traits.sends_gradient)
        self.shard.rows = 2
        self.shard.max_length = settings.max_length
        self.weights: ClientWeights = make_client_weights(manifest, self.shard.weights, settings)
        self.settings, self.batch, self.held_sets = settings, batch, held_sets
        self._steps: rounds.Step | None = None
        self._sent: deque[Frame] = deque()
        self._replies: deque[Frame] = deque()

    def tell(self, frame: Frame) -> None:
        if isinstance(frame.message, RoundStart):
            context = rounds.DeviceRound(
                run=frame.message.run,
                device="d",
                epoch=frame.message.epoch,
                round=frame.message.round,
                settings=self.settings,
                shard=self.shard,
                weights=self.weights,
                held_sets=self.held_sets,
            )
            self._steps = rounds.PARTS[self.settings.algorithm](context, self.batch)
            self._advance(None)
        else:
            self._replies.append(frame)

    def ask(self, kind: type) -> Frame:
        while not self._sent:
            self._advance(self._replies.popleft())
        frame = self._sent.popleft()
        assert isinstance(frame.message, kind)
        return frame

    def _advance(self, reply: Frame | None) -> None:
        """Run the step until it waits for a reply that is not there yet, or ends."""
        assert self._steps is not None
        try:
            action = self._steps.send(reply)
            while True:
                if isinstance(action, rounds.Send):
                    self._sent.append(Frame(action.message, action.tensors))
                    action = next(self._steps)
                elif self._replies:
                    action = self._steps.send(self._replies.popleft())
                else:
                    return
        except StopIteration:
            pass


class Crew:
    """Agents in threads of this process, each with an event loop of its own."""

    def __init__(self) -> None:
        self._agents: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Summary], threading.Thread]] = []

    def start(self, settings: EdgeSettings) -> Callable[[float], Summary]:
        """Start one; the function waits so many seconds for its end."""
        loop = asyncio.new_event_loop()
        agent = loop.create_task(run_agent(settings))

        def run() -> None:
            with contextlib.suppress(asyncio.CancelledError), contextlib.closing(loop):
                loop.run_until_complete(agent)

        def wait(limit_s: float) -> Summary:
            thread.join(limit_s)
            return agent.result()

        thread = threading.Thread(target=run, name=settings.name)
        thread.start()
        self._agents.append((loop, agent, thread))
        return wait

    def dismiss(self) -> None:
        """Let all of them go."""
        for loop, agent, thread in self._agents:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(agent.cancel)
            thread.join()


def mirror_of(bundle: Path, manifest: Manifest, settings: RunSettings) -> ClientWeights:
    """What a cloud keeps of a device's weights, from the bundle's on."""
    tensors = load_file(bundle / SHARD_WEIGHTS)
    return make_client_weights(manifest, {entry.name: tensors[entry.name] for entry in manifest.trainable}, settings)


def write_snapshot(path: Path, run: str, epoch: int, state: ClientState, manifest: Manifest) -> Snapshot:
    """The state as the file that a cloud serves; what it offers."""
    header = SnapshotHeader(
        run=run,
        epoch=epoch,
        round=state.round,
        weights_digest=state.digest(),
        exponents=dict(state.exponents),
        steps=state.moments.steps if state.moments is not None else None,
    )
    shapes = {entry.name: entry.shape for entry in manifest.trainable}
    tensors = {name: values.reshape(shapes[tensor]) for name, tensor, values in state.arrays()}
    save_file(tensors, path, {"hosl": msgspec.json.encode(header).decode()})
    return Snapshot(round=state.round, size_bytes=path.stat().st_size, sha256=sha256_of_file(path))
