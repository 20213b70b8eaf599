"""`hosl-cloud`: the trainer service.

hosl-cloud init --name cloud.example.org
hosl-cloud serve --bundle bundle/ --config run.toml
hosl-cloud device add NAME
hosl-cloud run list
hosl-cloud merge RUN --out trained/
hosl-cloud simulate --bundle bundle/ --config run.toml --data train.jsonl --devices 100 --per-round 10
"""

from __future__ import annotations

import sys

try:
    import argparse
    import asyncio
    import dataclasses
    import json
    import logging
    import os
    from collections.abc import Sequence
    from pathlib import Path
    from typing import TYPE_CHECKING

    from hosl_cloud.commands.devices import add_device, add_init
    from hosl_cloud.commands.runs import add_checkpoint, add_drain, add_log, add_run
    from hosl_cloud.commands.serve import add_serve
    from hosl_cloud.sentences import score_text
    from hosl_cloud.settings import load_config
    from hosl_cloud.storage.data_folder import (
        DATABASE,
        add_data_dir,
        hint,
        lock,
        make_data_dir,
        new_run_id,
        run_folder,
        settle_data_dir,
    )
    from hosl_cloud.storage.store import Store
    from hosl_protocol.exceptions import ExitCode, SettingsError
    from hosl_protocol.program.arguments import Parser
    from hosl_protocol.program.terminal import add_common_options, add_version, print_unit, run_command
    from hosl_protocol.run.manifest import BundleError, check_files, load_manifest
except KeyboardInterrupt:  # while all of this loads there is nothing to tell
    sys.exit(130)

if TYPE_CHECKING:
    from hosl_cloud.storage.records import Evaluation
    from hosl_cloud.tail.checkpoint import CheckpointInfo

log = logging.getLogger(__name__)
_say = logging.getLogger("hosl-cloud").info


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    return run_command(_parser(), _run, arguments)


def _run(options: argparse.Namespace) -> int:
    settle_data_dir(options)
    code: int = options.command(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hosl-cloud", description="Train the later layers of a model with devices that hold the first ones."
    )
    add_version(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_init(commands.add_parser("init", help="make a CA, a certificate and an admin token"))
    add_serve(commands.add_parser("serve", help="run the service"))
    add_device(commands.add_parser("device", help="make, list and revoke devices' tokens"))
    add_run(commands.add_parser("run", help="start, show, stop, resume and delete runs"))
    add_log(commands.add_parser("log", help="show what was said about a run"))
    add_checkpoint(commands.add_parser("checkpoint", help="show and copy a run's checkpoints"))
    add_drain(commands.add_parser("drain", help="let a service pause its runs and leave"))
    _add_merge(commands.add_parser("merge", help="join a run's halves into a Hugging Face model"))
    _add_simulate(commands.add_parser("simulate", help="run a whole fleet of virtual devices in this process"))
    unit = commands.add_parser("unit", help="print the systemd unit")
    add_common_options(unit)
    unit.set_defaults(command=_unit)
    return parser


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's id, as serve prints it")
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


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="what hosl-export wrote")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the run's settings, run.toml")
    parser.add_argument("--task", metavar="PRESET", help="a shipped task, where --config names none")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="training data, dealt out to devices")
    parser.add_argument("--eval", type=Path, metavar="FILE", help="held-out data")
    parser.add_argument("--skip-broken", action="store_true", help="leave out pictures that cannot be decoded")
    parser.add_argument("--devices", type=int, default=10, metavar="M", help="virtual devices (default: %(default)s)")
    parser.add_argument("--per-round", type=int, default=0, metavar="K", help="devices sampled each round (0: all)")
    parser.add_argument(
        "--partition", default="iid", metavar="HOW", help="iid, or dirichlet:ALPHA (default: %(default)s)"
    )
    parser.add_argument(
        "--baseline", choices=("first-order", "zeroth-order"), help="train both halves so, instead of the algorithm"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="a setting over --config's"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="compute threads of the devices (0: all)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write a table, one row a round")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    add_data_dir(parser)
    add_common_options(parser)
    parser.set_defaults(command=_simulate)


