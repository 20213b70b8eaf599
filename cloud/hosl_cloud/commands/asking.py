"""A command about runs: it asks the service, or the data folder where no service runs in it, and shows the answer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from hosl_cloud.commands.client import ApiClient, add_client_options, client_of
from hosl_cloud.commands.offline import DataFolder, find_offline
from hosl_cloud.exceptions import RunNotFound
from hosl_cloud.sentences import score_text
from hosl_cloud.storage.data_folder import add_data_dir, hint
from hosl_cloud.storage.run_names import find_run_id
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.program.terminal import add_common_options

RUN_HELP = "its id, a beginning of it that no other run has, or latest"

Parser = argparse.ArgumentParser
Command = Callable[[ApiClient, argparse.Namespace], Any]
Offline = Callable[[DataFolder, argparse.Namespace], Any]
"""What answers a command where no service runs."""


def add_command(
    commands: Any, name: str, text: str, command: Command, show: Callable[[Any], None], offline: Offline | None = None
) -> Parser:
    """Add a command that asks with `command`, or `offline` where that can be, and tells a person with `show`."""
    parser: Parser = commands.add_parser(name, help=text)

    def run(options: argparse.Namespace) -> int:
        folder = None if offline is None else find_offline(options)
        if folder is None or offline is None:
            client = client_of(options)
            settle_run(options, client)
            answer = command(client, options)
        else:
            with folder:
                settle_run(options, folder)
                answer = offline(folder, options)

        if options.json:
            print(json.dumps(answer))
        else:
            show(answer)
            if folder is not None:
                print(f"no service runs in {options.data_dir}; {hint('serve', options.data_dir)} starts one")
        return int(ExitCode.OK)

    finish(parser, run)
    return parser


def settle_run(options: argparse.Namespace, source: ApiClient | DataFolder) -> None:
    """Put the whole id in the place of RUN, where the command has one. Raises RunNotFound, AmbiguousRun."""
    if "run" not in options:
        return
    ids = source.run_ids() if isinstance(source, DataFolder) else ids_of(source)
    try:
        options.run = find_run_id(options.run, ids)
    except RunNotFound:
        if isinstance(source, DataFolder):
            raise  # a service refuses it itself, with the code of a refusal


def ids_of(client: ApiClient) -> list[str]:
    """List the ids of a service's runs, oldest first."""
    return [run["id"] for run in client.request("GET", "/v1/runs")["runs"]]


def finish(parser: Parser, command: Callable[[argparse.Namespace], int]) -> None:
    """Add the options of every command about runs, and what it does."""
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    add_client_options(parser)
    add_data_dir(parser)
    add_common_options(parser)
    parser.set_defaults(command=command)


def run_path(run: str, more: str = "") -> str:
    """Name a run's place in the HTTP API."""
    return f"/v1/runs/{quote(run, safe='')}{more}"


def on_run(method: str, more: str) -> Command:
    """Make a command that is one request about its run."""
    return lambda client, options: client.request(method, run_path(options.run, more))


def accuracy_of(entry: dict[str, Any]) -> str:
    """The accuracy of a run or checkpoint, and what it is of."""
    if entry["accuracy"] is None:
        return ""
    return f"  accuracy {score_text(entry['correct'], entry['scored'], entry['examples'], entry['of_examples'])}"
