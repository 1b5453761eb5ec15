"""The client against a server that does what servers do: odd cuts, errors, broken streams."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from freehold.client import Client, StreamChunk, usage_counts
from freehold.errors import (
    AuthenticationFailed,
    FreeholdError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """A server on a free port that answers everything with the handler."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def streaming(*writes: bytes | float | None) -> Handler:
    """Write bytes, sleep seconds, or (None) drop the connection."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "X-Freehold-Warning": "w"})
        await response.prepare(request)
        for write in writes:
            if write is None:
                assert request.transport is not None
                request.transport.abort()
            elif isinstance(write, bytes):
                await response.write(write)
            else:
                await asyncio.sleep(write)
        return response

    return handler


def event(delta: dict[str, Any] | None = None, finish: str | None = None, **rest: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: " + json.dumps({"choices": choices, **rest}, ensure_ascii=False).encode() + b"\n\n"


BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


async def collect(handler: Handler) -> list[StreamChunk]:
    async with serving(handler) as url, Client(url) as client, client.stream_chat(BODY) as stream:
        return [chunk async for chunk in stream]


async def test_chunks_carry_their_parts() -> None:
    call = {"index": 0, "function": {"name": "f"}}
    chunks = await collect(
        streaming(
            event({"role": "assistant", "content": ""}),
            event({"reasoning_content": "hm", "reasoning": "hm"}),
            event({"reasoning": "m"}),
            event({"content": "北京"}),
            event({"tool_calls": [call]}),
            event({}, "stop"),
            event(None, usage={"prompt_tokens": 3, "completion_tokens": 4}),
            b"data: [DONE]\n\n",
        )
    )
    assert "".join(chunk.reasoning for chunk in chunks) == "hmm"
    assert "".join(chunk.content for chunk in chunks) == "北京"
    assert [chunk.tool_calls for chunk in chunks if chunk.tool_calls] == [[call]]
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
    assert usage_counts(chunks[-1].usage or {}) == {"prompt_tokens": 3, "completion_tokens": 4}


async def test_text_completions_stream_too() -> None:
    handler = streaming(b'data: {"choices": [{"text": "a", "finish_reason": "length"}]}\n\n')
    async with serving(handler) as url, Client(url) as client, client.stream("completions", {"prompt": "x"}) as stream:
        assert [chunk.content async for chunk in stream] == ["a"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
async def test_how_the_bytes_are_cut_does_not_matter(size: int, newline: bytes) -> None:
    text = b": comment\n\nid: 4\nevent: x\n" + event({"content": "é"}) + b"data:" + event({"content": "b"}, "stop")[6:]
    text = (text + b"data: [DONE]\n\n").replace(b"\n", newline)
    writes: list[bytes | float | None] = []
    for start in range(0, len(text), size):
        writes += [text[start : start + size], 0.0]
    assert [chunk.content for chunk in await collect(streaming(*writes))] == ["é", "b"]


async def test_a_line_may_be_longer_than_any_buffer() -> None:
    long = "x" * 3_000_000
    assert (await collect(streaming(event({"content": long}, "stop"))))[0].content == long


async def test_times_are_when_the_bytes_came() -> None:
    together = event({"content": "a"}) + event({"content": "b"})
    handler = streaming(together, 0.15, event({"content": "c"}, "stop"))
    async with serving(handler) as url, Client(url) as client, client.stream_chat(BODY) as stream:
        chunks = []
        async for chunk in stream:
            chunks.append(chunk)
            await asyncio.sleep(0.05)  # a slow reader does not change the times of what came together
        assert chunks[0].at == chunks[1].at
        assert chunks[2].at - chunks[1].at >= 0.1
        assert chunks[0].at > stream.started
        assert stream.headers["x-freehold-warning"] == "w"


async def test_leaving_early_closes_the_connection() -> None:
    gone = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(event({"content": "x"}))
                await asyncio.sleep(0.01)
        except (ConnectionError, asyncio.CancelledError):
            gone.set()
            raise

    async with serving(handler) as url, Client(url) as client:
        async with client.stream_chat(BODY) as stream:
            async for _ in stream:
                break
        async with asyncio.timeout(5):
            await gone.wait()


@pytest.mark.parametrize(
    ("writes", "message"),
    [
        ((event({"content": "a"}),), "ended before its last chunk"),
        ((event({"content": "a"}), 0.05, None), "broke"),
        ((b"data: not json\n\n",), "JSON object"),
        ((b'data: {"error": {"message": "out of cheese"}}\n\n',), "out of cheese"),
    ],
)
async def test_a_stream_that_goes_wrong_is_an_error(writes: Any, message: str) -> None:
    with pytest.raises(FreeholdError, match=message):
        await collect(streaming(*writes))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (401, AuthenticationFailed),
        (404, NotFound),
        (422, InvalidRequest),
        (429, Overloaded),
        (500, FreeholdError),
        (503, Unavailable),
    ],
)
async def test_error_responses_become_their_exception(status: int, kind: type[FreeholdError]) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        error = {"error": {"message": "because", "type": "t", "param": "top_p"}}
        return web.json_response(error, status=status, headers={"retry-after": "7"})

    async with serving(handler) as url, Client(url) as client:
        with pytest.raises(kind, match=f"{status}: because") as caught:
            await client.chat(BODY)
        assert type(caught.value) is kind
        assert (caught.value.param, caught.value.retry_after) == ("top_p", 7.0)
        with pytest.raises(kind):
            async with client.stream_chat(BODY):
                raise AssertionError("it has no stream")


async def test_an_answer_that_is_not_json_is_named() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        status = 200 if request.method == "GET" else 502
        return web.Response(text="<html>proxy</html>", status=status, headers={"retry-after": "Fri, 31 Dec 1999"})

    async with serving(handler) as url, Client(url) as client:
        with pytest.raises(Unavailable, match="OpenAI-compatible"):
            await client.models()
        with pytest.raises(Unavailable, match="<html>proxy") as caught:
            await client.chat(BODY)
        assert caught.value.retry_after is None


async def test_no_server_and_a_silent_one_are_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with Client(f"127.0.0.1:{taken.getsockname()[1]}") as client:
            with pytest.raises(Unavailable, match="cannot reach"):
                await client.models()
    async with serving(streaming(1.0)) as url, Client(url, timeout=0.1) as client, client.stream_chat(BODY) as stream:
        with pytest.raises(Unavailable, match="broke"):
            await anext(aiter(stream))


async def test_what_is_sent() -> None:
    seen: list[tuple[str, str, Any, str | None]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        seen.append((request.method, request.path, body, request.headers.get("authorization")))
        if body and body.get("stream"):
            return await streaming(event({}, "stop"))(request)
        return web.json_response({"data": [{"id": "a"}, {"id": "b"}]})

    async with serving(handler) as url:
        async with Client(url, api_key="k") as client:
            assert await client.models() == ["a", "b"]
            await client.chat({**BODY, "top_p": 0.5})
            async with client.stream_chat({**BODY, "stream_options": {"include_usage": False}}) as stream:
                assert len([chunk async for chunk in stream]) == 1
        async with Client(f"{url}/api/v3/", headers={"x-team": "t"}) as client:
            await client.models()
    assert seen == [
        ("GET", "/v1/models", None, "Bearer k"),
        ("POST", "/v1/chat/completions", {**BODY, "top_p": 0.5}, "Bearer k"),
        (
            "POST",
            "/v1/chat/completions",
            {**BODY, "stream": True, "stream_options": {"include_usage": False}},
            "Bearer k",
        ),
        ("GET", "/api/v3/models", None, None),
    ]


@pytest.mark.parametrize("url", ["ftp://host", "", "http://", "models/small"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        Client(url if url != "models/small" else "file://models/small")
