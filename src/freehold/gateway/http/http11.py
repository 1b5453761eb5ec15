"""An HTTP/1.1 server for one ASGI application, on llhttp (httptools). It does what a gateway needs and no more: no
WebSockets, no HTTP/2, no lifespan. See docs/decisions/0007.

A request that does not arrive in time is refused: headers have `HEADER_SECONDS` from their first byte, a connection
without a request `IDLE_SECONDS`. Bodies are timed by the application. Each connection has one timer, and stops reading
while a request is unanswered and more of its body has come than was taken.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from time import time
from typing import Any, Final, TypeAlias
from urllib.parse import unquote

import httptools

from freehold.gateway.http.exchange import STATUS, Exchange, Message

logger = logging.getLogger("freehold.gateway")

App: TypeAlias = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

HEADER_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 75.0  # longer than the idle timeout of common clients, so that it is never the server that closes
STUCK_SECONDS: Final = 10.0  # a client that takes nothing of its answer for so long, once it is over, loses the rest
MAX_HEADER_BYTES: Final = 65_536
MAX_HEADERS: Final = 128
_LINGER_SECONDS: Final = 2.0
_PAUSE_BYTES: Final = 262_144  # of a body that nobody has taken yet
_WRITE_HIGH: Final = 262_144
_FRAMING: Final = (b"content-length", b"transfer-encoding")


class Listener:
    """Serves an application on a bound socket, on the running event loop."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.closing = False
        self._server: asyncio.Server | None = None
        self._date = (0, b"")

    async def start(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self, loop), sock=sock, backlog=2048)

    async def stop(self, seconds: float) -> None:
        """Take no connections any more, end the idle ones, and give the answers under way so long to be taken."""
        self.closing = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close_if_idle()
        if self.tasks:
            await asyncio.wait(list(self.tasks), timeout=seconds)
        end = asyncio.get_running_loop().time() + seconds
        while self.connections and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110  buffers that drain
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()
        for task in list(self.tasks):
            task.cancel()

    def date_header(self) -> bytes:
        now = int(time())
        if self._date[0] != now:
            self._date = (now, b"date: " + formatdate(now, usegmt=True).encode() + b"\r\n")
        return self._date[1]


