"""Fetching the shard over HTTP from the cloud's port: resumable, checked by digest, cached by digest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import logging
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hosl_edge.exceptions import ConnectionLost, EdgeError, RefusedError
from hosl_protocol import BundleError, ExitCode, FileEntry, Manifest, decode_manifest, sha256_of_file
from hosl_protocol.manifest import MANIFEST

log = logging.getLogger(__name__)

TIMEOUT_S = 30.0
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
_PIECE_BYTES = 1 << 20


class NoSpaceError(EdgeError):
    """The disk cannot hold the shard."""

    exit_code = ExitCode.RESOURCES


def fetch_bundle(
    server: str, token: str, cache: Path, on_progress: Callable[[int, int], None]
) -> tuple[Path, Manifest]:
    """The folder and manifest of the cloud's shard, downloaded where the cache lacks it.

    Raises ConnectionLost (try again), RefusedError (token), BundleError (digest), NoSpaceError.
    """
    base = server.replace("ws", "http", 1).rstrip("/") + "/v1/bundle/"
    with _open(base + MANIFEST, token) as response:
        try:
            data: bytes = response.read(MAX_MANIFEST_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionLost(f"download of {base + MANIFEST} broke off: {error}") from error
        expected = response.headers.get("Content-Length")
    if expected is not None and len(data) < min(int(expected), MAX_MANIFEST_BYTES):
        raise ConnectionLost(f"download of {base + MANIFEST} ended at {len(data)} of {expected} bytes")
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"the manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    manifest = decode_manifest(data, base + MANIFEST)
    folder = cache / "shards" / manifest.shard_digest
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        for entry in manifest.shard_files:
            _fetch_file(base, token, folder, entry, on_progress)
    return folder, manifest


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Agents that share a cache take turns: the second finds what the first has fetched."""
    with (folder / ".lock").open("w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_file(base: str, token: str, folder: Path, entry: FileEntry, on_progress: Callable[[int, int], None]) -> None:
    target = folder / entry.path
    if not target.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"the manifest names a file outside the shard: {entry.path!r}")
    if target.exists() and target.stat().st_size == entry.size_bytes:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    if have > entry.size_bytes:
        part.unlink()
        have = 0
    free = shutil.disk_usage(target.parent).free
    if free < entry.size_bytes - have:
        raise NoSpaceError(f"{target.parent} has {free} bytes free, {entry.path} needs {entry.size_bytes - have} more")
    if have < entry.size_bytes:
        _download(base + entry.path, token, part, have, entry.size_bytes, on_progress)
    digest = sha256_of_file(part)
    if digest != entry.sha256:
        part.unlink()
        raise BundleError(f"{entry.path} has digest {digest}, the manifest says {entry.sha256}: start again to refetch")
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)


def _download(url: str, token: str, part: Path, have: int, size: int, on_progress: Callable[[int, int], None]) -> None:
    with _open(url, token, have) as response, part.open("ab" if response.status == 206 else "wb") as file:
        done = have if response.status == 206 else 0
        try:
            while piece := response.read(min(_PIECE_BYTES, size + 1 - done)):
                file.write(piece)
                done += len(piece)
                on_progress(done, size)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise NoSpaceError(f"{part.parent} is full at {done} of {size} bytes of {part.name}") from error
            raise ConnectionLost(f"download of {url} broke off at {done} of {size} bytes: {error}") from error
    if done != size:
        raise ConnectionLost(f"download of {url} ended at {done} of {size} bytes")


def _open(url: str, token: str, have: int = 0) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise RefusedError("it does not know the join token", retry=False) from error
        raise ConnectionLost(f"{url} answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConnectionLost(f"cannot reach {url}: {reason}") from error
