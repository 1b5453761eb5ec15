"""Strict decoding names the field; bodies that are not JSON, too large or of another type are refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from freehold.errors import (
    ContextTooLong,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
    UnknownField,
    UnsupportedField,
)
from freehold.serve import wire
from freehold.serve.schema import ChatRequest
from freehold.serve.wire import decode, error_body, error_headers, error_status, read_json

USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [dict(USER)], **fields}


def post(*parts: bytes, headers: dict[str, str] | None = None) -> Request:
    """A POST request whose body arrives in these parts."""
    sent = {"content-type": "application/json"} if headers is None else headers
    raw = [(name.encode(), value.encode()) for name, value in sent.items()]

    async def messages() -> AsyncIterator[dict[str, Any]]:
        for part in parts:
            yield {"type": "http.request", "body": part, "more_body": True}
        yield {"type": "http.request", "body": b"", "more_body": False}

    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, messages().__anext__)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (chat(temperature=3), "temperature", "number <= 2.0"),
        (chat(temperature=float("nan")), "temperature", "number"),
        (chat(top_p=0), "top_p", "number > 0"),
        (chat(n=0), "n", "integer >= 1"),
        (chat(n=True), "n", "got boolean"),
        (chat(max_tokens=131_073), "max_tokens", "<= 131072"),
        (chat(seed=2**70), "seed", "integer"),
        (chat(stop=["a", 4]), "stop[1]", "got integer"),
        (chat(stop=["x"] * 17), "stop", "length <= 16"),
        (chat(stop=""), "stop", "length >= 1"),
        (chat(logit_bias={"a": 1}), "logit_bias", "integer"),
        (chat(logit_bias={"5": 101}), "logit_bias[...]", "<= 100"),
        (chat(stream_options={"include_usage": 1}), "stream_options.include_usage", "boolean"),
        ({"messages": []}, "messages", "length >= 1"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "is required"),
        ({"messages": [USER, {"role": "tool", "content": 5}]}, "messages[1].content", "got integer"),
        ({"messages": [{"role": "function", "content": ""}]}, "messages[0].role", "use role tool"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "text only",
        ),
        (chat(tools=[{"type": "web_search"}]), "tools[0].type", "only function tools"),
        (chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name", "regex"),
        ({}, "messages", "is required"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(body: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(body, ChatRequest, "chat")
    assert caught.value.param == param
    assert caught.value.message.startswith(param)
    assert says in caught.value.message


@pytest.mark.parametrize("body", [[], "x", None, 5])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    with pytest.raises(InvalidRequest, match="the body: Expected object"):
        decode(body, ChatRequest, "chat")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat(temprature=1), "temprature"),
        (chat(stream_options={"foo": 1}), "stream_options.foo"),
        ({"messages": [USER, {**USER, "tool_calls": []}]}, "messages[1].tool_calls"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "x": 1}]}]},
            "messages[0].content[0].x",
        ),
        (chat(response_format={"type": "json_object", "y": 1}), "response_format.y"),
    ],
)
def test_an_unknown_field_is_named_with_its_path(body: dict[str, Any], param: str) -> None:
    with pytest.raises(UnknownField) as caught:
        decode(body, ChatRequest, "chat")
    assert caught.value.param == param


def test_an_unknown_field_suggests_the_one_that_was_meant() -> None:
    with pytest.raises(UnknownField, match="did you mean temperature"):
        decode(chat(temprature=1), ChatRequest, "chat")


def test_a_null_field_is_not_given() -> None:
    fields = [f for f in ChatRequest.__struct_encode_fields__ if f != "messages"]
    decoded = decode(chat(**dict.fromkeys(fields)), ChatRequest, "chat")
    assert decoded.value == decode(chat(), ChatRequest, "chat").value


def test_ignored_fields_are_dropped_with_one_warning_each() -> None:
    messages = [{**USER, "name": "ann"}, {**USER, "name": "bob"}]
    decoded = decode({"messages": messages, "store": True, "user": "u"}, ChatRequest, "chat")
    assert len(decoded.warnings) == 3
    assert {w.split(" ")[0] for w in decoded.warnings} == {"messages[].name", "store", "user"}
    assert [m.content for m in decoded.value.messages] == ["hi", "hi"]


def test_harmless_values_of_known_fields_pass_in_silence() -> None:
    body = chat(store=False, metadata=None, service_tier="auto", modalities=["text"], functions=[], prediction=None)
    assert decode(body, ChatRequest, "chat").warnings == ()


def test_a_field_that_would_change_the_result_is_refused() -> None:
    with pytest.raises(UnsupportedField) as caught:
        decode({"messages": [USER, {"role": "assistant", "audio": {"id": "x"}}]}, ChatRequest, "chat")
    assert caught.value.param == "messages[1].audio"
    with pytest.raises(UnsupportedField, match="modalities"):
        decode(chat(modalities=["text", "audio"]), ChatRequest, "chat")


def test_harmless_is_exact_about_types() -> None:
    # 0 == False in Python, but "store": 0 is not "store": false
    assert decode(chat(store=0), ChatRequest, "chat").warnings


def test_many_ignored_fields_cost_one_pass_each_kind() -> None:
    many = [{**USER, "name": "n"} for _ in range(20_000)]
    decoded = decode({"messages": many}, ChatRequest, "chat")
    assert len(decoded.warnings) == 1


async def test_a_body_may_come_in_parts() -> None:
    body = await read_json(post(b'{"a"', b":1}"), 100)
    assert (body.value, body.size) == ({"a": 1}, 7)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"a":1}x',
        b'{"a":"\xff"}',
        b'{"a":"\\ud800"}',
        b"NaN",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b"[1e999]",
    ],
    ids=["empty", "cut", "trailing", "not-utf8", "surrogate", "nan", "bom", "deep", "overflow"],
)
async def test_what_is_not_json_is_a_400(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="the body is not"):
        await read_json(post(data), 1 << 20)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_another_content_type_is_a_415(content_type: str) -> None:
    with pytest.raises(HTTPException) as caught:
        await read_json(post(b"{}", headers={"content-type": content_type}), 100)
    assert caught.value.status_code == 415


async def test_a_charset_is_no_other_content_type() -> None:
    request = post(b"{}", headers={"content-type": "Application/JSON; charset=utf-8"})
    assert (await read_json(request, 100)).value == {}


@pytest.mark.parametrize("declared", [None, "1000"])
async def test_a_body_over_the_limit_is_a_413(declared: str | None) -> None:
    headers = {"content-type": "application/json"} | ({"content-length": declared} if declared else {})
    with pytest.raises(HTTPException) as caught:
        await read_json(post(b"[" + b" " * 60, b" " * 60 + b"]", headers=headers), 100)
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (InvalidRequest("n: wrong", param="n"), 400, "invalid_value", "n"),
        (ContextTooLong("too long"), 400, "context_length_exceeded", None),
        (NotFound("no", param="model"), 404, "not_found", "model"),
        (Overloaded("full", retry_after=2.6), 429, "queue_full", None),
        (Unavailable("down"), 503, "unavailable", None),
        (HTTPException(405, "Method Not Allowed", {"allow": "POST"}), 405, "method_not_allowed", None),
        (RuntimeError("secret path"), 500, None, None),
    ],
)
def test_every_error_has_openais_shape(error: Exception, status: int, code: str | None, param: str | None) -> None:
    body = msgspec.to_builtins(error_body(error))["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert (error_status(error), body["code"], body["param"]) == (status, code, param)
    assert "secret" not in body["message"]


def test_retry_after_is_in_whole_seconds_and_never_zero() -> None:
    assert error_headers(Overloaded("full", retry_after=2.6)) == {"retry-after": "3"}
    assert error_headers(Overloaded("full", retry_after=0.1)) == {"retry-after": "1"}
    assert error_headers(Overloaded("full")) == {}


@pytest.mark.parametrize("warnings", [["a\r\nset-cookie: x"], ["ü" * 10], ["x" * 10_000], ["a"] * 5])
def test_warnings_are_a_safe_header(warnings: Sequence[str]) -> None:
    value = wire.common_headers(post(b""), warnings)[wire.WARNING_HEADER]
    assert value.isascii()
    assert value.isprintable()
    assert len(value) <= wire.MAX_WARNING_BYTES
    assert value != "; ".join(warnings)


def test_no_warning_is_no_header() -> None:
    assert wire.WARNING_HEADER not in wire.common_headers(post(b""), ())
