"""What can be wrong with a machine and its way to the cloud: one check after another, a remedy for each.

Each step yields what it finds, so that lines appear as the checks end, and one that failed ends what needs it.
"""

from __future__ import annotations

import http.client
import platform
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from math import prod
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from hosl_edge.connection.fetch import read_url
from hosl_edge.connection.offer import Offer, check_data_file, fetch_offer
from hosl_edge.connection.token import Token, device_name, read_token
from hosl_edge.connection.trust import Cloud, connect_securely, http_address, opener, tls_remedy, unverified
from hosl_edge.data.consent import check_consent
from hosl_edge.data.piped import STANDARD_INPUT
from hosl_edge.data.records import digest_of_data
from hosl_edge.exceptions import ConnectionLost, ConsentError, DataError, NoRun, RefusedError, TrustError
from hosl_edge.host.health import ROOT, read_available
from hosl_edge.model.prefix_cache import FILE as CACHE_FILE
from hosl_edge.model.prefix_cache import NO_FROZEN_BLOCKS
from hosl_edge.settings import EdgeSettings, Resolved
from hosl_protocol.exceptions import ExitCode, HoslError, SettingsError
from hosl_protocol.program.plain import plain
from hosl_protocol.program.proxies import Proxy, find_proxy, through
from hosl_protocol.run.manifest import MANIFEST, BundleError, Manifest, decode_manifest

OK: Literal["ok"] = "ok"
WARNING: Literal["warning"] = "warning"
FAILED: Literal["failed"] = "failed"

TIMEOUT_S = 10.0
CLOCK_S = 60.0
"""Largest difference to the server's clock that passes."""
AGENT_BYTES = 70_000_000
"""Resident memory of an agent after its imports, measured (README.md)."""


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    outcome: Literal["ok", "warning", "failed"]
    detail: str
    remedy: str = ""
    code: ExitCode = ExitCode.OK
    """What the command ends with where this is the first to fail."""

    def line(self) -> str:
        """For people."""
        return plain(f"{self.outcome:8}{self.name}: {self.detail}" + (f"; {self.remedy}" if self.remedy else ""))


def examine(resolve: Callable[[], Resolved]) -> Iterator[Check]:
    """Make all checks, each as soon as it can be; those that need what failed are left out."""
    yield check_system(platform.machine(), 8 * struct.calcsize("P"))
    yield check_python(sys.version_info[:2])
    yield check_onnxruntime()
    yield check_memory_cgroup()
    try:
        settings = resolve().settings()
        token = read_token(Path(settings.token_file))
        name = device_name(settings, token)
    except HoslError as error:
        yield Check("settings", FAILED, str(error), code=error.exit_code)
        return
    yield Check("settings", OK, f"device {name}, {settings.server}")

    manifest: Manifest | None = None
    offer = Offer()
    for found in check_server(settings, token):
        if isinstance(found, Check):
            yield found
        elif isinstance(found, Offer):
            offer = found
        else:
            manifest = found

    yield from check_data(settings, offer, manifest)
    yield check_memory(settings, manifest, read_available())
    yield check_disk(Path(settings.cache_dir), manifest)
    if settings.cache_budget_bytes:
        yield check_cache(settings, manifest, settings.cache_budget_bytes)


def check_system(machine: str, bits: int) -> Check:
    """Look for 64 bits, of the kernel and of the programs."""
    if bits == 64:
        return Check("system", OK, f"{machine}, 64-bit")
    detail = f"32-bit programs on a 64-bit kernel ({machine})" if machine.endswith("64") else f"{machine}, 32-bit"
    remedy = "install the 64-bit image of the system, for onnxruntime has no 32-bit wheels"
    return Check("system", FAILED, detail, remedy, ExitCode.RESOURCES)


def check_python(version: tuple[int, ...]) -> Check:
    """Look for at least the version that the package asks for."""
    text = ".".join(map(str, version))
    if version >= (3, 10):
        return Check("python", OK, text)
    return Check("python", FAILED, text, "install Python 3.10 or newer, or a newer release of the system")


