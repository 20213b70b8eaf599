"""`hosl-cloud merge`: a run's two halves become a Hugging Face model."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from hosl_cloud.exceptions import CheckpointMissing
from hosl_cloud.sentences import score_text
from hosl_cloud.storage.data_folder import DATABASE, add_data_dir, hint, run_folder
from hosl_cloud.storage.run_names import find_run_id, short_name
from hosl_cloud.storage.store import Store
from hosl_protocol.exceptions import ExitCode, SettingsError
from hosl_protocol.program.terminal import add_common_options

if TYPE_CHECKING:
    from hosl_cloud.storage.records import Evaluation
    from hosl_cloud.tail.checkpoint import CheckpointInfo
    from hosl_cloud.tail.stored_merge import MergedRun


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Options of `hosl-cloud merge`."""
    parser.add_argument("run", metavar="RUN", help="its id, a beginning of it that no other run has, or latest")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="also write a PEFT adapter (LoRA on both halves)")
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="by evaluation, or the newest (default: best)"
    )
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="the bundle, if it has moved since the run")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    add_data_dir(parser)
    add_common_options(parser)
    parser.set_defaults(command=_merge)


def _merge(options: argparse.Namespace) -> int:
    from hosl_export.steps import Steps  # needs rich, which the device does without

    database = options.data_dir / DATABASE
    if not database.exists():
        raise SettingsError("--data-dir", str(options.data_dir), "no service has run there")
    steps = Steps("hosl-cloud", keeps_lines=False)
    with contextlib.closing(Store(database, reads_only=True)) as store:
        id_ = find_run_id(options.run, store.run_ids())
        with steps.shown(), steps(f"merging {id_}"):
            found = _merge_stored(store, id_, options)

    from hosl_cloud.tail.card import CARD

    merged, prompt = found.merged, found.prompt
    if options.json:
        facts = {"run": id_, "round": merged.info.round, "out": str(options.out)}
        print(json.dumps(facts if prompt is None else {**facts, "prompt": str(prompt)}))
        return int(ExitCode.OK)

    is_unscored = options.checkpoint == "best" and merged.info.metrics is None
    which = "newest checkpoint; none was evaluated" if is_unscored else f"{options.checkpoint} checkpoint"
    print(f"run {id_} at round {merged.info.round} ({which}) is in {options.out}")
    print(f"{options.out / CARD} shows how to use it")
    if harm := _harm(found.before, merged.info):
        print(harm)
    if merged.untied_bytes:
        size = f"{merged.untied_bytes / 1e6:.0f} MB more than tied"
        print(f"its head and its embedding were one tensor and are two, {size}: the two sides trained them apart")
    if prompt is not None:
        print(f"its soft prompt is a PEFT adapter: PeftModel.from_pretrained(model, '{prompt}')")
    return int(ExitCode.OK)


def _merge_stored(store: Store, id_: str, options: argparse.Namespace) -> MergedRun:
    """Merge the run; where it ended before it had a checkpoint, say how it goes on."""
    from hosl_cloud.tail.stored_merge import merge_stored

    try:
        return merge_stored(
            store,
            id_,
            run_folder(options.data_dir, id_),
            options.out,
            adapter=options.adapter,
            which=options.checkpoint,
            bundle=options.bundle,
        )
    except CheckpointMissing as error:
        row = store.run(id_)
        if row.state not in ("stopped", "failed"):
            raise
        resume = hint(f"run resume {short_name(id_, store.run_ids())}", options.data_dir)
        reason = f"the run {row.state} at round {row.round}, before its first one; go on with it: {resume}"
        raise CheckpointMissing(error.path, reason) from None


def _harm(before: Evaluation | None, info: CheckpointInfo) -> str:
    """Say where the same held-out data scored more before the first round; else empty."""
    from hosl_cloud.runs.checkpointer import score_of
    from hosl_cloud.tail.checkpoint import comparable_scores, score_key

    if before is None or info.metrics is None:
        return ""
    scores = [(0, score_of(before)), (info.round, info.metrics)]
    kind = info.config.task.kind
    if len(comparable_scores(scores)) < 2 or score_key(info.metrics, kind) >= score_key(scores[0][1], kind):
        return ""
    was, is_ = (
        f"{score_text(each.correct, each.scored, each.examples, each.of_examples)}, loss {each.loss:.4f}"
        for _, each in scores
    )
    return f"on the held-out data training made it worse: {was} before the first round, {is_} now"
