"""A real HTTP proxy, as companies have them: it tunnels, forwards plain requests, and can ask for a password.

Whatever host it is asked for, it connects to this machine: names of others need not exist.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Forwarder:
    """Where it is, and what it was asked."""

    port: int = 0
    login: str = ""
    """`user:password` that it wants."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method, and host and port, or the whole address."""

    @property
    def address(self) -> str:
        """As it stands in `https_proxy`."""
        return f"http://{self.login + '@' * bool(self.login)}127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, forwarder: Forwarder, *rest: object) -> None:
        self.forwarder = forwarder
        super().__init__(*rest)  # type: ignore[arg-type]

    def _may_pass(self) -> bool:
        self.forwarder.asked.append((self.command, self.path))
        wanted = "Basic " + base64.b64encode(self.forwarder.login.encode()).decode()
        if self.forwarder.login and self.headers["Proxy-Authorization"] != wanted:
            self.send_error(407)
            return False
        return True

    def do_CONNECT(self) -> None:
        if not self._may_pass():
            return
        with socket.create_connection(("127.0.0.1", int(self.path.rpartition(":")[2]))) as upstream:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_pump, args=(upstream, self.connection))
            back.start()
            _pump(self.connection, upstream)
            back.join()
        self.close_connection = True

    def do_GET(self) -> None:
        if not self._may_pass():
            return
        url = urlsplit(self.path)
        upstream = http.client.HTTPConnection("127.0.0.1", url.port or 80)
        headers = {name: value for name, value in self.headers.items() if not name.lower().startswith("proxy-")}
        upstream.request(self.command, url._replace(scheme="", netloc="").geturl(), headers=headers)
        answer = upstream.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        upstream.close()

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def forwarding(login: str = "") -> Iterator[Forwarder]:
    """The proxy on a free port."""
    forwarder = Forwarder(login=login)
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *rest: _Handler(forwarder, *rest))
    server.daemon_threads = True
    server.handle_error = lambda request, address: None  # type: ignore[method-assign]
    forwarder.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield forwarder
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
