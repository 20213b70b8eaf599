"""What a running agent says about itself: a JSON document over a unix socket, one for each name.

Served on the agent's event loop, so that an agent whose loop stands still does not answer. The socket also keeps a
second agent of the same name away: it finds the first one answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from hosl_edge.exceptions import ConnectionLost
from hosl_protocol.exceptions import SettingsError

SERVICE_FOLDER = Path("/run/hosl")
"""Where the agent of the systemd unit has its socket."""
TIMEOUT_S = 5.0

Document = dict[str, Any]


def status_folder(state_dir: Callable[[], str]) -> Path:
    """Where an agent puts its socket: systemd's runtime directory, or the state folder."""
    return Path(os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0] or state_dir())


@contextlib.asynccontextmanager
async def serve_status(folder: Path, name: str, document: Callable[[], Document]) -> AsyncIterator[None]:
    """Answer everyone of this user who connects with the document. Raises SettingsError where another agent does."""

    def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(document()).encode() + b"\n")
        writer.close()

    folder.mkdir(parents=True, exist_ok=True)
    listener = _bind(folder, name)
    server = await asyncio.start_unix_server(answer, sock=listener)
    try:
        yield
    finally:
        server.close()
        with contextlib.suppress(OSError):
            (folder / f"{name}.sock").unlink()


def _bind(folder: Path, name: str) -> socket.socket:
    with _address(folder, name) as address:
        # Asked, not locked: the socket of a killed agent stays in the folder, and nobody answers.
        if (other := _connect(address)) is not None:
            other.close()
            raise SettingsError("name", name, "another hosl-edge runs under it; choose another --name")
        with contextlib.suppress(FileNotFoundError):
            Path(address).unlink()  # of an agent that was killed
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        Path(address).chmod(0o600)  # nobody can connect before it listens
    return listener


def read_status(folders: list[Path], name: str) -> Document:
    """Ask the agent of that name, or the only one, for its document. Raises ConnectionLost where none answers."""
    others: set[str] = set()
    if not name:
        found = [path for folder in folders if folder.is_dir() for path in folder.glob("*.sock")]
        name = found[0].stem if len(found) == 1 else ""

    for folder in folders:
        try:
            others |= {path.stem for path in folder.glob("*.sock")}
            with _address(folder, name) as address:
                connection = _connect(address)
        except FileNotFoundError:
            continue
        except PermissionError as error:
            raise ConnectionLost(f"{folder} is another user's: use sudo") from error
        if connection is not None:
            return _receive(connection)

    others.discard(name)  # what one that was killed has left
    hint = f"there are: {', '.join(sorted(others))}" if others else "is it running, and with this state_dir?"
    who, where = f"hosl-edge named {name}" if name else "hosl-edge", " or ".join(map(str, folders))
    raise ConnectionLost(f"no {who} answers in {where}; {hint}")


def readable(document: Document) -> Iterator[tuple[str, str]]:
    """Yield names and values for people: rounded, with their units."""
    for name, value in document.items():
        if name.endswith("_bytes"):
            yield name.removesuffix("_bytes"), _text(value, lambda count: f"{count / 1e6:.1f} MB")
        elif name in ("step_seconds", "next_try_s"):
            yield name.rpartition("_")[0], _text(value, lambda seconds: f"{seconds:.2f} s")
        elif name == "temperature_c":
            yield "temperature", _text(value, lambda degrees: f"{degrees:.1f} °C")
        elif name == "accuracy":
            yield name, _text(value, lambda share: f"{100 * share:.1f} %")
        elif name == "loss":
            yield name, _text(value, lambda loss: f"{loss:.4f}")
        else:
            yield name, _text(value, lambda other: ", ".join(other) if isinstance(other, list) else str(other))


def _text(value: Any, show: Callable[[Any], str]) -> str:
    """Show a value, and nothing for what is not known."""
    return "" if value is None else show(value)


def _receive(connection: socket.socket) -> Document:
    with connection, connection.makefile("rb") as file:
        try:
            document: Document = json.loads(file.read())
        except (OSError, ValueError) as error:
            raise ConnectionLost(f"the agent did not answer: {error}") from error
    return document


def _connect(address: str) -> socket.socket | None:
    """Connect to an agent; None where nobody listens any more."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT_S)

    try:
        connection.connect(address)
    except (ConnectionRefusedError, FileNotFoundError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _address(folder: Path, name: str) -> Iterator[str]:
    """Make a short address of a socket: it has 107 bytes at most, and a folder's path may be longer."""
    opened = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{opened}/{name}.sock"
    finally:
        os.close(opened)
