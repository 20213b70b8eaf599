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
    from collections.abc import Sequence
    from pathlib import Path

    from hosl_cloud.commands.bundles import add_bundle
    from hosl_cloud.commands.checkpoints import add_cache, add_checkpoint
    from hosl_cloud.commands.config import add_config
    from hosl_cloud.commands.devices import add_device, add_init
    from hosl_cloud.commands.help import EXAMPLES, RARE
    from hosl_cloud.commands.results.merge import add_merge
    from hosl_cloud.commands.results.try_run import add_try
    from hosl_cloud.commands.runs import add_drain, add_log, add_run
    from hosl_cloud.commands.serve import add_serve
    from hosl_cloud.commands.simulate import add_simulate
    from hosl_cloud.storage.data_folder import settle_data_dir
    from hosl_protocol.exceptions import ExitCode
    from hosl_protocol.program.arguments import Parser
    from hosl_protocol.program.completion import add_completion
    from hosl_protocol.program.terminal import add_common_options, add_version, print_unit, run_command
except KeyboardInterrupt:  # while all of this loads there is nothing to tell
    sys.exit(130)


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
    add_completion(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_init(commands.add_parser("init", help="make a CA, a certificate and an admin token"))
    add_serve(commands.add_parser("serve", help="run the service"))
    add_config(commands.add_parser("config", help="print an example of a run.toml, or check one"))
    add_bundle(commands.add_parser("bundle", help="keep the bundles that runs are begun with"))
    add_device(commands.add_parser("device", help="make, list and revoke devices' tokens"))
    add_run(commands.add_parser("run", help="start, show, stop, resume and delete runs"))
    add_log(commands.add_parser("log", help="show what was said about a run"))
    add_checkpoint(commands.add_parser("checkpoint", help="show and copy a run's checkpoints"))
    add_cache(commands.add_parser("cache", help="show and delete kept activations of frozen runs"))
    add_drain(commands.add_parser("drain", help="let a service pause its runs and leave"))
    add_merge(commands.add_parser("merge", help="join a run's halves into a model: a folder, GGUF or ONNX"))
    add_try(commands.add_parser("try", help="let a run's trained model answer texts, or name their classes"))
    add_simulate(commands.add_parser("simulate", help="run a whole fleet of virtual devices in this process"))
    unit = commands.add_parser("unit", help="print the systemd unit")
    add_common_options(unit)
    unit.set_defaults(command=_unit)
    parser.explain(EXAMPLES, RARE)
    return parser


def _unit(options: argparse.Namespace) -> int:
    print_unit(Path(__file__).with_name("hosl-cloud.service"))
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
