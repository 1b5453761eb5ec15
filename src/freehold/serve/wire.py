"""JSON in, JSON out: strict request decoding, error bodies, warning headers and request ids.

Streaming is in `stream.py`. Every API module uses both: `request = await read_json(...)`, `decode(...)`, then a
`json_response` or a `stream.EventStream`. Errors are raised (`freehold.errors`, or starlette's HTTPException for
what is wrong with the HTTP itself); `app.py` turns them into bodies with `error_response`.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from freehold.errors import FreeholdError, InvalidRequest, UnknownField, UnsupportedField
from freehold.serve.fields import FIELDS, REFUSED_VALUES, Action, Rule

WARNING_HEADER = "x-freehold-warning"
REQUEST_ID_HEADER = "x-request-id"
MAX_WARNING_BYTES = 2048  # proxies refuse long headers

logger = logging.getLogger("freehold.serve")

THREAD_ABOVE_BYTES = 32 * 1024  # takes milliseconds to tokenise

T = TypeVar("T")
_encoder = msgspec.json.Encoder()
encode_json = _encoder.encode


def new_id(prefix: str) -> str:
    """A fresh id: `chatcmpl-` and 24 hex digits, for instance."""
    return f"{prefix}{secrets.token_hex(12)}"


# ---- bodies ------------------------------------------------------------------------------------------------


class Body(Struct, frozen=True):
    """A parsed request body. size is in bytes; callers use it to keep long work off the event loop."""

    value: Any
    size: int


async def read_json(request: Request, max_bytes: int) -> Body:
    """Read and parse a JSON body.

    Raises HTTPException 413 (too large), 415 (not application/json) and InvalidRequest (not JSON).
    A content type is required because a web page can send any other one across origins without asking first.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        sent = f"not {content_type}" if content_type else "but none was sent"
        raise HTTPException(415, f"content-type must be application/json, {sent}")
    data = await _read_body(request, max_bytes)
    try:
        return Body(msgspec.json.decode(data), len(data))
    except RecursionError:
        raise InvalidRequest("the body is not acceptable JSON: nested too deeply") from None
    except ValueError as error:  # msgspec.DecodeError and UnicodeDecodeError are ValueErrors
        raise InvalidRequest(f"the body is not JSON: {error}") from None


