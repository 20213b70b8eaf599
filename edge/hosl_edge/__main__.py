"""`hosl-edge`: the agent on the device that holds the data.

hosl-edge --server wss://host:8765 --token-file token --data train.jsonl --eval validation.jsonl
"""

from __future__ import annotations

import sys

try:
    import argparse
    import contextlib
    import dataclasses
    import json
    from collections.abc import Callable, Sequence
    from functools import partial
    from pathlib import Path

    import msgspec

    from hosl_edge.data.piped import STANDARD_INPUT, spooled
    from hosl_edge.host.notify import WatchedPool
    from hosl_edge.host.status import SERVICE_FOLDER, read_status, readable, status_folder
    from hosl_edge.options import add_settings, example_file, option_of
    from hosl_edge.preflight import FAILED, examine
    from hosl_edge.settings import TYPES, Resolved, masked, resolve
    from hosl_protocol.exceptions import ExitCode, SettingsError
    from hosl_protocol.program.arguments import Parser
    from hosl_protocol.program.completion import add_completion
    from hosl_protocol.program.plain import plain
    from hosl_protocol.program.terminal import (
        add_common_options,
        add_version,
        print_unit,
        run_command,
        run_until_interrupted,
        terminable,
    )
except KeyboardInterrupt:  # while all of this loads there is nothing to tell
    sys.exit(130)

SWITCHES = {
    *(option_of(name) for name, kind in TYPES.items() if kind is bool),
    *("--json", "--example", "--ids", "--debug", "--quiet", "-q"),
}
"""Options that take no value."""
EXAMPLES = {
    "hosl-edge": (
        "hosl-edge --server wss://cloud.example.org:8765 --token-file kitchen.token \\\n"
        "          --data train.jsonl --eval validation.jsonl"
    ),
    "hosl-edge preflight": "hosl-edge preflight --server wss://cloud.example.org:8765 --token-file token",
    "hosl-edge data": "hosl-edge data train.jsonl --shard bundle --task sst2",
    "hosl-edge status": "hosl-edge status --name kitchen",
    "hosl-edge config": "hosl-edge config --example",
    "hosl-edge unit": "hosl-edge unit | sudo tee /etc/systemd/system/hosl-edge.service",
}
RARE = {
    *("--debug", "--log-level", "--log-format", "--insecure", "--skip-broken", "--state-dir", "--cache-dir"),
    *("--cache-budget", "--share-fields"),
    *("--completion", "--sync-interval-s", "--max-temperature-c", "--min-available-memory", "--stall-timeout-s"),
}
"""Options that few people need, and `--help-all` has."""
COMPLETION = Path(__file__).with_name("completion")
UNIT = Path(__file__).with_name("hosl-edge.service")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that is named, or `run`. Returns the exit code."""
    # No subparsers: `hosl-edge --server ...` means `run`, and a command may stand behind the options.
    given = list(sys.argv[1:] if arguments is None else arguments)
    place = next((place for place in range(len(given)) if _is_command(given, place)), None)
    name = given.pop(place) if place is not None else "run"
    command, description = COMMANDS[name]
    return run_command(make_parser(name, description), command, given)


def _is_command(given: Sequence[str], place: int) -> bool:
    """Whether a word is a command, and not the value of the option before it."""
    before = given[place - 1] if place else ""
    return given[place] in COMMANDS and (not before.startswith("-") or "=" in before or before in SWITCHES)


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    is_run = name == "run"
    parser = Parser(
        prog="hosl-edge" if is_run else f"hosl-edge {name}",
        commands={other: text for other, (_, text) in COMMANDS.items()} if is_run else None,
        description=f"{description[0].upper()}{description[1:]}.",
    )

    if name != "unit":
        add_settings(parser)
        parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file (default: /etc/hosl/edge.toml)")
        parser.add_argument("--json", action="store_true", help="print JSON on stdout" + " at the end" * is_run)
    if name == "data":
        _add_data_options(parser)
    if name == "config":
        parser.add_argument("--example", action="store_true", help="print a file with every setting, explained")
    add_common_options(parser)
    add_version(parser)
    if is_run:
        add_completion(parser, COMPLETION)
    parser.explain(EXAMPLES, RARE)
    return parser


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", metavar="FILE", help="what to read (default: the setting data); - reads a pipe"
    )
    parser.add_argument("--shard", metavar="DIR", type=Path, help="read as for this bundle, and ask no service")
    parser.add_argument("--task", metavar="NAME", help="with --shard: the shipped task, such as sst2 or chat")
    parser.add_argument("--max-length", metavar="N", type=int, help="with --shard: tokens to which texts are cut")
    parser.add_argument("--examples", metavar="N", type=int, default=3, help="how many to show (default: 3)")
    parser.add_argument("--ids", action="store_true", help="show their token ids, too")


def _resolve(options: argparse.Namespace) -> Resolved:
    # What is left are settings, for an option that was not given is not there (options.py).
    own = {"config", "json", "example", "debug", "log_level", "log_format", "quiet"}
    own |= {"file", "shard", "task", "max_length", "examples", "ids"}
    return resolve({name: value for name, value in vars(options).items() if name not in own}, options.config)


def _run(options: argparse.Namespace) -> int:
    settings = _resolve(options).settings()
    # Imported here: the other commands do without ONNX Runtime, which may be what is wrong.
    from hosl_edge.agent import run_agent

    with terminable(), _readable_data(settings.data, Path(settings.state_dir)) as path:
        settings = msgspec.structs.replace(settings, data=str(path))
        summary = run_until_interrupted(run_agent(settings, WatchedPool()))
    if options.json:
        print(json.dumps(dataclasses.asdict(summary)))
    return int(ExitCode.OK)


def _readable_data(data: str, folder: Path) -> contextlib.AbstractContextManager[Path]:
    """The data's path; of a pipe that of a file with all of it."""
    return spooled(folder) if data == STANDARD_INPUT else contextlib.nullcontext(Path(data))


