"""The server's own OpenAPI document, made from the request and response structs: it cannot say what they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from freehold import __version__
from freehold.serve.wire import ErrorBody, error_body

_REF = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True)
class Operation:
    """One route, as the document and the error handlers need it. Every API module exports a tuple `OPERATIONS`.

    request, response, event: structs of the body, the JSON answer, and one event of the stream (if it can stream).
    last: what a stream ends with, where that is not JSON.
    errors: how this API says that something went wrong, and the struct that it says it in.
    """

    method: Literal["GET", "POST"]
    path: str
    summary: str
    request: Any = None
    response: Any = None
    event: Any = None
    last: str | None = None
    errors: Callable[[Exception], object] = error_body
    error: Any = ErrorBody
    text: str | None = None  # media type of an answer that is not JSON
    open: bool = False  # needs no API key


def document(operations: Iterable[Operation], *, with_keys: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document. with_keys: the server asks for API keys."""
    operations = list(operations)
    types = dict.fromkeys(
        t for op in operations for t in (op.request, op.response, op.event, op.error) if t is not None
    )
    schemas, components = msgspec.json.schema_components(list(types), ref_template=_REF)
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schema_of, with_keys)
    body: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Freehold", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": components},
    }
    if with_keys:
        body["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    return body


def _operation(operation: Operation, schema_of: dict[Any, Any], with_keys: bool) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.text is not None:
        content[operation.text] = {"schema": {"type": "string"}}
    if operation.response is not None:
        content["application/json"] = {"schema": schema_of[operation.response]}
    if operation.event is not None:
        # OpenAPI 3.1 has no words for the items of a stream; tools take the schema as that of one event.
        content_schema = {"anyOf": [schema_of[operation.event], schema_of[operation.error]]}
        data: dict[str, Any] = {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": content_schema,
        }
        if operation.last is not None:
            data = {"anyOf": [data, {"const": operation.last}]}
        event = {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    error = {"application/json": {"schema": schema_of[operation.error]}}
    body: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": _operation_id(operation),
        "responses": {
            "200": {"description": "done", "content": content},
            "default": {"description": "an error", "content": error},
        },
    }
    if operation.request is not None:
        request = {"application/json": {"schema": schema_of[operation.request]}}
        body["requestBody"] = {"required": True, "content": request}
    names = [part.strip("{}") for part in operation.path.split("/") if part.startswith("{")]
    if names:
        body["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if with_keys and not operation.open:
        body["security"] = [{"bearer": []}, {"header": []}]
    return body


def _operation_id(operation: Operation) -> str:
    words = [part.strip("{}") for part in operation.path.split("/") if part not in ("", "v1")]
    return "_".join([operation.method.lower(), *words]).replace(".", "_").replace("-", "_")
