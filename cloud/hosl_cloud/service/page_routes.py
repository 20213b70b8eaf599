"""The status page at `/`: fixed files without a secret in them. What the page shows it asks the HTTP API for."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

FOLDER = Path(__file__).parents[1] / "page"
PAGE = "index.html"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
VENDOR = ("vendor/uPlot.iife.min.js", "vendor/uPlot.min.css")
"""What the build takes from a registry; without it the page has no charts."""
SCRIPTS = (
    *("api", "charts", "classes", "curve", "dom", "forms", "model", "page"),
    *("settings", "show", "text", "tokens", "words"),
)
FILES = ("page.css", "icon.svg", *(f"{name}.js" for name in SCRIPTS), *VENDOR)
"""All that is served below /page/."""
POLICY = {
    "default-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "object-src": "'none'",
    "require-trusted-types-for": "'script'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """The page, and what it is made of."""
    return [Route("/", _page), Route("/page/{name:path}", _file)]


async def _page(request: Request) -> Response:
    return _respond(PAGE)


async def _file(request: Request) -> Response:
    name = request.path_params["name"]
    return _respond(name) if name in FILES else Response(status_code=404, headers=HEADERS)


def _respond(name: str) -> Response:
    path = FOLDER / name
    if not path.is_file():
        return Response(status_code=404, headers=HEADERS)
    return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=HEADERS)
