"""The merged model over HTTP: made in the background by `hosl-cloud merge`, kept for a while, streamed as a tar file.

One at a time, in a process of its own: its memory is given back, and where it is too much the kernel ends it and not
the service. A browser's download has no header for a token; it takes a ticket, which is good once, for a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from hosl_cloud.exceptions import ApiError, CheckpointMissing
from hosl_cloud.runs.queue import RunQueue
from hosl_cloud.service.openapi import BYTES, Call, Operation
from hosl_cloud.storage.archive import Archive
from hosl_cloud.tail.checkpoint import find_checkpoint
from hosl_protocol.run.manifest import BundleError, load_manifest

log = logging.getLogger(__name__)

KEEP_S = 3600.0
"""How long a merged model stays to be downloaded."""
TICKET_S = 60.0
SPARE_BYTES = 256 << 20
"""Room on the disk that a merge leaves for the runs."""
FOLDER = "merged-for-download"
"""In the data folder; nobody else may keep anything in it."""

Which = Literal["best", "last"]


class NewMerge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which checkpoint to merge."""

    checkpoint: Which = "best"
    """By evaluation, or the newest."""


class Merge(msgspec.Struct, frozen=True, kw_only=True):
    """How far a run's merged model is."""

    state: Literal["none", "making", "ready", "failed"]
    checkpoint: Which = "best"
    began_at: float | None = None
    """Unix time."""
    round: int = 0
    """Of the checkpoint, once it is ready."""
    size_bytes: int = 0
    """Of the download."""
    until: float | None = None
    """Unix time after which a ready one is removed; another merge removes it before."""
    reason: str = ""
    """Why it failed."""


class Ticket(msgspec.Struct, frozen=True):
    """Leave to download once, without a token."""

    path: str
    expires_at: float
    """Unix time."""


@dataclass
class _Job:
    run: str
    folder: Path
    merge: Merge
    task: asyncio.Task[None] | None = None


