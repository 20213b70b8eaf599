"""How the commands talk to a running service: where it is, whom to trust, the admin's token, and JSON."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hosl_cloud.exceptions import RequestError, ServiceError
from hosl_cloud.service.secrets import ADMIN_TOKEN_FILE, read_secret
from hosl_cloud.storage.data_folder import SERVICE_FILE
from hosl_protocol.program.proxies import Proxy, find_proxy, proxy_handler, through

T = TypeVar("T")

TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 64 * 1024 * 1024

_REASONS = {
    401: "it does not know the admin token: copy the file admin-token of its data folder again",
    403: "this token may not do that: the admin's may",
    404: "it has no such thing",
    429: "too many requests from this address: try again later",
}


@dataclass(frozen=True)
class ApiClient:
    """A service's HTTP API."""

    address: str
    """`wss://host:port`, as devices are given it, or `https://`."""
    admin_token: str = field(repr=False)
    ca: Path | None = None
    """The CA that vouches for the service; None trusts the system's."""
    proxy: Proxy | None = None
    """What stands between; None for the straight way."""

    def request(self, method: str, path: str, body: object = None) -> Any:
        """The decoded answer. Raises RequestError."""
        return self._ask(method, path, body, lambda response: json.loads(response.read(MAX_ANSWER_BYTES) or b"null"))

    def download(self, path: str, target: Path) -> None:
        """Fetch a file; `target` appears when it is whole. Raises RequestError."""
        part = target.with_name(target.name + ".part")

        # A connection that breaks ends a body early without an error; only the length tells.
        def save(response: Any) -> None:
            with part.open("wb") as file:
                shutil.copyfileobj(response, file)
            if part.stat().st_size != int(response.headers["Content-Length"]):
                raise http.client.IncompleteRead(b"")
            part.replace(target)

        try:
            self._ask("GET", path, None, save)
        finally:
            part.unlink(missing_ok=True)

    def _ask(self, method: str, path: str, body: object, read: Callable[[Any], T]) -> T:
        url = self.address.replace("ws", "http", 1).rstrip("/") + path
        headers = {"Authorization": f"Bearer {self.admin_token}"}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"

        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with self._opener(url).open(request, timeout=TIMEOUT_S) as response:
                return read(response)
        except urllib.error.HTTPError as error:
            with error:
                raise RequestError(error.code, f"{self.address} refused: {_reason(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            problem = self._explain(getattr(error, "reason", error))
            raise RequestError(0, f"cannot reach {url}{through(self.proxy)}: {problem}") from error
        except ValueError as error:
            raise RequestError(0, f"{url} answered with what is not JSON: is it a hosl service?") from error

    def _explain(self, reason: object) -> str:
        if not isinstance(reason, ssl.SSLCertVerificationError):
            if self.proxy is not None:
                return f"{reason}; see that the proxy lets this machine there, or name the service's host in no_proxy"
            return f"{reason}; is the service running?"
        remedy = (
            "give --ca FILE, tls/ca.pem of its data folder" if self.ca is None else f"{self.ca} is of another service"
        )
        return (
            f"certificate verify failed, {reason.verify_message}: {remedy}, or use a name that its certificate is for"
        )

    def _opener(self, url: str) -> urllib.request.OpenerDirector:
        handlers: list[urllib.request.BaseHandler] = [NoRedirects(), proxy_handler(self.proxy)]
        if url.startswith("https:"):
            cafile = None if self.ca is None else str(self.ca)
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=cafile)))
        return urllib.request.build_opener(*handlers)


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A token goes nowhere but where it was meant to."""

    def redirect_request(self, *arguments: Any) -> None:
        """Follow none."""


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the service is, beside `--data-dir`."""
    parser.add_argument(
        "--server", metavar="URL", help="the service's address (default: $HOSL_SERVER, or that of --data-dir)"
    )
    parser.add_argument("--ca", type=Path, metavar="FILE", help="its CA's certificate (default: that of --data-dir)")
    parser.add_argument(
        "--admin-token-file",
        type=Path,
        metavar="FILE",
        help="file with the admin token (default: $HOSL_ADMIN_TOKEN, or that of --data-dir)",
    )


def client_of(options: argparse.Namespace) -> ApiClient:
    """The client that the options describe. Raises ServiceError."""
    address = _named_server(options) or service_file(options.data_dir)["address"]
    if not address.startswith(("ws://", "wss://", "http://", "https://")):
        raise ServiceError(f"--server {address}: use wss://host:port, as hosl-cloud serve prints it")

    # The data folder's CA also where the service is named: it may be this machine's by another name.
    ca = options.ca or options.data_dir / "tls" / "ca.pem"
    if options.ca is not None and not ca.is_file():
        raise ServiceError(f"--ca {ca} does not exist")
    proxy = None if is_local(options) else find_proxy(address)
    return ApiClient(address, _admin_token(options), ca if ca.is_file() else None, proxy)


def _named_server(options: argparse.Namespace) -> str:
    return options.server or os.environ.get("HOSL_SERVER") or ""


def is_local(options: argparse.Namespace) -> bool:
    """Tell whether the service is that of the data folder."""
    return not _named_server(options)


def service_file(data_dir: Path) -> dict[str, str]:
    """Where the data folder's service is: `address`, and `public_address` for devices elsewhere."""
    path = data_dir / SERVICE_FILE
    try:
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = "start hosl-cloud serve, or name one with --server"
        raise RequestError(0, f"no service runs in {data_dir}: {remedy}") from None
    except ValueError as error:
        raise ServiceError(f"{path} is damaged: start the service again") from error
    return found


def _admin_token(options: argparse.Namespace) -> str:
    if options.admin_token_file is None and (token := os.environ.get("HOSL_ADMIN_TOKEN")):
        return token
    path = options.admin_token_file or options.data_dir / ADMIN_TOKEN_FILE
    if not path.exists():
        remedy = "give --admin-token-file FILE, a copy of admin-token of the service's data folder"
        raise ServiceError(f"{path} does not exist: {remedy}")
    return read_secret(path)


def _reason(error: urllib.error.HTTPError) -> str:
    """Read the service's own reason, or else say what the status means."""
    try:
        said = _REASONS[error.code] if error.code in (401, 403) else json.loads(error.read(MAX_ANSWER_BYTES))["error"]
    except (OSError, ValueError, KeyError, TypeError):
        said = _REASONS.get(error.code, f"{error.code} {error.reason}")
    return " ".join(str(said).split())[:1000]
