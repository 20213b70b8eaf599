"""Several gloo ranks compute what one process does, and their checkpoints are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hosl_cloud.ranks.leader import spread
from support import free_port

SCRIPT = Path(__file__).with_name("ranked.py")
PROMPTS, CLASSES, TEXT = "prompt-classification", "sequence-classification", "lm"
ADAMW = {"train": "full", "optimizer": "adamw", "learning_rate": 1e-3, "clip_norm": 0.5, "device": "cpu"}
SGD = {"train": "full", "optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9, "clip_norm": 0.0, "device": "cpu"}
"""Where a gradient is 0 but for rounding, as that of a key's bias, AdamW would make steps of it."""
LORA = {**SGD, "train": "lora"}
SPLIT = {"micro_batch_tokens": 8, "activation_checkpointing": True}

PAIRS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "shard": ("llama", PROMPTS, ADAMW, {"ranks": "shard"}),
    "replicate": ("opt", PROMPTS, SGD, {"ranks": "replicate"}),
    "shard, LoRA, text": ("gpt2", TEXT, LORA, {"ranks": "shard"}),
    "shard, soft prompt": ("llama", TEXT, SGD, {"ranks": "shard"}),
    "shard, split": ("opt", TEXT, SGD, {"ranks": "shard", **SPLIT}),
    "replicate, split": ("bert", CLASSES, LORA, {"ranks": "replicate", **SPLIT}),
    "shard, classes": ("bert", CLASSES, SGD, {"ranks": "shard"}),
    "shard, bfloat16": ("opt", PROMPTS, {**SGD, "precision": "bfloat16"}, {"ranks": "shard"}),
}
"""Architecture, task, settings of the tail, and those that only the run on many ranks has."""


@pytest.fixture(scope="module")
def figures(make_bundle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The largest relative differences of each pair, on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    job, out = folder / "job.json", folder / "figures.json"
    pairs = {}
    for name, (family, kind, tail, many) in PAIRS.items():
        bundle = make_bundle(family, "prompt" if "prompt" in name else "lora")
        pairs[name] = (str(bundle.path), {**bundle.settings(kind), "rounds": 60, "tail": tail}, many)
    families = sorted({family for family, *_ in PAIRS.values()})
    modules = [f"transformers.models.{family}.modeling_{family}" for family in families]
    job.write_text(json.dumps({"out": str(out), "pairs": pairs, "modules": modules}))
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = subprocess.run(
        [sys.executable, str(SCRIPT), str(job)],
        env={**os.environ, **meeting, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    left = [folder.joinpath(f"left-{rank}").read_text(encoding="utf-8") for rank in range(2)]
    return {**json.loads(out.read_text(encoding="utf-8")), "left": left}


@pytest.mark.parametrize("pair", PAIRS)
def test_ranks_compute_what_one_process_does(figures: dict[str, Any], pair: str) -> None:
    worst = figures[pair]
    assert worst.keys() == {"loss", "cut", "norm", "weights", "optimizer", "evaluation"}
    assert max(worst.values()) < (1e-2 if "bfloat16" in pair else 1e-5), worst


def test_a_tail_that_a_rank_cannot_load_is_refused_on_all(figures: dict[str, Any]) -> None:
    wrong, warp = figures["refusals"]
    assert wrong.startswith("RankLoadError: rank 1: ")
    assert "is another bundle than rank 0 has at this path: copy that one here" in wrong
    assert warp.startswith("SettingsError: tail.device is 'warp'")


def test_threads_of_gloo_have_ended_before_the_interpreter_does(figures: dict[str, Any]) -> None:
    assert figures["left"] == ["0", "0"]  # one that is busy as the interpreter ends aborts the process


def test_batches_go_to_the_rank_with_the_fewest_tokens() -> None:
    assert spread([5, 9, 4, 6, 2], 2, is_in_step=False) == [[1, 2], [3, 0, 4]]
    assert spread([10, 3, 3, 3], 2, is_in_step=False) == [[0], [1, 2, 3]]
    assert spread([7], 3, is_in_step=False) == [[0], [], []]


def test_ranks_in_step_get_as_many_batches_and_those_of_like_length_meet() -> None:
    assert spread([10, 3, 3, 3], 2, is_in_step=True) == [[0, 3], [1, 2]]
    assert spread([1, 9, 2, 8, 3], 2, is_in_step=True) == [[1, 2, 0], [3, 4]]