def check_onnxruntime(python: str = sys.executable) -> Check:
    """Import it in a process of its own: what was built for another processor dies instead of raising."""
    command = [python, "-c", "import onnxruntime; print(onnxruntime.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Check("onnxruntime", OK, done.stdout.strip())
    reason = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
    remedy = "pip install --force-reinstall onnxruntime in this environment, or a build for this board"
    return Check("onnxruntime", FAILED, f"cannot be imported: {reason}", remedy, ExitCode.RESOURCES)


def check_memory_cgroup(root: Path = ROOT) -> Check:
    """Look for what systemd's MemoryMax= and a container's limit need: without it they do nothing, and tell nothing."""
    name = "memory cgroup"
    unified = root / "sys/fs/cgroup/cgroup.controllers"
    if unified.exists():
        is_on = "memory" in unified.read_text(encoding="ascii").split()
    else:
        is_on = (root / "sys/fs/cgroup/memory").exists()
    if is_on:
        return Check(name, OK, "on")
    remedy = "add cgroup_enable=memory to the line in /boot/firmware/cmdline.txt and restart the machine"
    return Check(name, WARNING, "off, so that limits on a service's memory do nothing", remedy)


def check_data(settings: EdgeSettings, offer: Offer, manifest: Manifest | None) -> Iterator[Check]:
    """Check each data file by what the run asks for before it reads everything, where the run is known."""
    bound = {"data": offer.data_digest, "eval": offer.eval_digest}
    for name, path in (("data", settings.data), ("eval", settings.eval)):
        remedy = f"mend it, or name another file in {name}"
        if path == STANDARD_INPUT:
            yield Check(name, WARNING, "comes from a pipe, which is read when the agent starts")
            continue

        try:
            if offer.task is not None:
                check_consent(
                    offer.task, settings.fields, share_text=settings.share_text, share_fields=settings.share_fields
                )
            detail = "none"
            if path is not None:
                detail = check_data_file(Path(path), offer.task, manifest, skip_broken=settings.skip_broken)
            if bound[name] and bound[name] != (digest_of_data(Path(path)) if path is not None else ""):
                remedy = f"put the former file back, or name it in {name}"
                raise DataError(Path(path or "--eval"), None, "has changed since this device joined the run")
        except ConsentError as error:
            yield Check(name, FAILED, str(error), code=error.exit_code)
        except HoslError as error:
            yield Check(name, FAILED, str(error), remedy, error.exit_code)
        else:
            if path is not None:
                yield Check(name, OK, f"{path}, {detail}")


def check_server(settings: EdgeSettings, token: Token) -> Iterator[Check | Manifest | Offer]:
    """Check proxy, name, connection, clock, TLS, token, device, run; yields the manifest where it could be had."""
    url = urlsplit(settings.server)
    try:
        proxy = find_proxy(settings.server)
    except SettingsError as error:
        yield Check("proxy", FAILED, str(error), code=error.exit_code)
        return
    if proxy is not None:
        yield Check("proxy", OK, f"goes through {proxy}")

    # Each step rests on the last: whoever has no address cannot connect, and whoever cannot connect has no certificate.
    named = _check_name(url, proxy)
    yield named
    if named.outcome == FAILED:
        return

    port = url.port or (443 if url.scheme == "wss" else 80)
    try:
        date = _server_date(settings.server, proxy)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        remedy = "start hosl-cloud there, or mend the port, wss:// or ws://, or a firewall on the way"
        if proxy is not None:
            remedy = f"see that the proxy lets this machine there, or name {url.hostname} in no_proxy; {remedy}"
        elif url.scheme == "ws" and _speaks_tls(url.hostname or "", port):
            remedy = "the server speaks TLS: use wss://"
        elif isinstance(reason, ssl.SSLError):
            remedy = tls_remedy(reason)
        problem = getattr(reason, "strerror", None) or reason
        detail = f"{url.hostname}:{port} does not answer{through(proxy)}: {problem}"
        yield Check("connection", FAILED, detail, remedy, ExitCode.REFUSED)
        return

    yield Check("connection", OK, f"{url.hostname}:{port}{through(proxy)}")
    yield check_clock(date, time.time())
    yield from _check_service(settings, token, has_tls=url.scheme == "wss")


def _check_name(url: SplitResult, proxy: Proxy | None) -> Check:
    """Look for an address to connect to: the service's own, or its proxy's, which looks the other up."""
    there, setting = (url, "server") if proxy is None else (urlsplit(proxy.url), proxy.variable)
    try:
        found = socket.getaddrinfo(there.hostname, there.port, type=socket.SOCK_STREAM)
    except OSError as error:
        remedy = f"mend {there.hostname!r} in {setting}, or this machine's DNS"
        return Check("name", FAILED, f"{there.hostname} has no address: {error.strerror}", remedy, ExitCode.REFUSED)
    return Check("name", OK, f"{there.hostname} is {found[0][4][0]}")


def _server_date(server: str, proxy: Proxy | None) -> str | None:
    """The Date that the server answers. Nothing secret is sent, so that a certificate need not be valid yet."""
    request = urllib.request.Request(http_address(server) + "/healthz", method="HEAD")
    context = unverified() if server.startswith("wss:") else None
    try:
        with opener(context, proxy).open(request, timeout=TIMEOUT_S) as response:
            date: str | None = response.headers.get("Date")
    except urllib.error.HTTPError as error:
        error.close()
        return error.headers.get("Date")
    return date


def _speaks_tls(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), TIMEOUT_S) as plain:
            unverified().wrap_socket(plain, server_hostname=host).close()
    except OSError:
        return False
    return True


