"""`hosl-export --model M --split K --out DIR`: cut a Hugging Face model into a bundle for a device and a trainer."""

from __future__ import annotations

import sys

try:
    import argparse
    import os
    from collections.abc import Sequence
    from pathlib import Path
    from typing import TYPE_CHECKING, get_args

    import msgspec

    from hosl_protocol.exceptions import ExitCode, SettingsError
    from hosl_protocol.program.arguments import Parser
    from hosl_protocol.program.completion import add_completion
    from hosl_protocol.program.terminal import add_common_options, add_version, run_command, terminable
    from hosl_protocol.run.manifest import TrainMode
except KeyboardInterrupt:  # while all of this loads there is nothing to tell
    sys.exit(130)

if TYPE_CHECKING:
    from hosl_export.steps import Steps
    from hosl_export.summary import Summary

EXAMPLE = "hosl-export --model facebook/opt-125m --split 6 --out bundle/"
RARE = {
    *("--lora-rank", "--lora-alpha", "--lora-targets", "--prompt-tokens", "--image-size", "--revision", "--seed"),
    *("--completion", "--no-gradients", "--debug", "--log-level", "--log-format"),
}
"""Options that few people need, and `--help-all` has."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    with terminable():
        return run_command(_parser(), _export, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="hosl-export", description="Cut a model in two: a shard for devices, a tail for the service.")
    parser.add_argument("--model", required=True, metavar="M", help="hub id, local folder, or .gguf file")
    parser.add_argument("--split", type=int, metavar="K", help="blocks on the device, the rest on the cloud")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the bundle's folder; must not exist")
    parser.add_argument(
        "--inspect", action="store_true", help="write nothing: show where to cut, and what each cut costs the device"
    )
    parser.add_argument(
        "--train",
        default="norm",
        choices=get_args(TrainMode),
        help="what the device trains: nothing, adapters, only their B, norms and biases, a soft prompt, whole "
        "blocks, or embeddings too (default: %(default)s)",
    )
    parser.add_argument("--train-blocks", type=int, metavar="N", help="train only the first N blocks; -N: the last N")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="vectors of a soft prompt (default: 8)")
    parser.add_argument("--lora-rank", type=int, metavar="R", help="rank of adapters (default: 8)")
    parser.add_argument("--lora-alpha", type=int, metavar="A", help="they are scaled by A / R (default: 16)")
    parser.add_argument(
        "--lora-targets",
        metavar="NAMES",
        help="modules that get an adapter, as in PEFT's target_modules, with commas between them, or all-linear "
        "(default: those that PEFT chooses for the architecture)",
    )
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="longest input in tokens (default: 512, or the model's limit)"
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels a side (default: the preprocessor's)")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of an adapter's or prompt's first weights (default: %(default)s)",
    )
    parser.add_argument(
        "--no-gradients",
        action="store_true",
        help="leave out the graphs of the exact gradient, which first-order training takes",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_common_options(parser)
    add_version(parser)
    add_completion(parser)
    parser.explain({"hosl-export": EXAMPLE}, RARE)
    return parser


def _export(options: argparse.Namespace) -> int:
    # torch's threads spin while they wait, which beside other work costs ten times the computation; read at its import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hosl_export.steps import Steps  # needs rich, which the device does without

    if options.inspect:
        return _inspect(options)
    for name in ("split", "out"):
        if getattr(options, name) is None:
            raise SettingsError(name, None, "give --split K and --out DIR, or --inspect to see what each cut costs")
    steps = Steps("hosl-export")
    with steps.shown():
        summary = _export_in(steps, options)
    from hosl_export.summary import describe

    print(msgspec.json.encode(summary).decode() if options.json else describe(summary))
    return ExitCode.OK


def _inspect(options: argparse.Namespace) -> int:
    from hosl_export.inspection import describe_cuts, inspect_model
    from hosl_export.steps import Steps

    steps = Steps("hosl-export", keeps_lines=False)
    with steps.shown(), steps("looking at the model"):
        inspection = inspect_model(options.model, options.revision, options.image_size, options.max_length)
    print(msgspec.json.encode(inspection).decode() if options.json else describe_cuts(inspection))
    return ExitCode.OK


def _export_in(steps: Steps, options: argparse.Namespace) -> Summary:
    # torch and transformers take seconds to import: --help and usage errors do without them.
    with steps("loading torch"):
        from hosl_export.exporter import export_bundle
        from hosl_export.settings import ExportSettings

    settings = ExportSettings(
        model=options.model,
        split=options.split,
        out=options.out,
        train=options.train,
        train_blocks=options.train_blocks,
        prompt_tokens=options.prompt_tokens,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_targets=() if options.lora_targets is None else tuple(options.lora_targets.split(",")),
        max_length=options.max_length,
        revision=options.revision,
        seed=options.seed,
        image_size=options.image_size,
        gradients=not options.no_gradients,
    )

    return export_bundle(settings, steps)


if __name__ == "__main__":
    sys.exit(main())
