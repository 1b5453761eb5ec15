"""What the gateway itself answers: errors in the shape of the API that was asked, whole or as the end of a stream.

OpenAI: `{"error": {"message", "type", "param", "code"}}`; Anthropic: `{"type": "error", "error": {"type", "message"}}`.
A stream that has begun and fails ends with an error as an event, which both SDKs raise, never by just closing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from freehold.errors import BudgetExhausted, FreeholdError
from freehold.gateway.call import Endpoint
from freehold.gateway.parts import Header

INTERNAL = "the gateway failed on an internal error; its log has it"

_ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

encode = msgspec.json.encode


def as_freehold(error: Exception) -> FreeholdError:
    """The error itself, or what a caller is told of one that nobody foresaw."""
    return error if isinstance(error, FreeholdError) else FreeholdError(INTERNAL)


def error_body(error: FreeholdError, endpoint: Endpoint | None, request_id: str = "") -> bytes:
    """The JSON of an error. endpoint: what was asked; None: no API of a model."""
    if endpoint == "messages":
        return encode(_anthropic(error) | ({"request_id": request_id} if request_id else {}))
    return encode(_openai(error))


def error_event(error: FreeholdError, endpoint: Endpoint) -> bytes:
    """The event with which a stream that failed ends."""
    if endpoint == "messages":
        return b"event: error\ndata: " + encode(_anthropic(error)) + b"\n\n"
    if endpoint == "responses":
        data = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return b"event: error\ndata: " + encode(data) + b"\n\n"
    return b"data: " + encode(_openai(error)) + b"\n\n"


def error_headers(error: FreeholdError) -> list[Header]:
    """`retry-after`, `retry-after-ms` and `x-should-retry`, which the SDKs obey, and what the error itself brings."""
    headers: list[Header] = list(getattr(error, "headers", ()))
    if error.retry_after is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after))).encode()))
        headers.append((b"retry-after-ms", str(max(1, math.ceil(error.retry_after * 1000))).encode()))
    if isinstance(error, BudgetExhausted):
        headers.append((b"x-should-retry", b"false"))
    return _once(headers)


def _once(headers: list[Header]) -> list[Header]:
    return list({name: (name, value) for name, value in reversed(headers)}.values())[::-1]


def _openai(error: FreeholdError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def _anthropic(error: FreeholdError) -> dict[str, Any]:
    status = error.status
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
