"""`hosl-cloud merge`: a run's two halves become a Hugging Face model."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
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
    from hosl_cloud.tail.merge import Targets
    from hosl_cloud.tail.stored_merge import MergedRun


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Options of `hosl-cloud merge`."""
    parser.add_argument("run", metavar="RUN", help="its id, a beginning of it that no other run has, or latest")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder that transformers loads; must not exist")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="write a PEFT adapter (LoRA on both halves)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="write a file for llama.cpp")
    parser.add_argument(
        "--type", choices=("f16", "q8_0"), default="f16", help="of the matrices in the file of --gguf (default: f16)"
    )
    parser.add_argument("--onnx", type=Path, metavar="DIR", help="write a folder for ONNX Runtime")
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

    if not any((options.out, options.adapter, options.gguf, options.onnx)):
        raise SettingsError("--out", None, "name what to write: --out DIR, --adapter DIR, --gguf FILE or --onnx DIR")
    database = options.data_dir / DATABASE
    if not database.exists():
        raise SettingsError("--data-dir", str(options.data_dir), "no service has run there")
    steps = Steps("hosl-cloud", keeps_lines=False)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(Store(database, reads_only=True)))
        id_ = find_run_id(options.run, store.run_ids())
        if options.out is None:
            out = Path(stack.enter_context(_beside(options.adapter or options.gguf or options.onnx))) / id_
        else:
            out = options.out
        with steps.shown(), steps(f"merging {id_}"):
            found = merge_with_hint(store, id_, _targets(out, options), options)

    _tell_json(found, options) if options.json else _tell(found, options)
    return int(ExitCode.OK)


def _targets(out: Path, options: argparse.Namespace) -> Targets:
    from hosl_cloud.tail.merge import Targets

    return Targets(out=out, adapter=options.adapter, gguf=options.gguf, gguf_type=options.type, onnx=options.onnx)


def _beside(path: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder for what nobody asked to keep, on the disk that is written to anyway."""
    from hosl_export.bundle.staging import nearest_folder

    return tempfile.TemporaryDirectory(prefix=".merge.", dir=nearest_folder(path))


def _tell_json(found: MergedRun, options: argparse.Namespace) -> None:
    facts = {"run": found.run, "round": found.merged.info.round}
    paths = {name: getattr(options, name) for name in ("out", "adapter", "gguf", "onnx")}
    facts |= {name: str(path) for name, path in paths.items() if path is not None}
    if found.prompt is not None and options.out is not None:
        facts["prompt"] = str(found.prompt)
    print(json.dumps(facts))


def _tell(found: MergedRun, options: argparse.Namespace) -> None:
    from hosl_cloud.tail.card import CARD

    merged, prompt, out = found.merged, found.prompt, options.out
    is_unscored = options.checkpoint == "best" and merged.info.metrics is None
    which = "newest checkpoint; none was evaluated" if is_unscored else f"{options.checkpoint} checkpoint"
    where = out or options.adapter or options.gguf or options.onnx
    print(f"run {found.run} at round {merged.info.round} ({which}) is in {where}")
    if out is not None:
        print(f"{out / CARD} shows how to use it")
    if harm := _harm(found.before, merged.info):
        print(harm)
    if merged.untied_bytes:
        size = f"{merged.untied_bytes / 1e6:.0f} MB more than tied"
        print(f"its head and its embedding were one tensor and are two, {size}: the two sides trained them apart")
    if prompt is not None and out is not None:
        print(f"its soft prompt is a PEFT adapter: PeftModel.from_pretrained(model, '{prompt}')")
    if merged.gguf is not None:
        from hosl_export.formats.gguf_file import show_gguf

        print(*show_gguf(options.gguf, merged.gguf), sep="\n")
    if merged.onnx is not None:
        from hosl_export.formats.onnx_model import show_onnx

        print(show_onnx(options.onnx, merged.onnx))


def merge_with_hint(store: Store, id_: str, targets: Targets, options: argparse.Namespace) -> MergedRun:
    """Merge the run; where it ended before it had a checkpoint, say how it goes on."""
    from hosl_cloud.tail.stored_merge import merge_stored

    try:
        folder = run_folder(options.data_dir, id_)
        return merge_stored(store, id_, folder, targets, which=options.checkpoint, bundle=options.bundle)
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