class Merges:
    """The newest merge of the service. All on the event loop."""

    def __init__(self, runs: RunQueue) -> None:
        self._runs, self._folder = runs, runs.data_dir.absolute() / FOLDER
        self._job: _Job | None = None
        self._tickets: dict[str, tuple[_Job, float]] = {}

    def operations(self) -> list[Operation]:
        """List the operations."""
        path = "/v1/runs/{run}/merge"
        return [
            Operation("GET", path, "How far the merged model of a run is.", self._show, Merge),
            Operation("POST", path, "Merge a run's halves.", self._begin, Merge, NewMerge, 202, (), (409, 507)),
            Operation("GET", f"{path}/archive", "The merged model, a tar file.", self._archive, refusals=(409,)),
            Operation(
                "POST", f"{path}/ticket", "Leave to download it once.", self._ticket, Ticket, None, 201, (), (409,)
            ),
        ]

    def routes(self) -> list[Route]:
        """What whoever has a ticket may ask."""
        return [Route("/v1/downloads/{ticket}", self._download)]

    async def clear(self) -> None:
        """Remove what is there; end what is under way."""
        job, self._job = self._job, None
        if job is not None and job.task is not None and job.task is not asyncio.current_task():
            job.task.cancel()
            await asyncio.wait({job.task})
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _show(self, call: Call) -> Merge:
        run = (await asyncio.to_thread(self._runs.store.run, call.path["run"])).id
        return Merge(state="none") if self._job is None or self._job.run != run else self._job.merge

    async def _begin(self, call: Call) -> Merge:
        row = await asyncio.to_thread(self._runs.store.run, call.path["run"])
        which: Which = call.body.checkpoint
        try:
            await asyncio.to_thread(find_checkpoint, self._runs.folder(row.id), which)
        except CheckpointMissing as error:
            raise ApiError(409, f"run {row.id} has no checkpoint yet: wait for its first one") from error
        await asyncio.to_thread(self._check_room, row.bundle)
        if self._job is not None and self._job.merge.state == "making":
            raise ApiError(409, f"run {self._job.run} is being merged: try again when that is done")

        merge = Merge(state="making", checkpoint=which, began_at=time.time())
        self._job = job = _Job(row.id, self._folder / secrets.token_hex(4) / row.id, merge)
        job.task = asyncio.create_task(self._make_or_say_why(job))
        return merge

    def _check_room(self, bundle: Path) -> None:
        try:
            needed = sum(file.size_bytes for file in load_manifest(bundle).files)
        except BundleError as error:
            raise ApiError(409, str(error)) from error
        free = shutil.disk_usage(self._runs.data_dir).free
        if free < needed + SPARE_BYTES:
            sizes = f"about {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
            raise ApiError(507, f"the merged model takes {sizes}: make room on the disk of the data folder")

    async def _make_or_say_why(self, job: _Job) -> None:
        try:
            await self._make(job)
        except Exception as error:
            log.exception("the merge of run %s", job.run)
            job.merge = msgspec.structs.replace(job.merge, state="failed", reason=str(error))

    async def _make(self, job: _Job) -> None:
        # The one before goes first: there may be no room for both.
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
        job.folder.parent.mkdir(parents=True, mode=0o700)
        code, out, said = await self._run(job)
        if code == 0:
            archive = await asyncio.to_thread(Archive, job.folder, job.folder.name)
            archive.close()
            job.merge = msgspec.structs.replace(
                job.merge,
                state="ready",
                round=json.loads(out)["round"],
                size_bytes=archive.size_bytes,
                until=time.time() + KEEP_S,
            )
            asyncio.get_running_loop().call_later(KEEP_S, self._expire, job)
            return

        lines = said.decode(errors="replace").strip().splitlines() or [f"it ended with code {code}"]
        reason = re.sub(r"^.*?error: ", "", lines[-1])
        if code == -9:
            reason = "the kernel ended it, for want of memory: merge with hosl-cloud merge on a machine that has more"
        job.merge = msgspec.structs.replace(job.merge, state="failed", reason=reason)

    async def _run(self, job: _Job) -> tuple[int, bytes, bytes]:
        """Run the command; its exit code, and what it wrote to stdout and stderr."""
        data_dir = self._runs.data_dir.absolute()
        options = ["--out", job.folder, "--checkpoint", job.merge.checkpoint, "--data-dir", data_dir, "--json"]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hosl_cloud", "merge", job.run, *map(str, options)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd="/",
        )
        # Runs have the processor first, and memory: what a machine lacks, this process is to lack.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, 5)
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("900", encoding="ascii")
        try:
            out, said = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, out, said

    def _expire(self, job: _Job) -> None:
        if self._job is job:
            job.task = asyncio.create_task(self.clear())

    async def _ready(self, call: Call) -> _Job:
        run = (await asyncio.to_thread(self._runs.store.run, call.path["run"])).id
        job = self._job
        if job is None or job.run != run or job.merge.state != "ready":
            raise ApiError(409, f"there is no merged model of run {run}: merge it first")
        return job

    async def _archive(self, call: Call) -> Response:
        return await self._send(await self._ready(call))

    async def _ticket(self, call: Call) -> Ticket:
        job, now = await self._ready(call), time.time()
        self._tickets = {ticket: entry for ticket, entry in self._tickets.items() if entry[1] > now}
        ticket = secrets.token_urlsafe(32)
        self._tickets[ticket] = job, now + TICKET_S
        return Ticket(f"/v1/downloads/{ticket}", now + TICKET_S)

    async def _download(self, request: Request) -> Response:
        job, expires_at = self._tickets.pop(request.path_params["ticket"], (None, 0.0))
        if job is None or expires_at < time.time() or job is not self._job:
            return Response("this download is over: ask for it again on the status page\n", 404)
        try:
            return await self._send(job)
        except ApiError as error:
            return Response(f"{error}\n", error.status)

    async def _send(self, job: _Job) -> Response:
        try:
            archive = await asyncio.to_thread(Archive, job.folder, job.folder.name)
        except OSError as error:
            raise ApiError(409, f"the merged model is gone: {error}") from error
        headers = {
            "Content-Disposition": f'attachment; filename="{job.run}-round-{job.merge.round}.tar"',
            "Content-Length": str(archive.size_bytes),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }
        return StreamingResponse(iter(archive), headers=headers, media_type=BYTES)
