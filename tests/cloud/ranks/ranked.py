"""What several ranks compute against what one process does: ranked.py JOB, with the launcher's WORLD_SIZE and MASTER_*.

Rank 0 does both and writes the figures, which test_ranks.py judges, to the job's `out` as JSON.
"""

from __future__ import annotations

import atexit
import importlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from hosl_cloud.ranks.follower import follow
from hosl_cloud.ranks.group import Group
from hosl_cloud.ranks.leader import GroupTrainer
from hosl_cloud.rounds.exchange import BatchArrays
from hosl_cloud.settings import RunConfig, parse_config
from hosl_cloud.tail.checkpoint import load_checkpoint, save_checkpoint
from hosl_cloud.tail.trainer import TailTrainer
from hosl_protocol.exceptions import HoslError
from hosl_protocol.run.manifest import Manifest, load_manifest

LENGTHS = ((3, 7, 1, 5), (9, 2), (4, 4, 4), (11,), (1, 1, 6))
"""Of the batches of an uneven number of devices, without a soft prompt."""


def make_batches(config: RunConfig, manifest: Manifest, round_: int) -> list[BatchArrays]:
    """What the devices of a round send."""
    random = np.random.default_rng(round_)
    texts = [[manifest.prompt_tokens + length for length in lengths] for lengths in LENGTHS]
    return [make_batch(config, random, lengths, manifest.width) for lengths in texts]


def make_batch(config: RunConfig, random: np.random.Generator, lengths: Sequence[int], width: int) -> BatchArrays:
    tokens = sum(lengths)
    labels = random.integers(4, 40, tokens) if config.task.kind == "lm" else random.integers(0, 2, len(lengths))
    activations = random.standard_normal((tokens, width), np.float32)
    return activations, np.array(lengths, np.int32), labels.astype(np.int32)


