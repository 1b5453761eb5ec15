"""Async client of any OpenAI-compatible endpoint that notes when each chunk arrived. Shared by the terminal chat, load
tests, checks, evaluations and judges.

    async with Client("http://127.0.0.1:8000") as client:
        async with client.stream_chat({"model": "m", "messages": [...]}) as stream:
            async for chunk in stream:
                print(chunk.at - stream.started, chunk.content)

Times are `time.perf_counter()` seconds, taken when the bytes came off the socket: chunks that arrived together have the
same time. The body is sent as it is, so whatever the endpoint knows can be asked for. Nothing is retried.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec

from freehold.errors import (
    AuthenticationFailed,
    FreeholdError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)

_ERRORS: Mapping[int, type[FreeholdError]] = {
    401: AuthenticationFailed,
    403: AuthenticationFailed,
    404: NotFound,
    429: Overloaded,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}
_LONGEST_MESSAGE = 500


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """One server-sent event: when it arrived, and its JSON. The properties read the first choice."""

    at: float
    data: Mapping[str, Any]

    @property
    def content(self) -> str:
        return self.delta.get("content") or self.choice.get("text") or ""

    @property
    def reasoning(self) -> str:
        """Under either of its names."""
        return self.delta.get("reasoning_content") or self.delta.get("reasoning") or ""

    @property
    def tool_calls(self) -> list[Any]:
        return self.delta.get("tool_calls") or []

    @property
    def finish_reason(self) -> str | None:
        return self.choice.get("finish_reason")

    @property
    def usage(self) -> Mapping[str, Any] | None:
        return self.data.get("usage")

    @property
    def choice(self) -> Mapping[str, Any]:
        choices = self.data.get("choices") or [{}]
        first: Mapping[str, Any] = choices[0]
        return first

    @property
    def delta(self) -> Mapping[str, Any]:
        return self.choice.get("delta") or {}


def usage_counts(usage: Mapping[str, Any]) -> dict[str, int]:
    """The counts in a `usage` object, flat: prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens.

    One that the endpoint does not report is left out: that is not the same as none.
    """
    prompt, completion = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens_details") or {}
    counts = {
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "cached_tokens": prompt.get("cached_tokens"),
        "reasoning_tokens": completion.get("reasoning_tokens"),
    }
    return {name: count for name, count in counts.items() if count is not None}


class ChunkStream:
    """The chunks of one response, to be iterated once.

    started: when the request was sent. headers: of the response, names in lower case.
    Iterating raises Unavailable if the connection breaks or ends early, and the server's own error if it sends one.
    """

    def __init__(self, started: float, response: aiohttp.ClientResponse) -> None:
        self.started = started
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._response = response

    async def __aiter__(self) -> AsyncIterator[StreamChunk]:
        url, ended = self._response.url, False
        try:
            async for at, data in _events(self._response.content):
                if data == b"[DONE]":
                    return
                chunk = StreamChunk(at, _object(data, url))
                if "error" in chunk.data:
                    raise _error(500, chunk.data, url, None)
                ended = ended or chunk.finish_reason is not None
                yield chunk
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(f"{url}: the stream broke: {_words(error)}") from None
        if not ended:
            raise Unavailable(f"{url}: the stream ended before its last chunk")


class Client:
    """A connection pool to one endpoint. Use it as an async context manager, or close it.

    base_url: with or without the `/v1`. api_key: sent as a bearer token. headers: sent with every request.
    timeout: seconds without a byte before a request fails. connections: at a time; 0 is no limit.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 600.0,
        connections: int = 0,
    ) -> None:
        self.base_url = _api_root(base_url)
        self._headers = {**(headers or {}), **({"authorization": f"Bearer {api_key}"} if api_key else {})}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=min(timeout, 30.0), sock_read=timeout)
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def models(self) -> list[str]:
        """The names the endpoint serves."""
        return [model["id"] for model in (await self.get("models")).get("data", [])]

    async def get(self, path: str) -> dict[str, Any]:
        """GET a JSON object below the base URL. Raises as `post`."""
        async with self._request("GET", path, None) as (_, response):
            return _object(await response.read(), response.url)

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST JSON below the base URL and wait for the whole JSON answer.

        Raises the error that fits the status (InvalidRequest, AuthenticationFailed, NotFound, Overloaded with
        retry_after, Unavailable, else FreeholdError), with the endpoint's own message.
        """
        async with self._request("POST", path, body) as (_, response):
            return _object(await response.read(), response.url)

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """One chat completion, not streamed."""
        return await self.post("chat/completions", body)

    def stream_chat(self, body: Mapping[str, Any]) -> contextlib.AbstractAsyncContextManager[ChunkStream]:
        """One chat completion, streamed, with usage in its last chunk unless `stream_options` says otherwise."""
        return self.stream("chat/completions", body)

    @contextlib.asynccontextmanager
    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[ChunkStream, None]:
        """POST JSON and stream the events of the answer. Leaving the block closes the connection. Raises as `post`."""
        streamed = {"stream_options": {"include_usage": True}, **body, "stream": True}
        async with self._request("POST", path, streamed) as (started, response):
            yield ChunkStream(started, response)

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> AsyncGenerator[tuple[float, aiohttp.ClientResponse], None]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=self._timeout,
                connector=aiohttp.TCPConnector(limit=self._connections),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        headers = {**self._headers, **({"content-type": "application/json"} if body is not None else {})}
        data = None if body is None else msgspec.json.encode(body)
        url = f"{self.base_url}/{path}"
        started = time.perf_counter()
        try:
            response = await self._session.request(method, url, data=data, headers=headers)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(f"cannot reach {url}: {_words(error)}") from None
        try:
            async with response:
                if response.status >= 400:
                    text = await response.read()
                    raise _error(response.status, text, response.url, response.headers.get("retry-after"))
                yield started, response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(f"{url}: the answer broke off: {_words(error)}") from None


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[float, bytes]]:
    """(time, data) of each server-sent event. Comments and other fields are passed over; lines may be of any length."""
    rest, data = b"", list[bytes]()
    async for read in content.iter_any():
        now = time.perf_counter()
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield now, b"\n".join(data)
                data = []


def _object(data: bytes, url: object) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise Unavailable(
            f"{url} did not answer with a JSON object ({error}); is it an OpenAI-compatible API?"
        ) from None


def _error(status: int, body: bytes | Mapping[str, Any], url: object, retry_after: str | None) -> FreeholdError:
    """The exception for an error response; `body` in OpenAI's shape, or anything."""
    try:
        value: Any = msgspec.json.decode(body) if isinstance(body, bytes) else body
    except ValueError:
        value = body.decode("utf-8", errors="replace") if isinstance(body, bytes) else body
    error = value.get("error", value) if isinstance(value, Mapping) else value
    message = error.get("message", error) if isinstance(error, Mapping) else error
    param = error.get("param") if isinstance(error, Mapping) else None
    kind = _ERRORS.get(status, InvalidRequest if status < 500 else FreeholdError)
    text = f"{url} answered {status}: {str(message)[:_LONGEST_MESSAGE]}"
    return kind(text, param=param if isinstance(param, str) else None, retry_after=_seconds(retry_after))


def _seconds(retry_after: str | None) -> float | None:
    try:
        return None if retry_after is None else float(retry_after)
    except ValueError:
        return None  # a date: rare, and no use without its clock


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _api_root(url: str) -> str:
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(f"{url!r} is not the URL of an API, such as http://127.0.0.1:8000")
    path = parts.path.rstrip("/") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"