def check_clock(date: str | None, now: float) -> Check:
    """Compare this machine's clock with the server's Date; whether certificates are valid by it, `tls` finds out."""
    try:
        there = parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return Check("clock", WARNING, "the server does not tell the time", "see that this machine's clock is right")
    off = now - there
    if abs(off) <= CLOCK_S:
        return Check("clock", OK, f"within {CLOCK_S:.0f} s of the server's")
    detail = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the server's"
    return Check("clock", WARNING, detail, "set it: sudo timedatectl set-ntp true")


def _check_service(settings: EdgeSettings, token: Token, *, has_tls: bool) -> Iterator[Check | Manifest | Offer]:
    error: Exception | None = None
    manifest: Manifest | None = None
    try:
        cloud = connect_securely(settings.server, token, Path(settings.cache_dir))
        url = cloud.url("bundle/") + MANIFEST
        manifest = decode_manifest(read_url(cloud, url), url)
    except (HoslError, OSError, http.client.HTTPException) as caught:
        error = caught

    # One request tells of TLS, the token and the run: what it raised is looked through in their order.
    if isinstance(error, TrustError):
        remedy = "copy the token again; if that does not help, it is another service, or somebody in between"
        yield Check("tls", FAILED, str(error), remedy, ExitCode.REFUSED)
        return
    reason = getattr(error.__cause__, "reason", None) if error is not None else None
    if isinstance(reason, ssl.SSLError):
        yield Check("tls", FAILED, str(reason), tls_remedy(reason), ExitCode.REFUSED)
        return
    if has_tls:
        yield Check("tls", OK, "the certificate is valid")
    if isinstance(error, RefusedError):
        reason, _, remedy = error.reason.partition(": ")
        yield Check("token", FAILED, f"{settings.token_file}: {reason}", remedy, ExitCode.REFUSED)
        return
    if isinstance(error, ConnectionLost) and not isinstance(error, NoRun):
        yield Check("service", FAILED, str(error), "see that it is hosl-cloud, of this version", ExitCode.REFUSED)
        return

    yield Check("token", OK, "accepted")
    yield from _check_device(cloud, device_name(settings, token))
    yield _check_run(error, manifest)
    if manifest is not None:
        yield manifest


