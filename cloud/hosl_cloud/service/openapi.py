"""What the HTTP API is made of: operations that take a decoded body and return a struct, and their OpenAPI document.

A new operation is one more entry of runs_api.py or devices_api.py. Its route, the check of the token, the decoding of
its body, the statuses of its errors, and its part of the document follow from the entry.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from hosl_cloud.exceptions import ApiError, RunNotFound, StoreError
from hosl_cloud.service.access import Authenticator, Denied, Endpoint
from hosl_cloud.service.limits import read_body
from hosl_protocol.exceptions import HoslError

JSON = "application/json"
BYTES = "application/octet-stream"


class Problem(msgspec.Struct, frozen=True):
    """Why a request was refused."""

    error: str


@dataclass(frozen=True)
class Query:
    """A whole number in the query, with its bounds and default."""

    name: str
    default: int
    most: int
    description: str


@dataclass(frozen=True)
class Call:
    """A request, taken apart."""

    path: dict[str, str]
    body: Any
    query: dict[str, int]


@dataclass(frozen=True)
class Operation:
    """One method of one path; all are the admin's."""

    method: str
    path: str
    summary: str
    handle: Callable[[Call], Awaitable[Any]]
    """Returns the answer; a Path is sent as a file, a Response as it is. Raises HoslError."""
    answer: type | None = None
    """None: a file, or with status 204 nothing."""
    body: type | None = None
    status: int = 200
    queries: tuple[Query, ...] = ()
    refusals: tuple[int, ...] = ()
    """Statuses beside those that every operation may have."""


async def refuse(request: Request, error: Exception) -> Response:
    """Answer a request for a path that is not there, or a method that it does not have."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def make_routes(operations: Sequence[Operation], authenticator: Authenticator) -> list[Route]:
    """Make the operations' routes, and the one of the document that describes them."""
    document = msgspec.json.encode(describe(operations))

    async def openapi(request: Request) -> Response:
        return Response(document, media_type=JSON)

    by_path: dict[str, list[Operation]] = {}
    for operation in operations:
        by_path.setdefault(operation.path, []).append(operation)
    routes = [
        Route(path, _endpoint(several, authenticator), methods=[each.method for each in several])
        for path, several in by_path.items()
    ]
    return [Route("/v1/openapi.json", openapi), *routes]


def _endpoint(operations: Sequence[Operation], authenticator: Authenticator) -> Endpoint:
    by_method = {operation.method: operation for operation in operations}
    decoders: dict[str, msgspec.json.Decoder[Any]] = {
        each.method: msgspec.json.Decoder(each.body) for each in operations if each.body is not None
    }

    async def endpoint(request: Request) -> Response:
        # Who may not ask is refused before a body is read, or anything is looked up.
        operation = by_method["GET" if request.method == "HEAD" else request.method]
        try:
            authenticator.check_admin(request)
            decoder = decoders.get(operation.method)
            body = None if decoder is None else await _read_json(request, decoder)
            query = {query.name: _read_query(request, query) for query in operation.queries}
            return _respond(operation, await operation.handle(Call(request.path_params, body, query)))
        except Denied as denied:
            return JSONResponse({"error": denied.reason}, denied.status, headers=denied.headers)
        except HoslError as error:
            return JSONResponse({"error": str(error)}, _status_of(error))

    return endpoint


def _respond(operation: Operation, answer: Any) -> Response:
    if operation.status == 204:
        return Response(status_code=204)
    if isinstance(answer, Response):
        return answer
    if operation.answer is None:
        return FileResponse(answer, media_type=BYTES, filename=answer.name)
    headers = {"Cache-Control": "no-store"}  # a device's token may be in it
    return Response(msgspec.json.encode(answer), operation.status, headers=headers, media_type=JSON)


def _status_of(error: HoslError) -> int:
    if isinstance(error, ApiError):
        return error.status
    if isinstance(error, StoreError):
        return 503
    return 404 if isinstance(error, RunNotFound) else 422


async def _read_json(request: Request, decoder: msgspec.json.Decoder[Any]) -> Any:
    """Read the body of a request. Raises ApiError: another site's page can send no form of this content type."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise ApiError(415, "send the body as application/json")
    body = await read_body(request)
    if body is None:
        raise ApiError(413, "the body is too long, or came too slowly")
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(422, f"the body cannot be used: {error}") from error


def _read_query(request: Request, query: Query) -> int:
    text = request.query_params.get(query.name)
    if text is None:
        return query.default
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) > query.most:
        raise ApiError(422, f"{query.name} is {text[:40]!r}: use a whole number from 0 to {query.most}")
    return int(text)


def describe(operations: Sequence[Operation]) -> dict[str, Any]:
    """Make the OpenAPI 3.1 document."""
    types = [Problem, *(kind for each in operations for kind in (each.answer, each.body) if kind is not None)]
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _describe(operation)

    return {
        "openapi": "3.1.0",
        "info": {"title": "hosl-cloud", "version": importlib.metadata.version("hosl")},
        "security": [{"admin": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"admin": {"type": "http", "scheme": "bearer", "description": "The admin token."}},
        },
    }


def _describe(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {"summary": operation.summary, "operationId": _id_of(operation)}

    names = re.findall(r"{(\w+)}", operation.path)
    parameters = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
    for query in operation.queries:
        schema = {"type": "integer", "minimum": 0, "maximum": query.most, "default": query.default}
        parameters.append({"name": query.name, "in": "query", "description": query.description, "schema": schema})
    if parameters:
        described["parameters"] = parameters

    # What may be refused follows from what is asked for.
    refusals = {401, 403, 429, *operation.refusals}
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _content(operation.body)}
        refusals |= {413, 415, 422}
    if operation.queries:
        refusals.add(422)
    if names:
        refusals.add(404)

    answer: dict[str, Any] = {"description": "Done."}
    if operation.answer is not None:
        answer["content"] = _content(operation.answer)
    elif operation.status != 204:
        answer["content"] = {BYTES: {}}
    problem = {"description": "Refused; the body says why.", "content": _content(Problem)}
    described["responses"] = {str(operation.status): answer} | {str(status): problem for status in sorted(refusals)}
    return described


def _content(kind: type) -> dict[str, Any]:
    return {JSON: {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}


def _id_of(operation: Operation) -> str:
    parts = re.findall(r"\w+", operation.path.removeprefix("/v1"))
    return "_".join([operation.method.lower(), *parts])