def _merge(options: argparse.Namespace) -> int:
    from hosl_cloud.storage.mirror import replay_client
    from hosl_cloud.tail.card import CARD
    from hosl_cloud.tail.checkpoint import find_checkpoint
    from hosl_cloud.tail.merge import PROMPT_FOLDER, merge_run

    database = options.data_dir / DATABASE
    if not database.exists():
        raise SettingsError("--data-dir", str(options.data_dir), "no service has run there")
    store = Store(database)
    try:
        stored = store.run(options.run)
        run = dataclasses.replace(stored, settings=stored.settings.for_merge(stored.id))
        if stored.settings.problem:
            log.warning("run %s: %s; it is merged without", run.id, stored.settings.problem)
        if run.config.baseline == "first-order":
            raise SettingsError(
                "RUN", run.id, "its client half was trained first-order, and is gone with the simulation"
            )
        bundle = options.bundle or run.bundle
        manifest = load_manifest(bundle)
        if manifest.shard_digest != run.shard_digest:
            raise BundleError(f"{bundle} is not the bundle of run {run.id}: name the right one with --bundle")
        check_files(bundle, manifest)
        checkpoint = find_checkpoint(run_folder(options.data_dir, run.id), options.checkpoint)
        client = replay_client(store, run, bundle, manifest, checkpoint.info.round)
        before = next((each for each in store.evaluations(run.id) if each.round == 0), None)
    finally:
        store.close()
    merged = merge_run(bundle, manifest, client, checkpoint.path, options.out, options.adapter, run.id)
    prompt = options.out / PROMPT_FOLDER if manifest.prompt_tokens else None
    if options.json:
        facts = {"run": run.id, "round": merged.info.round, "out": str(options.out)}
        print(json.dumps(facts if prompt is None else {**facts, "prompt": str(prompt)}))
        return int(ExitCode.OK)
    is_unscored = options.checkpoint == "best" and merged.info.metrics is None
    which = "newest checkpoint; none was evaluated" if is_unscored else f"{options.checkpoint} checkpoint"
    print(f"run {run.id} at round {merged.info.round} ({which}) is in {options.out}")
    print(f"{options.out / CARD} shows how to use it")
    if harm := _harm(before, merged.info):
        print(harm)
    if merged.untied_bytes:
        size = f"{merged.untied_bytes / 1e6:.0f} MB more than tied"
        print(f"its head and its embedding were one tensor and are two, {size}: the two sides trained them apart")
    if prompt is not None:
        print(f"its soft prompt is a PEFT adapter: PeftModel.from_pretrained(model, '{prompt}')")
    return int(ExitCode.OK)


def _harm(before: Evaluation | None, info: CheckpointInfo) -> str:
    """A sentence where the same held-out data scored more before the first round; else empty."""
    from hosl_cloud.runs.keeper import metrics_of
    from hosl_cloud.tail.checkpoint import comparable_of, rank

    if before is None or info.metrics is None:
        return ""
    scores = [(0, metrics_of(before)), (info.round, info.metrics)]
    kind = info.config.task.kind
    if len(comparable_of(scores)) < 2 or rank(info.metrics, kind) >= rank(scores[0][1], kind):
        return ""
    was, is_ = (
        f"{score_text(each.correct, each.scored, each.examples, each.of_examples)}, loss {each.loss:.4f}"
        for _, each in scores
    )
    return f"on the held-out data training made it worse: {was} before the first round, {is_} now"


def _unit(options: argparse.Namespace) -> int:
    print_unit(Path(__file__).with_name("hosl-cloud.service"))
    return int(ExitCode.OK)


def _simulate(options: argparse.Namespace) -> int:
    # OpenMP threads that spin while they wait take the cores from the devices' forwards.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hosl_cloud.runs.run import Run
    from hosl_cloud.simulation.baselines import prepare_config
    from hosl_cloud.simulation.fleet import check_fleet, simulate
    from hosl_cloud.simulation.partition import Partition
    from hosl_cloud.simulation.results import summarize, write_csv

    manifest, partition = load_manifest(options.bundle), Partition.parse(options.partition)
    task = [f"task.preset={options.task}"] if options.task else []
    fleet = [f"devices.start_with={options.devices}", f"devices.per_round={options.per_round}"]
    baseline = [f"baseline={options.baseline}"] if options.baseline else []
    config = prepare_config(load_config(options.config, manifest, [*task, *fleet, *baseline, *options.overrides]))
    check_fleet(config)
    if options.csv is not None:
        options.csv.open("a").close()  # a path that cannot be written is an error now, and not after the run
    make_data_dir(options.data_dir)
    check_files(options.bundle, manifest)
    threads = options.threads or len(os.sched_getaffinity(0))
    locked, store = lock(options.data_dir), Store(options.data_dir / DATABASE)
    try:
        id_, bundle = new_run_id(config.name, store), options.bundle.resolve()
        run = Run(id_, config, manifest, bundle, run_folder(options.data_dir, id_), store)
        store.create_run(id_, bundle, manifest.shard_digest, config, "simulate")
        say = _say if not options.json else lambda sentence: None
        ending = asyncio.run(
            simulate(run, options.data, options.eval, partition, threads, say, skip_broken=options.skip_broken)
        )
        if options.csv is not None:
            write_csv(store, id_, options.csv)
        if options.json:
            print(json.dumps(summarize(store, id_)))
        sentence = f"run {id_} {ending} at round {run.round}"
        if config.baseline != "first-order":  # whose client half is gone with this process
            sentence += f"; take it with: {hint(f'merge {id_} --out DIR', options.data_dir)}"
        say(sentence)
    finally:
        store.close()
        locked.close()
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
