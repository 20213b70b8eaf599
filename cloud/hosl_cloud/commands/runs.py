"""`hosl-cloud run`, `log` and `drain`: what an operator does to a running service, by its HTTP API.

What only looks is answered from the data folder where no service runs in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from hosl_cloud.commands.asking import (
    RUN_HELP,
    Parser,
    accuracy_of,
    add_command,
    finish,
    on_run,
    run_path,
    settle_run,
)
from hosl_cloud.commands.client import ApiClient, client_of, is_local
from hosl_cloud.commands.offline import find_offline
from hosl_cloud.commands.run_settings import add_run_settings, check_names, read_run_settings
from hosl_cloud.exceptions import RequestError
from hosl_cloud.sentences import counted, evaluation_lines, in_line
from hosl_cloud.storage.data_folder import is_locked
from hosl_cloud.storage.records import UNENDED
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.program.plain import plain

FOLLOW_S = 1.0
"""Between questions for more of a log."""


def add_run(parser: Parser) -> None:
    """Options of `hosl-cloud run`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    start = add_command(commands, "start", "put a new run in line", _start, _show_run)
    start.add_argument("--bundle", required=True, metavar="NAME", help="a bundle in the service's folder of bundles")
    add_run_settings(start)
    add_command(
        commands,
        "list",
        "show all runs",
        lambda client, _: client.request("GET", "/v1/runs"),
        _show_runs,
        lambda folder, _: folder.runs(),
    )
    for command in (
        add_command(
            commands,
            "show",
            "show a run, its devices, and its last evaluation class by class",
            _show,
            _show_run,
            lambda folder, options: folder.run(options.run),
        ),
        add_command(
            commands,
            "resume",
            "go on with a run that has stopped",
            on_run("POST", "/resume"),
            _show_run,
            lambda folder, options: folder.resume(options.run),
        ),
        add_command(commands, "stop", "end a run after its round; it can go on later", _stop, _show_stopped),
        add_command(commands, "rm", "delete a run that is over, with its checkpoints", _remove, _show_removed),
    ):
        command.add_argument("run", metavar="RUN", help=RUN_HELP)


def add_log(parser: Parser) -> None:
    """Options of `hosl-cloud log`."""
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("-f", "--follow", action="store_true", help="go on as more is said, until the run is over")
    finish(parser, _log)


def add_drain(parser: Parser) -> None:
    """Options of `hosl-cloud drain`."""

    parser.add_argument("--no-wait", action="store_true", help="do not wait until the service has left")

    def drain(options: argparse.Namespace) -> int:
        client = client_of(options)
        answer = client.request("POST", "/v1/drain")
        if not options.no_wait:
            _await_end(client, options)
        if options.json:
            print(json.dumps(answer))
        else:
            paused = f"pauses {', '.join(answer['runs'])}" if answer["runs"] else "has no run to pause"
            print(f"the service {paused}, and {'leaves' if options.no_wait else 'has left'}")
        return int(ExitCode.OK)

    finish(parser, drain)


def _await_end(client: ApiClient, options: argparse.Namespace) -> None:
    """Until nobody answers any more, and on the service's own machine until it has left its folder, too."""
    is_there = True
    while is_there:
        time.sleep(0.2)
        try:
            client.request("GET", "/v1/runs")
        except RequestError as error:
            is_there = error.status != 0

    while is_local(options) and is_locked(options.data_dir):
        time.sleep(0.2)


def _start(client: ApiClient, options: argparse.Namespace) -> Any:
    config = read_run_settings(options)
    check_names(options, config)  # here, for the service does not know the file's name
    body = {"bundle": options.bundle, "config": config}
    return client.request("POST", "/v1/runs", body)


def _show(client: ApiClient, options: argparse.Namespace) -> Any:
    """Ask for a run, and for its last evaluation class by class."""
    shown = client.request("GET", run_path(options.run))
    if shown["evaluation"] is not None:
        with contextlib.suppress(RequestError):  # a run that was rewound meanwhile no longer has it
            shown["evaluation"] = client.request(
                "GET", run_path(options.run, f"/evaluations/{shown['evaluation']['round']}")
            )
    return shown


def _stop(client: ApiClient, options: argparse.Namespace) -> Any:
    """Wait for the end of the round, however long it takes."""
    shown = client.request("POST", run_path(options.run, "/stop"))
    while shown["state"] in ("pending", "running"):
        time.sleep(FOLLOW_S)
        shown = client.request("GET", run_path(options.run))
    return shown


