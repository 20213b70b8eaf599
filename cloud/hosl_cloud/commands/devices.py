"""`hosl-cloud init`, which makes the service's CA, and `hosl-cloud device`, which makes and revokes devices' tokens."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from hosl_cloud.commands.client import ApiClient, add_client_options, client_of, service_file
from hosl_cloud.exceptions import ServiceError
from hosl_cloud.sentences import device_command as device_command
from hosl_cloud.service.secrets import ADMIN_TOKEN_FILE, load_or_make_secret
from hosl_cloud.storage.data_folder import add_data_dir, hint, make_data_dir
from hosl_cloud.storage.records import UNENDED
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.program.terminal import add_common_options
from hosl_protocol.run.settings import convert
from hosl_protocol.run.tasks import Task

log = logging.getLogger(__name__)

Parser = argparse.ArgumentParser


def add_init(parser: Parser) -> None:
    """Options of `hosl-cloud init`."""
    parser.add_argument(
        "--name", action="append", default=[], metavar="HOST", help="what devices call the service; may be repeated"
    )
    parser.add_argument("--renew", action="store_true", help="make a new certificate of the same CA")
    add_data_dir(parser)
    add_common_options(parser)
    parser.set_defaults(command=_init)


def add_device(parser: Parser) -> None:
    """Options of `hosl-cloud device`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser("add", help="make a device's token")
    add.add_argument("name", metavar="NAME", help="1 to 64 characters of A-Za-z0-9._-; a device keeps it for life")
    add.add_argument("--bundle", default="", metavar="NAME", help="keep it to the runs of this bundle (default: all)")
    add.add_argument("--out", metavar="FILE", help="where the token goes (default: NAME.token); - prints it")
    add.set_defaults(command=_add)
    listing = commands.add_parser("list", help="show the devices that have tokens")
    listing.set_defaults(command=_list)
    revoke = commands.add_parser("revoke", help="end a device's token and its connection")
    revoke.add_argument("name", metavar="NAME")
    revoke.set_defaults(command=_revoke)
    for command in (add, listing, revoke):
        command.add_argument("--json", action="store_true", help="print the answer as JSON")
        add_client_options(command)
        add_data_dir(command)
        add_common_options(command)


def _init(options: argparse.Namespace) -> int:
    from hosl_cloud.service.authority import make_authority, renew_certificate

    if options.renew:
        authority = renew_certificate(options.data_dir, options.name)
        print(f"a new certificate is in {authority.server_cert}; it counts once the service starts again")
    else:
        if not options.name:
            raise ServiceError("--name is missing: say what devices call this machine, a host name or an address")
        make_data_dir(options.data_dir)
        authority = make_authority(options.data_dir, options.name)
        admin_token = options.data_dir / ADMIN_TOKEN_FILE
        load_or_make_secret(admin_token)
        print(f"a CA and a certificate are in {authority.folder}, the admin token in {admin_token}")
    print(f"the certificate is for {', '.join(authority.names())}; it ends in {authority.days_left():.0f} days")
    if not options.renew:
        serve = hint("serve --bundle DIR --task PRESET --host 0.0.0.0", options.data_dir)
        print(f"next: {serve} (for a task of your own: --config run.toml in place of --task)")
        print(f"then, in a second terminal, for each device: {hint('device add NAME', options.data_dir)}")
    return int(ExitCode.OK)


def _add(options: argparse.Namespace) -> int:
    client = client_of(options)
    path = None if options.out == "-" else Path(options.out or f"{options.name}.token")
    # The file before the token: one that could not be written would be lost, and its name taken.
    with _reserved(path) if path is not None else contextlib.nullcontext(sys.stdout) as file:
        made = client.request("POST", "/v1/devices", {"name": options.name, "bundle": options.bundle})
        if made["warning"]:
            log.warning("%s", made["warning"])
        _write_token(file, made["token"], made["name"])

    if path is None:
        return int(ExitCode.OK)
    if options.json:
        print(json.dumps({"name": made["name"], "token_file": str(path)}))
    else:
        print(f"the token is in {path}: copy it to the device, and start there")
        print(device_command(_public_address(options), path, _task_for(client, options.bundle)))
    return int(ExitCode.OK)


def _task_for(client: ApiClient, bundle: str) -> Task | None:
    """The task of the run that a device of this bundle (empty: any) would join now; None where there is none."""
    runs = [run for run in client.request("GET", "/v1/runs")["runs"] if run["state"] in UNENDED]
    fit = [run["id"] for run in runs if bundle in ("", run["bundle"]) and not run["problem"]]
    if not fit:
        return None
    task: Task = convert(client.request("GET", f"/v1/runs/{fit[0]}")["config"]["task"], Task, "task")
    return task


@contextlib.contextmanager
def _reserved(path: Path) -> Iterator[TextIO]:
    """A new file that its owner alone can read, made before the token that it is for; gone again if none comes."""
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii")
    except FileExistsError as error:
        raise ServiceError(f"{path} exists: choose another --out, or delete it") from error
    except OSError as error:
        raise ServiceError(f"{path} cannot be written ({error.strerror}): choose another --out") from error

    try:
        with file:
            yield file
    except BaseException:  # Ctrl-C while the service is asked, too
        path.unlink(missing_ok=True)
        raise


def _write_token(file: TextIO, token: str, name: str) -> None:
    try:
        print(token, file=file, flush=True)
    except OSError as error:
        remedy = f"run hosl-cloud device revoke {name}, and add it again"
        raise ServiceError(f"the token cannot be written ({error.strerror}), and is lost: {remedy}") from error


def _public_address(options: argparse.Namespace) -> str:
    """Find what a device elsewhere calls the service."""
    if server := options.server or os.environ.get("HOSL_SERVER"):
        return str(server)
    return service_file(options.data_dir)["public_address"]


def _list(options: argparse.Namespace) -> int:
    listed = client_of(options).request("GET", "/v1/devices")
    if options.json:
        print(json.dumps(listed))
        return int(ExitCode.OK)
    for device in listed["devices"]:
        print(f"{device['name']:<32} {_state_of(device)}")
    return int(ExitCode.OK)


def _state_of(device: dict[str, Any]) -> str:
    made, revoked = device["created_at"], device["revoked_at"]
    ended = f", revoked {_date(revoked)}" if revoked is not None else ""
    return f"made {_date(made)}{ended}" + (f", for bundle {device['bundle']}" if device["bundle"] else "")


def _date(unix: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix))


def _revoke(options: argparse.Namespace) -> int:
    # Every byte of the name: one that is none must reach the service as it is, and be refused by it.
    answer = client_of(options).request("DELETE", f"/v1/devices/{quote(options.name, safe='')}")
    print(json.dumps(answer) if options.json else f"the token of {answer['name']} is revoked")
    return int(ExitCode.OK)