def relative(got: Any, expected: Any) -> float:
    """Length of the difference, in lengths of what is expected."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / (np.linalg.norm(expected) or 1.0))


class Pair:
    """The same run on all ranks and in this process alone."""

    def __init__(self, group: Group, bundle: Path, data: dict[str, Any], many: dict[str, Any], folder: Path) -> None:
        self.manifest: Manifest = load_manifest(bundle)
        self.config = parse_config(data, self.manifest)
        config = msgspec.structs.replace(self.config, tail=msgspec.structs.replace(self.config.tail, **many))
        self.one = TailTrainer(bundle, self.manifest, self.config)
        self.all = GroupTrainer(group, bundle, self.manifest, config)
        self.folder = folder
        self.worst: dict[str, float] = {}

    def note(self, **figures: float) -> None:
        for name, figure in figures.items():
            self.worst[name] = max(self.worst.get(name, 0.0), figure if math.isfinite(figure) else 1e9)

    def round(self, round_: int) -> None:
        """One round of both, with λ for every device."""
        batches = make_batches(self.config, self.manifest, round_)
        weights = [float(len(batch[1])) for batch in batches]
        expected = self.one.forward_backward_many(batches, weights, wants_cut_gradient=True)
        got = self.all.forward_backward_many(batches, weights, wants_cut_gradient=True)
        for mine, theirs in zip(got, expected, strict=True):
            assert (mine.correct, mine.scored) == (theirs.correct, theirs.scored)
            self.note(loss=relative(mine.loss, theirs.loss), cut=relative(mine.cut_gradient_TD, theirs.cut_gradient_TD))
        norms = [each.step(round_, sum(weights)).gradient_norm for each in (self.all, self.one)]
        self.note(norm=relative(*norms))

    def compare(self) -> None:
        """Each tensor of the weights, and the moments as a whole, some of which are nothing but rounding."""
        moments: list[tuple[Any, Any]] = []
        for (name, expected), got in zip(self.one.state().items(), self.all.gather(), strict=True):
            if name.startswith("weights/"):
                self.note(weights=relative(got, expected))
            else:
                moments.append((got.flatten(), expected.flatten()))
        if moments:
            self.note(optimizer=relative(*map(torch.cat, zip(*moments, strict=True))))

    def evaluate(self) -> None:
        batches = make_batches(self.config, self.manifest, 99)
        for got, expected in zip(self.all.evaluate_many(batches), self.one.evaluate_many(batches), strict=True):
            self.note(evaluation=relative(got.loss, expected.loss))
            assert (got.predicted_B is None) == (self.config.task.kind == "lm")
            if self.config.tail.precision == "float32":  # else a tie may fall the other way
                np.testing.assert_array_equal(got.predicted_B, expected.predicted_B)

    def spoil(self) -> None:
        """A batch that contradicts itself and one that is not finite leave the others as they are."""
        batches = make_batches(self.config, self.manifest, 98)
        bad = batches[:]
        bad[1] = (np.full_like(bad[1][0], np.inf), *bad[1][1:])
        bad[3] = (bad[3][0], bad[3][1] + np.int32(1), bad[3][2])
        got = self.all.forward_backward_many(bad, [1.0] * 5, wants_cut_gradient=False)
        assert [type(each).__name__ for each in got] == [
            *("StepResult", "NotFiniteError", "StepResult", "BatchError", "StepResult")
        ], got
        rest = [batches[place] for place in (0, 2, 4)]
        self.one.forward_backward_many(rest, [1.0] * 3, wants_cut_gradient=False)
        self.all.step(55, 3.0)
        self.one.step(55, 3.0)
        self.compare()

    def checkpoints(self) -> None:
        """Written by all and read by one, and the reverse; then both go on."""
        for number, (writer, reader) in enumerate(((self.all, self.one), (self.one, self.all))):
            save_checkpoint(self.folder, number, 0, writer, self.config)
            path = self.folder / f"epoch-0000-round-{number:06}.safetensors"
            load_checkpoint(path, reader)
            self.round(50 + number)
        self.compare()

    def diverge(self) -> None:
        """A tail whose weights are not numbers: every batch is left out, and nothing hangs."""
        state = {name: torch.full_like(tensor, math.nan) for name, tensor in self.one.state().items()}
        self.all.load_state(state)
        batches = make_batches(self.config, self.manifest, 97)
        got = self.all.forward_backward_many(batches, [1.0] * 5, wants_cut_gradient=True)
        assert [type(each).__name__ for each in got] == ["NotFiniteError"] * 5
        self.all.discard()


def work(group: Group, job: dict[str, Any]) -> dict[str, Any]:
    """All pairs of the job."""
    figures = {}
    for name, (bundle, data, many) in job["pairs"].items():
        pair = Pair(group, Path(bundle), data, many, Path(job["out"]).parent / name)
        for round_ in (1, 2):
            pair.round(round_)
        pair.compare()
        pair.evaluate()
        pair.checkpoints()
        pair.spoil()
        pair.diverge()
        pair.all.close()
        figures[name] = pair.worst
    figures["refusals"] = refusals(group, pair, Path(bundle))
    return figures


def refusals(group: Group, pair: Pair, bundle: Path) -> list[str]:
    """Why tails could not be loaded."""
    found = []
    wrong = msgspec.structs.replace(pair.manifest, model="another")
    warp = msgspec.structs.replace(pair.config, tail=msgspec.structs.replace(pair.config.tail, device="warp"))
    for manifest, config in ((wrong, pair.config), (pair.manifest, warp)):
        try:
            GroupTrainer(group, bundle, manifest, config)
        except HoslError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def count_threads(file: Path) -> None:
    """Write how many threads of gloo are left."""
    names = [each.read_text().strip() for each in Path("/proc/self/task").glob("*/comm")]
    file.write_text(str(names.count("pt_gloo_runloop")), encoding="utf-8")


def be_rank(rank: int, job: dict[str, Any]) -> None:
    """What one of the ranks does."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    atexit.register(count_threads, Path(job["out"]).with_name(f"left-{rank}"))  # after all that is registered later
    group = Group(60.0)
    if rank:
        sys.exit(follow(group))
    try:
        Path(job["out"]).write_text(json.dumps(work(group, job)), encoding="utf-8")
    finally:
        group.shut_down()


def main() -> None:
    """Fork the ranks, which saves them the imports; each ends as an interpreter does."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for module in job["modules"]:
        importlib.import_module(module)
    ranks = []
    for rank in range(int(os.environ["WORLD_SIZE"])):
        if not (process := os.fork()):
            return be_rank(rank, job)
        ranks.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]
    return sys.exit(f"ranks ended with {codes}" if any(codes) else 0)


if __name__ == "__main__":
    main()
