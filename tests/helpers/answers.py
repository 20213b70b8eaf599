"""A real HTTP or HTTPS server whose answers a test chooses."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Answers:
    """What it answers by path, and what it was asked."""

    port: int = 0
    by_path: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    """Status, headers and body; 404 where there is none."""
    token: str | None = None
    """Where given, all but /healthz need it."""
    date: str | None = None
    """Its Date header, in the place of the true one."""
    asked: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, answers: Answers, *rest: object) -> None:
        self.answers = answers
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.answers.asked.append(self.path)
        status, headers, body = self.answers.by_path.get(self.path, (404, {}, b""))
        is_known = self.headers["Authorization"] == f"Bearer {self.answers.token}"
        if self.answers.token is not None and self.path != "/healthz" and not is_known:
            status, headers, body = 401, {}, b""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def date_time_string(self, timestamp: float | None = None) -> str:
        return self.answers.date or super().date_time_string(timestamp)  # type: ignore[arg-type]

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def answering(certificate: tuple[Path, Path] | None = None) -> Iterator[Answers]:
    """The server on a free port, with TLS where there is a certificate and its key."""
    answers = Answers()
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *rest: _Handler(answers, *rest))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda request, address: None  # type: ignore[method-assign]
    answers.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield answers
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
