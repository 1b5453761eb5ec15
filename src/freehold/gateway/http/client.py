"""An HTTP/1.1 client for one thing: posting a body to a fixed address and reading the answer as it comes, on llhttp
(httptools), over plain TCP or TLS. See docs/decisions/0007.

Connections are kept and used again, the latest first; one that has idled for `IDLE_SECONDS` is closed. After a chunked
answer one rests first: some servers (llama.cpp's) close it then, and do not say so before. One that idled and is lost
at once, without a byte of an answer, was closed by the upstream as the request went out: nobody works on that request,
and it goes out again on a new connection. Nothing else is tried again, and nothing followed or decompressed. Whoever
reads slowly makes the upstream wait.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import httptools

from freehold.gateway.http.outbound import Broken
from freehold.gateway.policy import is_local_address

IDLE_SECONDS: Final = 4.0  # shorter than most servers keep theirs (uvicorn: 5 s)
OLDEST_SECONDS: Final = 300.0  # then a new connection asks the name again: what it means may have changed
STALE_SECONDS: Final = 1.0  # idle at least so long before the request, and lost at most so long after it
REST_SECONDS: Final = 0.05
MAX_HEADER_BYTES: Final = 65_536
_PAUSE_BYTES: Final = 1 << 18
_WRITE_HIGH: Final = 1 << 20


class Http11:
    """Connections to any number of addresses, on the running event loop."""

    def __init__(self) -> None:
        self.local_only = False
        self._loop = asyncio.get_running_loop()
        self._pools: dict[str, _Pool] = {}
        self._tls = ssl.create_default_context()
        self._sweeper: asyncio.TimerHandle | None = None

    async def post(self, url: str, head: bytes, body: bytes, connect_seconds: float) -> Response:
        """head: header lines, each with its end. Returns when the headers of the answer are there.

        Raises Broken: no connection, or it ended before an answer; ValueError: what came is not HTTP.
        """
        pool = self._pools.get(url)
        if pool is None:
            pool = self._pools[url] = _Pool(url, self._tls, self._watch_idle)
        message = b"%b%bcontent-length: %d\r\n\r\n%b" % (pool.request_line, head, len(body), body)
        now = self._loop.time()
        kept, idled = pool.take(now, local_only=self.local_only)
        if kept is not None:
            try:
                return await kept.ask(message)
            except Broken:
                if kept.heard or idled < STALE_SECONDS or self._loop.time() - now > STALE_SECONDS:
                    raise
        return await (await self._connect(pool, connect_seconds)).ask(message)

    async def _connect(self, pool: _Pool, seconds: float) -> _Connection:
        try:
            async with asyncio.timeout(seconds):
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(pool, self._loop),
                    pool.host,
                    pool.port,
                    ssl=pool.tls,
                    server_hostname=pool.host if pool.tls is not None else None,
                )
        except TimeoutError:
            raise Broken(f"no connection within {seconds:g} s", before_answer=True) from None
        except OSError as error:  # refused, no such name, a certificate that is not trusted
            words = error.strerror or str(error) or type(error).__name__
            raise Broken(f"cannot connect: {words}", before_answer=True) from None
        if self.local_only and not connection.is_local:
            connection.transport.abort()
            raise Broken(f"air-gapped: {pool.host} is not a local address", before_answer=True)
        return connection

    def _watch_idle(self) -> None:
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(IDLE_SECONDS / 2, self._sweep)

    def _sweep(self) -> None:
        now = self._loop.time()
        kept = sum(pool.drop_idle(now) for pool in self._pools.values())
        self._sweeper = self._loop.call_later(IDLE_SECONDS / 2, self._sweep) if kept else None

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for pool in self._pools.values():
            pool.drop_idle(float("inf"))
        await asyncio.sleep(0)  # lets the transports close


class _Pool:
    """One address: its idle connections, the one used last at the end."""

    def __init__(self, url: str, tls: ssl.SSLContext, on_idle: Callable[[], None]) -> None:
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.tls = tls if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.tls is not None else 80)
        target = (parts.path or "/").encode("ascii")
        self.request_line = b"POST %b HTTP/1.1\r\nhost: %b\r\n" % (target, parts.netloc.encode("idna"))
        self.idle: list[tuple[_Connection, float]] = []  # and from when on
        self._on_idle = on_idle

    def give(self, connection: _Connection, since: float) -> None:
        """One that nobody uses, and from when on it may be used again."""
        self.idle.append((connection, since))
        self._on_idle()

    def take(self, now: float, *, local_only: bool) -> tuple[_Connection | None, float]:
        """One that can be used, and for how many seconds nobody did."""
        for index in range(len(self.idle) - 1, -1, -1):
            connection, since = self.idle[index]
            if since > now:
                continue
            del self.idle[index]
            good = not connection.transport.is_closing() and now - since < IDLE_SECONDS
            if good and (connection.is_local or not local_only):
                return connection, now - since
            connection.transport.abort()
        return None, 0.0

    def drop_idle(self, now: float) -> int:
        """Close those that have idled too long; how many are left."""
        kept = [(one, since) for one, since in self.idle if now - since < IDLE_SECONDS]
        for connection, since in self.idle:
            if now - since >= IDLE_SECONDS:
                connection.transport.close()
        self.idle = kept
        return len(kept)


class Response:
    """One answer, while it comes."""

    __slots__ = ("_connection", "_pieces", "_size", "_waiter", "complete", "error", "fields", "has_head", "status")

    def __init__(self, connection: _Connection) -> None:
        self.status = 0
        self.fields: dict[str, str] = {}  # lower-case names; the last of several
        self.has_head = False
        self.complete = False
        self.error: Exception | None = None
        self._connection = connection
        self._pieces: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None

    async def headers_complete(self) -> None:
        while not self.has_head:
            if self.error is not None:
                raise self.error
            await self._wait()

    async def next(self) -> bytes:
        """What has come since; b"" at the end. Raises Broken, ValueError."""
        while not self._pieces:
            if self.complete:
                return b""
            if self.error is not None:
                raise self.error
            await self._wait()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        self._connection.go_on(self)
        return data

    def close(self) -> None:
        """Give the connection back, if the answer came whole; else end it. Again: nothing."""
        self._connection.end(self)

    async def _wait(self) -> None:
        self._waiter = self._connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def add(self, data: bytes) -> bool:
        """Whether so much has come that nobody took that no more is wanted."""
        self._pieces.append(data)
        self._size += len(data)
        self.wake()
        return self._size > _PAUSE_BYTES

    def fail(self, error: Exception) -> None:
        if not self.complete and self.error is None:
            self.error = error
            self.wake()


class _Connection(asyncio.Protocol):
    """A connection to an upstream, with at most one request on it."""

    __slots__ = (
        "_fields",
        "_header_bytes",
        "_keeps",
        "_made",
        "_parser",
        "_paused",
        "_pool",
        "_response",
        "heard",
        "is_local",
        "loop",
        "transport",
    )

    def __init__(self, pool: _Pool, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.transport: Any = None
        self.heard = False  # a byte came since the request
        self.is_local = False
        self._made = loop.time()
        self._pool = pool
        self._response: Response | None = None
        self._parser: Any = None
        self._paused = False
        self._keeps = False  # the upstream takes another request on it
        self._fields: dict[str, str] = {}
        self._header_bytes = 0

    async def ask(self, message: bytes) -> Response:
        """Send a request; returns when the headers of the answer are there. Raises Broken, ValueError."""
        response = self._response = Response(self)
        self._keeps = self.heard = False
        self._parser = httptools.HttpResponseParser(self)
        self.transport.write(message)
        try:
            await response.headers_complete()
        except BaseException:
            response.close()
            raise
        return response

    def end(self, response: Response) -> None:
        """The answer is not read any further."""
        if self._response is not response:
            return  # it has ended, and this may be another call's by now
        now = self.loop.time()
        if response.complete and self._keeps and now - self._made < OLDEST_SECONDS and not self.transport.is_closing():
            self.go_on(response)
            self._pool.give(self, now + REST_SECONDS if "transfer-encoding" in response.fields else now)
        else:
            self.transport.abort()  # ends the generation behind it at once
        self._response = None

    def go_on(self, response: Response) -> None:
        if self._paused and self._response is response:
            self._paused = False
            self.transport.resume_reading()

    # ---- the transport -----------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.is_local = is_local_address(str(transport.get_extra_info("peername")[0]))
        transport.set_write_buffer_limits(high=_WRITE_HIGH)

    def data_received(self, data: bytes) -> None:
        if self._response is None:
            self.transport.abort()  # nothing was asked
            return
        self.heard = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._response.fail(ValueError(f"what came is not HTTP: {error}"))
            self.transport.abort()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        response = self._response
        if response is None:
            return
        until_end = "content-length" not in response.fields and "transfer-encoding" not in response.fields
        if response.has_head and until_end and error is None:
            response.complete = True
            response.wake()
        else:
            words = str(error) if error is not None and str(error) else "the upstream closed the connection"
            response.fail(Broken(words, before_answer=not response.has_head))

    # ---- llhttp's callbacks ------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._response is not None and self._response.complete:
            self._keeps = False
            raise ValueError("more came than one answer")
        self._fields = {}
        self._header_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MAX_HEADER_BYTES:
            raise ValueError("the headers are too large")
        self._fields[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        response = self._response
        status = self._parser.get_status_code()
        if response is None or status < 200:  # 100 Continue and the like come before the answer
            return
        response.status = status
        response.fields, self._fields = self._fields, {}  # what comes after the body is no header
        response.has_head = True
        response.wake()

    def on_body(self, data: bytes) -> None:
        if self._response is not None and self._response.add(data) and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        response = self._response
        if response is not None and response.has_head:
            self._keeps = self._parser.should_keep_alive()  # to be asked here: llhttp forgets it with the message
            response.complete = True
            response.wake()
