"""Fetching the shard, and snapshots of its weights, over HTTP from the cloud's port: resumable, checked by digest.

All of it blocks, and runs in worker threads. The shard is cached by digest, and what is cached is checked at every
start. A file has its name only once it is whole, checked and on the disk; until then it is `NAME.part`, which the next
try goes on with. So a crash or a power cut at any place costs no more than what came since the last piece.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from hosl_edge.connection.trust import UNKNOWN_TOKEN, Cloud, explain, is_unknown_signer
from hosl_edge.exceptions import (
    ConnectionLost,
    NoRun,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    SignerError,
    WrongDigestError,
)
from hosl_protocol.program.proxies import through
from hosl_protocol.run.manifest import MANIFEST, BundleError, Manifest, decode_manifest, sha256_of_file
from hosl_protocol.wire.messages import Snapshot

log = logging.getLogger(__name__)

TIMEOUT_S = 30.0
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
RATED_BYTES = 10**6
"""A download of fewer says little about the link."""
_PIECE_BYTES = 1 << 20

OnProgress = Callable[[int, int], None]
"""Told bytes done, and bytes in all."""
OnRate = Callable[[float], None]
"""Told how fast a download of RATED_BYTES or more came, in bytes a second."""


def fetch_bundle(
    cloud: Cloud,
    cache: Path,
    on_progress: OnProgress,
    on_rate: OnRate = lambda rate: None,
    *,
    on_manifest: Callable[[Manifest], None] = lambda manifest: None,
    on_file: Callable[[str], None] = lambda name: None,
    waits: bool = False,
    files: Container[str] | None = None,
) -> tuple[Path, Manifest]:
    """Find the folder and manifest of the cloud's shard, downloaded where the cache lacks it or holds it damaged.

    `on_manifest` is told before anything large is fetched, and may raise. With `waits` the shard is that of a run under
    way alone: the last one is over for this device. `files` names those of the shard to fetch; None fetches all.
    Raises NoRun, ConnectionLost (try again), RefusedError (token), WrongDigestError, BundleError, NoSpaceError.
    """
    base = cloud.url("bundle/")
    data = read_url(cloud, base + MANIFEST + ("?waits=1" if waits else ""))
    manifest = decode_manifest(data, base + MANIFEST)
    on_manifest(manifest)

    folder = cache / "shards" / manifest.shard_digest
    with _locked(folder):
        for entry in manifest.shard_files:
            if files is not None and entry.path not in files:
                continue
            target = folder / entry.path
            # By links in the cache, too: the manifest's own check knows only the path's words.
            if not target.resolve().is_relative_to(folder.resolve()):
                raise BundleError(f"the manifest names a file outside the shard: {entry.path!r}")
            on_file(target.name)
            _fetch_file(cloud, base + entry.path, target, entry.size_bytes, entry.sha256, on_progress, on_rate)
    return folder, manifest


def fetch_snapshot(
    cloud: Cloud, run: str, snapshot: Snapshot, target: Path, on_progress: OnProgress, on_rate: OnRate
) -> None:
    """Download a snapshot to `target`, or what is missing of it. Raises as `fetch_bundle` does.

    One that the cloud has replaced since it was offered is ConnectionLost: the next Welcome offers another.
    """
    url = cloud.url(f"snapshot/{run}/{snapshot.round}")
    _fetch_file(cloud, url, target, snapshot.size_bytes, snapshot.sha256, on_progress, on_rate)


def part_of(target: Path) -> Path:
    """Where a download is until it is whole."""
    return target.with_name(target.name + ".part")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Agents that share a cache take turns: the second finds what the first has fetched.

    What the disk refuses is a BundleError that names the file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        problem = f"{error.filename or folder} cannot be used: {error.strerror or error}"
        raise BundleError(f"{problem}; mend it, or delete it from the cache and it is fetched again") from error


def _fetch_file(
    cloud: Cloud, url: str, target: Path, size: int, sha256: str, on_progress: OnProgress, on_rate: OnRate
) -> None:
    if target.exists():
        if target.stat().st_size == size and sha256_of_file(target) == sha256:
            return
        log.warning("%s is damaged; it is fetched again", target)
        target.unlink()

    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target)
    have = part.stat().st_size if part.exists() else 0
    if have > size:  # of a former file of that name
        part.unlink()
        have = 0

    # Before the download: to find the disk full after an hour helps nobody.
    free = shutil.disk_usage(target.parent).free
    if free < size - have:
        raise NoSpaceError(f"{target.parent} has {free} bytes free, {target.name} needs {size - have} more")
    if have < size:
        _download(cloud, url, part, have, size, on_progress, on_rate)

    digest = sha256_of_file(part)
    if digest != sha256:
        part.unlink()
        raise WrongDigestError(url, digest, sha256)

    # On the disk before it has its name: else a power cut leaves a file of zeros, which is fetched again.
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)


def _download(
    cloud: Cloud, url: str, part: Path, have: int, size: int, on_progress: OnProgress, on_rate: OnRate
) -> None:
    began = time.monotonic()
    with open_url(cloud, url, have) as response, part.open("ab" if response.status == 206 else "wb") as file:
        # A server that does not take ranges sends all of it again.
        first = done = have if response.status == 206 else 0

        try:
            # One byte more than the file has would show that another was sent, and no more of it is taken.
            while piece := response.read(min(_PIECE_BYTES, size + 1 - done)):
                file.write(piece)
                done += len(piece)
                on_progress(done, size)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise NoSpaceError(f"{part.parent} is full at {done} of {size} bytes of {part.name}") from error
            raise ConnectionLost(f"download of {url} broke off at {done} of {size} bytes: {error}") from error
        finally:
            # One that broke off tells as much: on a link that has become slow none may ever end.
            if done - first >= RATED_BYTES:
                on_rate((done - first) / max(time.monotonic() - began, 1e-6))
    if done != size:
        raise ConnectionLost(f"download of {url} ended at {done} of {size} bytes")


def read_url(cloud: Cloud, url: str) -> bytes:
    """Read a small answer, whole. Raises BundleError where it is larger than a manifest may be, and as `open_url`."""
    with open_url(cloud, url) as response:
        try:
            data: bytes = response.read(MAX_MANIFEST_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionLost(f"download of {url} broke off: {error}") from error
        expected = response.headers.get("Content-Length") or ""

    # The service always says the length. Without it the head was cut off, which http.client takes for its end.
    if not expected.isdecimal():
        raise ConnectionLost(f"download of {url} broke off before its length came")
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{url} is larger than {MAX_MANIFEST_BYTES} bytes")
    if len(data) < int(expected[:20]):
        raise ConnectionLost(f"download of {url} ended at {len(data)} of {expected[:20]} bytes")
    return data


def open_url(cloud: Cloud, url: str, have: int = 0) -> Any:
    """Ask for an address, from byte `have` on. Raises ConnectionLost, RefusedError, NoRun, SignerError."""
    request = urllib.request.Request(url, headers=cloud.headers)
    if have:
        request.add_header("Range", f"bytes={have}-")

    try:
        return cloud.open(request, TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise RefusedError(UNKNOWN_TOKEN, retry=False) from error
        if error.code == 503:
            raise NoRun(error.headers.get("Retry-After")) from error
        problem = NotFoundError if error.code == 404 else ConnectionLost
        raise problem(f"{url}{through(cloud.proxy)} answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        kind = SignerError if is_unknown_signer(cause) and not cloud.token.fingerprint else ConnectionLost
        raise kind(f"cannot reach {url}{through(cloud.proxy)}: {explain(cause)}") from error