class Connection(asyncio.Protocol):
    """One client's connection. Pipelined requests wait for the answers before them."""

    __slots__ = (
        "_deadline",
        "_expects_continue",
        "_framing",
        "_header_bytes",
        "_headers",
        "_is_body_only",
        "_parser",
        "_paused",
        "_queue",
        "_reading",
        "_scope_base",
        "_timer",
        "_transport",
        "_unsent",
        "_url",
        "_writable",
        "current",
        "drained",
        "listener",
        "loop",
    )

    def __init__(self, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        self.listener = listener
        self.loop = loop
        self.drained: asyncio.Future[None] | None = None  # while the client takes less than there is
        self.current: Exchange | None = None  # the one being answered
        self._queue: deque[Exchange] = deque()
        self._reading: Exchange | None = None  # the one whose body is coming
        self._parser: Any = None
        self._transport: Any = None
        self._paused = False
        self._framing = b""  # of a request that asks for another protocol: the headers that say how long its body is
        self._is_body_only = False  # these are being parsed again, in front of that body
        self._unsent = 0  # bytes that the client had not taken when it was last looked at
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = 0
        self._url = b""
        self._expects_continue = False

    # ---- the transport -----------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)
        transport.set_write_buffer_limits(high=_WRITE_HIGH)
        peer, local = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        self._scope_base = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "scheme": "http",
            "root_path": "",
            "client": tuple(peer[:2]) if peer else None,
            "server": tuple(local[:2]) if local else None,
        }
        self.listener.connections.add(self)
        self._deadline = self.loop.time() + IDLE_SECONDS
        self._timer = self.loop.call_at(self.loop.time() + HEADER_SECONDS, self._tick)

    def connection_lost(self, error: Exception | None) -> None:
        self.listener.connections.discard(self)
        self._timer.cancel()
        self.resume_writing()
        for exchange in (self.current, *self._queue, self._reading):
            if exchange is not None:
                exchange.gone = True
                exchange.wake()
        self._queue.clear()
        self._parser = None

    def eof_received(self) -> bool:
        return False  # a client that closes its side is gone: closes ours, too

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            return
        try:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._pass_over_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__
            known = cause if isinstance(cause, _Refused) else _Refused(400, b"this is not HTTP/1.1")
            self._give_up(known)
        self._start_next()

    def _pass_over_upgrade(self, rest: bytes) -> None:
        """Answer as if no other protocol were asked for. rest: what came after the headers; llhttp leaves it to that
        protocol, also where it is the request's body (Java's client asks for HTTP/2 with every first request)."""
        (self._queue[-1] if self._queue else self.current).keep_alive = False  # type: ignore[union-attr]
        framing, self._framing, self._parser = self._framing, b"", None
        if framing:
            self._parser = httptools.HttpRequestParser(self)
            self._is_body_only = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n")
            self._is_body_only = False
            self._parser.feed_data(rest)

    def _give_up(self, why: _Refused) -> None:
        """What came is no request. The whole ones before it get their answers first, and then there is no word of it:
        the client would take it for another's answer."""
        broken, self._reading, self._parser = self._reading, None, None
        if broken is not None:
            broken.gone = True
            broken.wake()
            if broken in self._queue:
                self._queue.remove(broken)
        last = self._queue[-1] if self._queue else self.current if self.current is not broken else None
        if last is not None:
            last.keep_alive = False
        else:
            self.refuse(why.status, why.words)

    def pause_writing(self) -> None:
        if self.drained is None:
            self.drained = self.loop.create_future()

    def resume_writing(self) -> None:
        if self.drained is not None:
            drained, self.drained = self.drained, None
            if not drained.done():
                drained.set_result(None)

    def _tick(self) -> None:
        now = self.loop.time()
        if self.current is not None:
            self._deadline = now + IDLE_SECONDS
        elif now >= self._deadline:
            if self._header_bytes and self._parser is not None:
                self.refuse(408, b"the headers did not arrive in time")
            else:
                self._end()
            return
        self._timer = self.loop.call_at(min(self._deadline, now + HEADER_SECONDS), self._tick)

    def _end(self) -> None:
        """Close; and as closing waits until the client has taken what it was sent, see to it that it does take it."""
        self._transport.close()
        self._timer.cancel()
        self._unsent = self._transport.get_write_buffer_size()
        if self._unsent:
            self._timer = self.loop.call_later(STUCK_SECONDS, self._look_whether_stuck)

    def _look_whether_stuck(self) -> None:
        if self._transport.get_write_buffer_size() >= self._unsent:
            self._transport.abort()
        else:
            self._end()

    # ---- llhttp's callbacks ------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._is_body_only:
            return
        self._headers = []
        self._url = b""
        self._header_bytes = 1
        self._expects_continue = False
        self._deadline = self.loop.time() + HEADER_SECONDS

    def on_url(self, url: bytes) -> None:
        if self._is_body_only:
            return
        self._url += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_body_only:
            return
        self._count(len(name) + len(value) + 4)
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self._expects_continue = True
        self._headers.append((name, value))
        if len(self._headers) > MAX_HEADERS:
            raise _Refused(431, b"there are too many headers")

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise _Refused(431, b"the headers are too large")

    def on_headers_complete(self) -> None:
        if self._is_body_only:
            return
        try:
            url = httptools.parse_url(self._url)
            path = (url.path or b"/").decode("ascii")
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
            raise _Refused(400, b"the request's target is no path") from None
        parser = self._parser
        scope = self._scope_base | {
            "method": parser.get_method().decode("ascii"),
            "http_version": parser.get_http_version(),
            "path": unquote(path) if "%" in path else path,
            "raw_path": path.encode(),
            "query_string": url.query or b"",
            "headers": self._headers,
        }
        self._reading = Exchange(
            self, scope, keep_alive=parser.should_keep_alive(), expects_continue=self._expects_continue
        )
        self._queue.append(self._reading)
        if parser.should_upgrade():
            lines = (b"%b: %b\r\n" % each for each in self._headers if each[0] in _FRAMING)
            self._framing = b"".join(lines)
        self._headers = []  # what comes after the body (trailers) are no headers of the request: nobody sees them
        self._header_bytes = 0
        self._deadline = self.loop.time() + IDLE_SECONDS

    def on_body(self, data: bytes) -> None:
        exchange = self._reading
        if exchange is None or exchange.done:
            return
        exchange.body.append(data)
        exchange.body_bytes += len(data)
        exchange.wake()
        if not self._paused and exchange.body_bytes > _PAUSE_BYTES:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._framing:
            return  # of the headers only
        self._header_bytes = 0  # of trailers
        if self._reading is not None:
            self._reading.body_complete = True
            self._reading.wake()
            self._reading = None

    # ---- exchanges ---------------------------------------------------------------------------------------------

    def _start_next(self) -> None:
        if self.current is None and self._queue:
            exchange = self.current = self._queue.popleft()
            task = self.loop.create_task(exchange.run())
            self.listener.tasks.add(task)
            task.add_done_callback(self.listener.tasks.discard)
        if len(self._queue) > 1 and not self._paused:  # one who asks on without waiting waits
            self._paused = True
            self._transport.pause_reading()

    def body_taken(self) -> None:
        if self._paused and len(self._queue) <= 1:
            self._paused = False
            self._transport.resume_reading()

    def answered(self, exchange: Exchange) -> None:
        """The end of its answer was written."""
        self.current = None
        self._deadline = self.loop.time() + IDLE_SECONDS
        if not exchange.keep_alive or self.listener.closing:
            self._close(everything_read=exchange.body_complete)
            return
        self._start_next()
        self.body_taken()

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def refuse(self, status: int, words: bytes) -> None:
        """Answer in the application's stead, and close."""
        if not self._transport.is_closing():
            body = b'{"error":{"message":"%b","type":"invalid_request_error","param":null,"code":null}}' % words
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            if self.current is None or not self.current.on_the_wire:
                self.write(STATUS[status] + head + body)
            self._close(everything_read=False)
        self._parser = None

    def _close(self, *, everything_read: bool) -> None:
        """After the last answer. Closing with unread bytes resets the connection, and the answer may be lost with it:
        so what comes for a while is thrown away first."""
        if everything_read or self.listener.closing:
            self._end()
            return
        self._parser = None
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._timer.cancel()
        self._timer = self.loop.call_later(_LINGER_SECONDS, self._end)

    def abort(self) -> None:
        self._transport.abort()

    def close_if_idle(self) -> None:
        if self.current is None and not self._queue:
            self._transport.close()


class _Refused(Exception):
    """Raised in a callback; the parser wraps it."""

    def __init__(self, status: int, words: bytes) -> None:
        super().__init__(words)
        self.status = status
        self.words = words
