"""Errors in Anthropic's shape: `{"type": "error", "error": {"type", "message"}}`, whole or as a stream event.

The HTTP status is the one the error has everywhere; only the words differ.
"""

from __future__ import annotations

from msgspec import UNSET
from starlette.exceptions import HTTPException

from freehold.errors import FreeholdError
from freehold.serve.messages.reply import MessageError, MessageErrorDetail, MessageErrorDetails
from freehold.serve.stream import sse
from freehold.serve.wire import encode_json, error_status

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_type(status: int) -> str:
    """Anthropic's word for an HTTP status."""
    return _TYPES.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")


def error_body(error: Exception) -> MessageError:
    """The body of an error. What was not raised on purpose is not described to the caller."""
    kind = error_type(error_status(error))
    match error:
        case FreeholdError():
            details = MessageErrorDetails(error.code, error.param)
            return MessageError(MessageErrorDetail(kind, error.message, details))
        case HTTPException():
            return MessageError(MessageErrorDetail(kind, str(error.detail), UNSET))
        case _:
            return MessageError(MessageErrorDetail(kind, "internal error; the server's log has it", UNSET))


def error_frame(error: Exception) -> bytes:
    """The stream event with which a stream that failed ends."""
    return sse(encode_json(error_body(error)), "error")
