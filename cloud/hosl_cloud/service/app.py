"""Everything the service answers on its port, put together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from hosl_cloud import metrics
from hosl_cloud.runs.queue import RunQueue
from hosl_cloud.service.access import Authenticator, guarded
from hosl_cloud.service.device_routes import DeviceRoutes
from hosl_cloud.service.openapi import Operation, make_routes, refuse
from hosl_cloud.service.page_routes import page_routes


def make_app(
    runs: RunQueue,
    authenticator: Authenticator,
    operations: Sequence[Operation],
    ca: Path | None = None,
    open_routes: Sequence[Route] = (),
) -> Starlette:
    """Put all routes together. The page's files, health and the CA's certificate are open, and so are `open_routes`;
    the rest needs a token."""

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        reasons = await asyncio.to_thread(runs.troubles)
        return PlainTextResponse("".join(f"{reason}\n" for reason in reasons) or "ok\n", 503 if reasons else 200)

    async def ca_certificate(request: Request) -> Response:
        return Response(status_code=404) if ca is None else FileResponse(ca, media_type="application/x-pem-file")

    async def figures(request: Request) -> Response:
        metrics.count_runs(await asyncio.to_thread(runs.store.states))
        return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[
            *page_routes(),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/v1/ca.pem", ca_certificate),
            *open_routes,
            *make_routes(operations, authenticator),
            Route("/metrics", guarded(figures, authenticator.check_metrics)),
            *DeviceRoutes(runs, authenticator).routes(),
        ],
        exception_handlers={HTTPException: refuse},
    )
