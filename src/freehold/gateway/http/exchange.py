"""One request on a connection of `http11`, and its answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from freehold.gateway.http.http11 import Connection

logger = logging.getLogger("freehold.gateway")

Message: TypeAlias = MutableMapping[str, Any]

STATUS: Final = {
    int(status): b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()) for status in HTTPStatus
}  # fmt: skip


class Exchange:
    """One request and its answer: the ASGI scope, `receive` and `send`."""

    __slots__ = (
        "_chunked",
        "_connection",
        "_head",
        "_is_head",
        "_started",
        "_waiter",
        "body",
        "body_bytes",
        "body_complete",
        "done",
        "expects_continue",
        "gone",
        "keep_alive",
        "scope",
        "told_body",
    )

    def __init__(self, connection: Connection, scope: Message, *, keep_alive: bool, expects_continue: bool) -> None:
        self.scope = scope
        self.body: list[bytes] = []
        self.body_bytes = 0  # in `body`
        self.body_complete = False
        self.told_body = False  # `receive` has said that the body is over
        self.keep_alive = keep_alive
        self.expects_continue = expects_continue
        self.done = False
        self.gone = False
        self._connection = connection
        self._waiter: asyncio.Future[None] | None = None
        self._head = b""
        self._started = False
        self._chunked = False
        self._is_head = scope["method"] == "HEAD"

    @property
    def on_the_wire(self) -> bool:
        """The client has had some of the answer."""
        return self._started and not self._head

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def receive(self) -> Message:
        if self.expects_continue and not self.body_complete:
            self.expects_continue = False
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self.gone or self.done or (self.body and not self.told_body) or self._body_to_end()):
            self._waiter = self._connection.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.gone or self.done:
            return {"type": "http.disconnect"}
        data = self.body[0] if len(self.body) == 1 else b"".join(self.body)
        self.body.clear()
        self.body_bytes = 0
        self._connection.body_taken()
        self.told_body = self.body_complete
        return {"type": "http.request", "body": data, "more_body": not self.body_complete}

    def _body_to_end(self) -> bool:
        return self.body_complete and not self.told_body

    async def send(self, message: Message) -> None:
        if self.gone:
            return
        if message["type"] == "http.response.start":
            self._begin(message["status"], message["headers"])
            return
        data: bytes = message.get("body", b"")
        more: bool = message.get("more_body", False)
        if not self._started or self.done:
            raise RuntimeError("a body before its start, or after its end")
        if self._is_head:
            data = b""
        elif self._chunked:
            if data:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            if not more:
                data += b"0\r\n\r\n"
        if self._head:
            data, self._head = self._head + data, b""
        if data:
            self._connection.write(data)
        if not more:
            self.done = True
            self.wake()
            self._connection.answered(self)
        elif self._connection.drained is not None:
            await self._connection.drained

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if self._started:
            raise RuntimeError("a second start of an answer")
        lines = [STATUS.get(status) or b"HTTP/1.1 %d \r\n" % status, self._connection.listener.date_header()]
        sized = False
        for name, value in headers:
            if b"\n" in value or b"\r" in value:
                raise RuntimeError(f"a line break in the header {name!r}")
            sized = sized or name == b"content-length"
            lines.append(b"%b: %b\r\n" % (name, value))
        if not self.body_complete or self._connection.listener.closing:
            self.keep_alive = False  # what is left of the body would be taken for the next request
        if not sized and not self._is_head:
            if self.scope["http_version"] == "1.1":
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        elif self.scope["http_version"] != "1.1":
            lines.append(b"connection: keep-alive\r\n")
        lines.append(b"\r\n")
        self._head = b"".join(lines)
        self._started = True

    async def run(self) -> None:
        try:
            await self._connection.listener.app(self.scope, self.receive, self.send)
        except Exception:
            logger.exception("%s %s failed", self.scope["method"], self.scope["path"])
        if not self.done and not self.gone:
            if self.on_the_wire:
                self._connection.abort()  # the client must not take what it has for the whole
            else:
                self._connection.refuse(500, b"internal error")