def _remove(client: ApiClient, options: argparse.Namespace) -> Any:
    client.request("DELETE", run_path(options.run))
    return {"id": options.run}


def _log(options: argparse.Namespace) -> int:
    folder = find_offline(options)
    if folder is not None:
        with folder:
            settle_run(options, folder)
            _print_log(lambda after: folder.log(options.run, after), 0, options)
        return int(ExitCode.OK)
    client, last = client_of(options), 0
    settle_run(options, client)

    def more(after: int) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = client.request("GET", run_path(options.run, f"/log?after={after}"))["events"]
        return events

    while True:
        # Asked before the log: what is said at the run's end is then printed before this leaves.
        is_over = client.request("GET", run_path(options.run))["state"] not in UNENDED
        last = _print_log(more, last, options)
        if is_over or not options.follow:
            return int(ExitCode.OK)
        time.sleep(FOLLOW_S)


def _print_log(more: Callable[[int], list[dict[str, Any]]], last: int, options: argparse.Namespace) -> int:
    """Print what was said after event `last`; which event is the last now."""
    while events := more(last):
        for event in events:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["at"]))
            line = plain(f"{at} {event['level']} {event['text']}")
            print(json.dumps(event) if options.json else line, flush=True)
        last = events[-1]["id"]
    return last


def _show_removed(answer: dict[str, Any]) -> None:
    print(f"run {answer['id']} is deleted")


def _show_runs(answer: dict[str, Any]) -> None:
    for run in answer["runs"]:
        print(_line(run))
    if not answer["runs"]:
        print("no run yet; begin one with: hosl-cloud run start --bundle NAME --task PRESET")


def _line(run: dict[str, Any]) -> str:
    loss = "" if run["loss"] is None else f"  loss {run['loss']:.4f}"
    progress = f"round {run['round']}/{run['rounds'] or '?'}"
    problem = "  its settings cannot be read" if run["problem"] else ""
    return f"{run['id']:<32} {run['state']:<10} {progress:<18} {_devices(run)}{loss}{accuracy_of(run)}{problem}"


def _devices(run: dict[str, Any]) -> str:
    """Say how many devices are ready, and what the run waits for where it does not train."""
    waits = run["waits_for"]
    if run["behind"]:
        return f"in line behind {run['behind'][0]}"
    if waits is not None and waits["needed"]:
        return f"{waits['ready']} of {counted(waits['needed'], 'device')}"
    return counted(run["devices"], "device")


def _waits(run: dict[str, Any]) -> str:
    """Say what a run waits for, in a sentence; empty where it does not."""
    waits = run["waits_for"]
    if run["behind"]:
        return in_line(run["behind"])
    if waits is None:
        return ""
    whose = f" of {', '.join(waits['devices'])}" if waits["devices"] else ""
    if waits["needed"]:
        named = f", not {', '.join(waits['devices'])}" if waits["devices"] else ""
        whose = f": {waits['ready']} of {waits['needed']} are there{named}"
    return f"waits for {waits['what']}{whose}, since {time.time() - waits['since']:.0f} s"


def _show_run(run: dict[str, Any]) -> None:
    print(_line(run))
    for sentence in (run["reason"], run["problem"], _waits(run)):
        if sentence:
            print(plain(f"  {sentence}"))
    returning = run["returning"]
    if run["state"] in ("pending", "running") and not run["devices"] and returning["devices"]:
        count, within_s = returning["devices"], returning["within_s"]
        print(f"  devices that found no run before: {count}; they ask again within {within_s} s")

    for device in run["members"]:
        state = "ready" if device["is_ready"] else "connected" if device["is_connected"] else "away"
        peak = "" if device["peak_rss_bytes"] is None else f", peak {device['peak_rss_bytes'] / 1e6:.0f} MB"
        heat = "" if device["temperature_c"] is None else f", {device['temperature_c']:.0f} °C"
        seen_s = time.time() - device["last_seen"]
        figures = f"reported round {device['applied_round']}{peak}{heat}, last seen {seen_s:.0f} s ago"
        print(f"  {device['name']:<32} {state:<10} {figures}")
    if "classes" in (run["evaluation"] or {}):
        for line in evaluation_lines(run["evaluation"]):
            print(plain(f"  {line}"))


def _show_stopped(run: dict[str, Any]) -> None:
    _show_run(run)
    print("  its devices have been told; those without --stay have ended: start them again for the next run")