async def _read_body(request: Request, max_bytes: int) -> bytes:
    too_large = HTTPException(413, f"the body is larger than {max_bytes:,} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def in_thread_if_large(size: float, function: Callable[..., T], *args: Any) -> T:
    """Call `function(*args)`; in a thread if its input of `size` bytes would hold up the event loop."""
    if size > THREAD_ABOVE_BYTES:
        return await asyncio.to_thread(function, *args)
    return function(*args)


# ---- strict decoding ---------------------------------------------------------------------------------------


class Decoded(Struct, Generic[T], frozen=True):
    """A request and the warnings about what it asked for in vain."""

    value: T
    warnings: tuple[str, ...]


def decode(raw: object, type_: type[T], endpoint: str) -> Decoded[T]:
    """Turn parsed JSON into a request struct, strictly.

    type_ and the structs in it must have `forbid_unknown_fields=True`. Fields in `fields.FIELDS[endpoint]` are
    taken out of `raw` (which is modified). Raises UnknownField, UnsupportedField or InvalidRequest with `param`
    the path of the field, such as `messages[0].content`.
    """
    _describe(type_)
    rules = FIELDS[endpoint]
    warnings: list[str] = []
    while True:  # once more for each table entry that is met, so bounded by the table
        try:
            return Decoded(msgspec.convert(raw, type_, str_keys=True), tuple(warnings))
        except msgspec.ValidationError as error:
            path, unknown, problem = _explain(error)
            rule = rules.get(_generic(path)) if unknown else None
            if rule is None:
                raise _refusal(path, unknown, problem, type_, rules) from None
            if _apply(rule, raw, path):
                warnings.append(f"{_generic(path)} is ignored: {rule.why}")
        except RecursionError:
            raise InvalidRequest("the body is nested too deeply") from None


_described: set[type] = set()
_describing = threading.Lock()


def _describe(type_: type) -> None:
    """Have msgspec describe a type to itself before it is used.

    It does so at the first use, not safely: a second thread that comes meanwhile finds half a description and crashes
    (msgspec 0.22). So one thread goes first.
    """
    if type_ not in _described:
        with _describing:
            msgspec.json.Decoder(type_)
            _described.add(type_)


_PROBLEM = re.compile(r"^(?P<problem>.*?)(?: - at (?:`key` in )?`(?P<path>\$[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"^Object (?P<kind>contains unknown|missing required) field `(?P<name>.*)`$", re.DOTALL)
_VALUE = re.compile(r"^Invalid (?:enum )?value (?P<value>.*)$", re.DOTALL)
_WORDS = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_WORD = re.compile(r"`(?P<words>[^`]*)`")


def _explain(error: msgspec.ValidationError) -> tuple[str, bool, str]:
    """(path of the field, whether it is an unknown field, the problem in JSON's words)."""
    match = _PROBLEM.match(str(error))
    assert match is not None  # the pattern matches every string
    problem, path = match["problem"], (match["path"] or "$")[1:].lstrip(".")
    if (field := _FIELD.match(problem)) is None:
        return path, False, _WORD.sub(lambda m: _in_json_words(m["words"]), problem)
    full = f"{path}.{field['name']}" if path else field["name"]
    return full, field["kind"] == "contains unknown", "is required"


def _in_json_words(words: str) -> str:
    return " | ".join(_WORDS.get(word, word) for word in words.split(" | "))


def _generic(path: str) -> str:
    """`messages[3].name` → `messages[].name`."""
    return re.sub(r"\[[^\]]*\]", "[]", path)


def _refusal(path: str, unknown: bool, problem: str, type_: type, rules: Mapping[str, Rule]) -> InvalidRequest:
    if not unknown:
        value = _VALUE.match(problem)
        if value is not None:
            reason = REFUSED_VALUES.get(value["value"])
            problem = f"{value['value']} is not supported" + (f": {reason}" if reason else "")
        return InvalidRequest(f"{path or 'the body'}: {problem}", param=path or None)
    known = list(getattr(type_, "__struct_encode_fields__", ())) + [p for p in rules if "." not in p]
    close = difflib.get_close_matches(path, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return UnknownField(f"{path} is not a field of this API{hint}", param=path)


def _apply(rule: Rule, raw: object, path: str) -> bool:
    """Take the field out of every object that has it. Returns whether a warning is due; raises UnsupportedField."""
    warn = False
    for owner, name, exact in list(_holders(raw, _generic(path).split("."), "")):
        value = owner.pop(name)
        if rule.allows(value):
            continue
        if rule.action is Action.REFUSE:
            raise UnsupportedField(f"{exact} is not supported: {rule.why}", param=exact)
        warn = True
    return warn


def _holders(node: Any, steps: list[str], at: str) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Every (object, key, exact path) that the generic path names."""
    name = steps[0].removesuffix("[]")
    if not isinstance(node, dict) or name not in node:
        return
    here = f"{at}.{name}" if at else name
    if len(steps) == 1:
        yield node, name, here
        return
    child = node[name]
    if not steps[0].endswith("[]"):
        yield from _holders(child, steps[1:], here)
    elif isinstance(child, list):
        for index, item in enumerate(child):
            yield from _holders(item, steps[1:], f"{here}[{index}]")


# ---- responses ---------------------------------------------------------------------------------------------


class ErrorDetail(Struct, frozen=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct, frozen=True):
    error: ErrorDetail


_HTTP_CODES = {
    400: "bad_request",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
}


def error_body(error: Exception) -> ErrorBody:
    """An error in OpenAI's shape. What was not raised on purpose is not described to the caller."""
    match error:
        case FreeholdError():
            return ErrorBody(ErrorDetail(error.message, error.type, error.param, error.code))
        case HTTPException():
            code = _HTTP_CODES.get(error.status_code, "http_error")
            kind = "invalid_request_error" if error.status_code < 500 else "server_error"
            return ErrorBody(ErrorDetail(str(error.detail), kind, None, code))
        case _:
            return ErrorBody(ErrorDetail("internal error; the server's log has it", "server_error", None, None))


def error_headers(error: Exception) -> dict[str, str]:
    """`retry-after` in whole seconds, and what the HTTP error itself brings (such as `allow`)."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException) and error.headers:
        headers.update(error.headers)
    if isinstance(error, FreeholdError):
        if error.retry_after is not None:
            headers["retry-after"] = str(max(1, round(error.retry_after)))
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
    return headers


def error_status(error: Exception) -> int:
    match error:
        case FreeholdError():
            return error.status
        case HTTPException():
            return error.status_code
        case _:
            return 500


def log_failure(where: str, error: Exception) -> None:
    """Log a failure that is not the caller's, with the traceback of what was not foreseen."""
    if error_status(error) == 500:
        unforeseen = error.__cause__ if isinstance(error, FreeholdError) else error
        logger.error("%s: %s", where, error, exc_info=unforeseen)


def error_response(request: Request, error: Exception) -> Response:
    """The HTTP response to an error, in OpenAI's shape."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it; it ends the cycle and shows in the access log
    return json_response(request, error_body(error), status=error_status(error), headers=error_headers(error))


def common_headers(request: Request, warnings: Iterable[str] = ()) -> dict[str, str]:
    """`x-request-id`, and `x-freehold-warning` if there is something to say."""
    headers = {REQUEST_ID_HEADER: request_id(request)}
    if text := "; ".join(dict.fromkeys(warnings)):
        printable = "".join(c if " " <= c <= "~" else "?" for c in text)
        headers[WARNING_HEADER] = printable[:MAX_WARNING_BYTES]
    return headers


def request_id(request: Request) -> str:
    """The id of this HTTP request: made once, returned in a header, and the root of the engine's request ids."""
    state = request.scope.setdefault("state", {})
    if "request_id" not in state:
        state["request_id"] = new_id("req-")
    return str(state["request_id"])


def json_response(
    request: Request,
    body: object,
    *,
    warnings: Iterable[str] = (),
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Encode a struct (or builtins) as the JSON response."""
    all_headers = common_headers(request, warnings) | dict(headers or {})
    return Response(encode_json(body), status, all_headers, media_type="application/json")


def unset_if_none(value: T | None) -> T | UnsetType:
    """Leave a field out of the JSON instead of writing null."""
    return UNSET if value is None else value