def _data(options: argparse.Namespace) -> int:
    from hosl_edge.data_view import lines, reading_of_run, reading_of_shard, view_data

    resolved = _resolve(options)
    if options.file is not None:
        resolved = dataclasses.replace(resolved, values={**resolved.values, "data": options.file})
    if options.shard is None:
        settings = resolved.settings()
        reading = reading_of_run(settings)
    else:
        if options.task is None:
            raise SettingsError("task", None, "with --shard, give --task and the name of a shipped task")
        reading = reading_of_shard(options.shard, options.task, options.max_length)

    data = resolved.values.get("data")
    if data is None:
        raise SettingsError("data", None, "name a file: hosl-edge data FILE")
    skip_broken = bool(resolved.value("skip_broken"))
    with terminable(), _readable_data(data, Path(resolved.value("state_dir"))) as path:
        view = view_data(path, reading, options.examples, with_ids=options.ids, skip_broken=skip_broken)
    if options.json:
        print(json.dumps(dataclasses.asdict(view)))
    else:
        print("\n".join(lines(view, "standard input" if data == STANDARD_INPUT else data)))
    return int(ExitCode.OK)


def _preflight(options: argparse.Namespace) -> int:
    found = []
    for check in examine(partial(_resolve, options)):
        found.append(check)
        if not options.json:
            print(check.line(), flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(check) for check in found], indent=2))
    return next((int(check.code) for check in found if check.outcome == FAILED), int(ExitCode.OK))


def _status(options: argparse.Namespace) -> int:
    resolved = _resolve(options)
    # A person asks for the agent of the unit, too, whose socket lies elsewhere.
    folders = [status_folder(lambda: str(resolved.value("state_dir"))), SERVICE_FOLDER]
    document = read_status(list(dict.fromkeys(folders)), resolved.value("name"))
    if options.json:
        print(json.dumps(document))
    else:
        print("\n".join(plain(f"{name:24}{text}") for name, text in readable(document)))
    return int(ExitCode.OK)


def _config(options: argparse.Namespace) -> int:
    if options.example:
        print(example_file(), end="")
        return int(ExitCode.OK)
    resolved = _resolve(options)
    values = resolved.effective()
    if "server" in values:
        values["server"] = masked(str(values["server"]))
    sources = {name: resolved.sources.get(name, "default") for name in values}

    if options.json:
        print(json.dumps({name: {"value": values[name], "source": sources[name]} for name in values}, indent=2))
    else:
        print("\n".join(_toml_line(name, values[name], sources[name]) for name in values))
    resolved.settings()  # last, so that what is wrong is shown among the rest
    return int(ExitCode.OK)


def _toml_line(name: str, value: object, source: str) -> str:
    if value is None:
        return f"# {name} is not set"
    return f"{name} = {json.dumps(value, ensure_ascii=False)}  # {source}"


def _unit(options: argparse.Namespace) -> int:
    print_unit(UNIT)
    return int(ExitCode.OK)


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "run": (_run, "fine-tune the first layers of a model on the data of this device"),
    "preflight": (_preflight, "check this machine and the way to the cloud, with a remedy for what is wrong"),
    "data": (_data, "show what a run would read of a file: counts, labels, lengths, and some examples"),
    "status": (_status, "what the running agent is doing"),
    "config": (_config, "the settings, and where each comes from"),
    "unit": (_unit, "print the systemd unit"),
}


if __name__ == "__main__":
    sys.exit(main())