def _check_device(cloud: Cloud, name: str) -> Iterator[Check | Offer]:
    """Check whether the token is one of this device; yields nothing where an older service cannot tell."""
    try:
        offer = fetch_offer(cloud, name)
    except RefusedError as error:
        reason, _, remedy = error.reason.partition(": ")  # as fetch_offer puts it
        yield Check("device", FAILED, reason, remedy, ExitCode.REFUSED)
    except HoslError as error:
        yield Check("device", FAILED, str(error), "see that it is hosl-cloud, of this version", ExitCode.REFUSED)
    else:
        if offer is not None:
            whose = f"the token is that of {name}"
            if not cloud.token.name:
                whose = f"the join token of the service on this machine, for which this device is {name}"
            yield Check("device", OK, whose)
            yield offer


def _check_run(error: Exception | None, manifest: Manifest | None) -> Check:
    if manifest is not None:
        return Check(
            "run", OK, f"{manifest.model}, split {manifest.split} of {manifest.blocks}, trains {manifest.train}"
        )
    if isinstance(error, NoRun):
        return Check("run", WARNING, str(error), "start one; with stay the agent waits for it")
    code = error.exit_code if isinstance(error, BundleError) else ExitCode.PROTOCOL
    return Check("run", FAILED, str(error), "update hosl here or there, so that both are of one version", code)


def check_memory(settings: EdgeSettings, manifest: Manifest | None, available: int) -> Check:
    """Compare what is free, and the budget, with what trains; activations come on top."""
    if manifest is None:
        return Check("memory", WARNING, f"{available / 1e6:.0f} MB are free; what the shard needs is not known")
    trained = 4 * sum(prod(entry.shape) for entry in manifest.trainable)
    shard = sum(entry.size_bytes for entry in manifest.shard_files)
    needed, budget = AGENT_BYTES + trained, settings.memory_budget_bytes
    detail = f"{available / 1e6:.0f} MB are free, {needed / 1e6:.0f} MB the least, without activations"
    remedy = "use a smaller split, or --train norm, or free memory on this machine"

    if budget is not None and budget < needed:
        return Check("memory", FAILED, f"memory_budget is {budget / 1e6:.0f} MB; {detail}", remedy, ExitCode.RESOURCES)
    if available < needed:
        return Check("memory", FAILED, detail, remedy, ExitCode.RESOURCES)
    # It may still work, for the budget is a limit and no need.
    if available < (budget or 0):
        return Check("memory", WARNING, f"memory_budget is {(budget or 0) / 1e6:.0f} MB; {detail}", "lower it")
    if available < AGENT_BYTES + shard:
        slow = f"the shard has {shard / 1e6:.0f} MB, so that its weights are read from the disk again and again"
        return Check("memory", WARNING, f"{detail}; {slow}", remedy)
    return Check("memory", OK, detail)


def check_disk(cache: Path, manifest: Manifest | None) -> Check:
    """Compare what is free where shards are cached with what is still to be fetched."""
    folder = next(path for path in (cache, *cache.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    detail = f"{folder} has {free / 1e6:.0f} MB free"
    if manifest is None:
        return Check("disk", WARNING, f"{detail}; what the shard needs is not known")

    shard = cache / "shards" / manifest.shard_digest
    needed = sum(entry.size_bytes for entry in manifest.shard_files if not (shard / entry.path).exists())
    detail += f", {needed / 1e6:.0f} MB are to be fetched"
    if free < needed:
        return Check("disk", FAILED, detail, "make room, or set cache_dir to a larger disk", ExitCode.RESOURCES)
    return Check("disk", OK, detail)


def check_cache(settings: EdgeSettings, manifest: Manifest | None, budget: int) -> Check:
    """Compare the budget for what frozen blocks compute with the disk, and look whether the shard has such blocks."""
    name, state = "cache", Path(settings.state_dir)
    folder = next(path for path in (state, *state.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free + sum(path.stat().st_blocks * 512 for path in state.glob(f"*/{CACHE_FILE}"))
    detail = f"cache_budget is {budget / 1e6:.0f} MB, {folder} has {free / 1e6:.0f} MB free for it"
    if manifest is not None and manifest.prefix is None:
        remedy = "export it with --train-blocks -N, by this version, or leave cache_budget out"
        return Check(name, WARNING, NO_FROZEN_BLOCKS, remedy)
    if free < budget:
        return Check(name, WARNING, detail, "what has no room is computed each time; make room, or lower it")
    return Check(name, OK, detail)
