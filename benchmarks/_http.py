"""A small HTTP/1.1 client for measuring: one connection, one request at a time, times of every event. Plain asyncio.

It is cheaper than the servers it measures and hides nothing: what came is kept as it came, and a connection that ended
too early says so. Words of the upstream of `tests/faults` that are times (its scripts' `stamp`) give each chunk's way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

STAMP = re.compile(rb'"(?:content|text)":\s*"(\d{9,}) "')
TOKEN = re.compile(rb'"(?:content|text|reasoning_content|reasoning)":\s*"[^"]')
DONE = b"data: [DONE]"


@dataclass(slots=True)
class Answer:
    """started, first (byte of the body), ended: seconds of the monotonic clock. tokens: chunks of a stream that had
    one. delays: seconds that each stamped chunk took. error: "" or why the answer is not whole."""

    started: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    first: float | None = None
    ended: float = 0.0
    tokens: int = 0
    delays: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    def json(self) -> Any:
        return json.loads(self.body)


class Connection(asyncio.Protocol):
    """Requests over one kept connection. A broken one is opened again by `Client`."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self._clear()

    def _clear(self) -> None:
        self.buffer = bytearray()
        self.answer: Answer | None = None
        self.done: asyncio.Future[None] | None = None
        self.left: int | None = None  # of a body with a length
        self.chunked = False
        self.abort_after: int | None = None
        self.fresh = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self.answer is not None:
            to_the_end = self.answer.status and self.left is None and not self.chunked
            self._end("" if to_the_end else f"connection lost: {exc or 'closed'}")

    async def send(self, request: bytes, abort_after: int | None = None) -> Answer:
        """abort_after: close the connection once so many tokens came."""
        assert self.transport is not None
        self._clear()
        self.abort_after = abort_after
        self.answer = answer = Answer(time.monotonic())
        self.done = asyncio.get_running_loop().create_future()
        if self.closed:
            self._end("connection lost: it was closed")
        else:
            self.transport.write(request)
        try:
            await self.done
        finally:
            self.answer = None
        return answer

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        answer = self.answer
        if answer is None:
            return
        if answer.status:
            self._body(data, now)
            return
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
        answer.status = int(first.split(" ")[1])
        answer.headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        self.chunked = "chunked" in answer.headers.get("transfer-encoding", "")
        length = answer.headers.get("content-length")
        self.left = int(length) if length is not None and not self.chunked else None
        rest = bytes(self.buffer[end + 4 :])
        self.buffer.clear()
        if rest or self.left == 0:
            self._body(rest, now)

    def _body(self, data: bytes, now: float) -> None:
        answer = self.answer
        assert answer is not None
        if answer.first is None:
            answer.first = now
        if self.chunked:
            self.buffer += data
            whole = self._dechunk()
        else:
            answer.body += data
            self._look(data, now)
            whole = False
            if self.left is not None:
                self.left -= len(data)
                whole = self.left <= 0
        if self.chunked and self.fresh:
            self._look(self.fresh, now)
        if whole:
            self._end("")
        elif self.abort_after is not None and answer.tokens >= self.abort_after:
            self.abort()
            self._end("aborted by us")

    def _look(self, data: bytes, now: float) -> None:
        assert self.answer is not None
        self.answer.tokens += len(TOKEN.findall(data))
        self.answer.delays += [now - int(stamp) / 1e9 for stamp in STAMP.findall(data)]

    def _dechunk(self) -> bool:
        """Moves whole chunks to the answer; `fresh` is what came. Whether the last one did."""
        assert self.answer is not None
        fresh, at, buffer = [], 0, self.buffer
        last = False
        while (line := buffer.find(b"\r\n", at)) >= 0:
            size = int(bytes(buffer[at:line]).split(b";")[0], 16)
            if len(buffer) < line + 2 + size + 2:
                break
            fresh.append(bytes(buffer[line + 2 : line + 2 + size]))
            at = line + 2 + size + 2
            if size == 0:
                last = True
                break
        del buffer[:at]
        self.fresh = b"".join(fresh)
        self.answer.body += self.fresh
        return last

    def _end(self, error: str) -> None:
        if self.answer is None or self.done is None or self.done.done():
            return
        self.answer.ended = time.monotonic()
        self.answer.error = error
        self.done.set_result(None)

    def abort(self, reset: bool = False) -> None:
        """Closes the connection, with a reset if asked."""
        assert self.transport is not None
        self.closed = True
        if reset:
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class Client:
    """Kept connections to one address. At most as many are open as calls ran at once."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.host, self.port, self.prefix = parts.hostname, parts.port or 80, parts.path.rstrip("/")
        self.idle: list[Connection] = []

    def request(self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "") -> bytes:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method or ('GET' if body is None else 'POST')} {self.prefix}{path} HTTP/1.1", f"host: {self.host}"]
        lines += [f"{key}: {value}" for key, value in (headers or {}).items()]
        if body is not None:
            lines += ["content-type: application/json", f"content-length: {len(data)}"]
        return "\r\n".join((*lines, "", "")).encode() + data

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self.host, self.port)
        return connection

    async def send(self, request: bytes, *, abort_after: int | None = None, limit: float = 60.0) -> Answer:
        """What came; a connection that cannot be made is an `Answer` with status 0 too."""
        started = time.monotonic()
        while self.idle and self.idle[-1].closed:
            self.idle.pop()
        connection = self.idle.pop() if self.idle else None
        try:
            async with asyncio.timeout(limit):
                connection = connection or await self.connect()
                answer = await connection.send(request, abort_after)
        except TimeoutError:
            if connection is not None:
                connection.abort()
            return Answer(started, ended=time.monotonic(), error="no whole answer in time")
        except OSError as error:
            return Answer(started, ended=time.monotonic(), error=f"no connection: {error}")
        keep = not connection.closed and not answer.error and answer.headers.get("connection", "").lower() != "close"
        if keep:
            self.idle.append(connection)
        else:
            connection.abort()
        return answer

    async def call(self, path: str, body: Any = None, headers: dict[str, str] | None = None, **how: Any) -> Answer:
        return await self.send(self.request(path, body, headers, how.pop("method", "")), **how)

    def close(self) -> None:
        for connection in self.idle:
            with contextlib.suppress(Exception):
                connection.abort()
        self.idle.clear()


def call(url: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **how: Any) -> Answer:
    """One request, waited for."""

    async def run() -> Answer:
        client = Client(url)
        try:
            return await client.call(path, body, headers, **how)
        finally:
            client.close()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    with ThreadPoolExecutor(1) as pool:  # an event loop waits meanwhile: for what is not measured
        return pool.submit(asyncio.run, run()).result()
