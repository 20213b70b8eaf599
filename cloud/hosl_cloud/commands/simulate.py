"""`hosl-cloud simulate`: a whole fleet of virtual devices in this process."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hosl_cloud.commands.run_settings import add_run_settings, load_run_settings
from hosl_cloud.storage.data_folder import add_data_dir, hint
from hosl_cloud.storage.run_names import short_name
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.program.terminal import add_common_options, run_until_interrupted
from hosl_protocol.run.manifest import load_manifest

if TYPE_CHECKING:
    from hosl_cloud.commands.display import RunsDisplay
    from hosl_cloud.runs.run import Ending, Run

_say = logging.getLogger("hosl-cloud").info


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """Options of `hosl-cloud simulate`."""
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="what hosl-export wrote")
    add_run_settings(parser)
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

    parser.add_argument("--threads", type=int, default=0, metavar="N", help="compute threads of the devices (0: all)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write a table, one row a round")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    add_data_dir(parser)
    add_common_options(parser)
    parser.set_defaults(command=_simulate)


def _simulate(options: argparse.Namespace) -> int:
    # OpenMP threads that spin while they wait take the cores from the devices' forwards.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hosl_cloud.commands.display import RunsDisplay  # needs rich, which the device does without

    display = RunsDisplay()
    with contextlib.ExitStack() as leaving:
        with display.drawn(shares_stdout=not options.json):
            run, ending = _train(options, display, leaving)
        _tell_end(options, run, ending)
    return int(ExitCode.OK)


def _train(options: argparse.Namespace, display: RunsDisplay, leaving: contextlib.ExitStack) -> tuple[Run, Ending]:
    """Train the run that the options describe to its end; `leaving` closes it."""
    from hosl_cloud.simulation.baselines import prepare_config
    from hosl_cloud.simulation.opening import new_simulated_run
    from hosl_cloud.simulation.partition import Partition
    from hosl_cloud.simulation.virtual_devices import check_fleet, simulate

    manifest, partition = load_manifest(options.bundle), Partition.parse(options.partition)
    more = [f"devices.start_with={options.devices}", f"devices.per_round={options.per_round}"]
    more += [f"baseline={options.baseline}"] if options.baseline else []
    config = prepare_config(load_run_settings(options, manifest, more))
    check_fleet(config)

    if options.csv is not None:
        options.csv.open("a").close()  # a path that cannot be written is an error now, and not after the run

    threads = options.threads or len(os.sched_getaffinity(0))
    run = leaving.enter_context(new_simulated_run(options.data_dir, options.bundle, manifest, config))
    run.listeners.append(display.hear)
    say = _say if not options.json else lambda sentence: None
    work = simulate(run, options.data, options.eval, partition, threads, say, skip_broken=options.skip_broken)
    return run, run_until_interrupted(work)


def _tell_end(options: argparse.Namespace, run: Run, ending: Ending) -> None:
    from hosl_cloud.simulation.results import summarize, write_csv

    if options.csv is not None:
        write_csv(run.store, run.id, options.csv)
    if options.json:
        print(json.dumps(summarize(run.store, run.id)))
        return
    sentence = f"run {run.id} {ending} at round {run.round}"
    if run.config.baseline != "first-order":
        name = short_name(run.id, run.store.run_ids())
        sentence += f"; take it with: {hint(f'merge {name} --out trained', options.data_dir)}"
    else:
        sentence += "; it cannot be merged: with --baseline first-order the devices' half is gone with this process"
    _say(sentence, extra={"is_result": True})
