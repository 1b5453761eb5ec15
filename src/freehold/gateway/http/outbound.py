"""How bytes get to an upstream and back: the seam between the gateway and an HTTP client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Broken(Exception):
    """The connection failed. before_answer: no answer had begun, so the upstream may not have seen the request."""

    def __init__(self, message: str, *, before_answer: bool) -> None:
        super().__init__(message)
        self.before_answer = before_answer


class Incoming(Protocol):
    """An answer: status and headers are there, the body is yet to come. Close it."""

    @property
    def status(self) -> int: ...

    @property
    def fields(self) -> Mapping[str, str]:
        """The headers; names in lower case."""

    async def next(self) -> bytes:
        """What has come since; b"" at the end. Raises Broken, ValueError (it is no HTTP)."""

    def close(self) -> None:
        """Give the connection back, if the answer came whole; else end it, and with it the generation."""


class Outbound(Protocol):
    """Redirects are not followed, cookies not kept, proxies of the environment not used. Nothing is retried, but for a
    request that met a kept connection which the upstream was just closing.

    local_only: connect to private and loopback addresses only, whatever a name may have come to mean.
    """

    local_only: bool

    async def post(self, url: str, head: bytes, body: bytes, connect_seconds: float) -> Incoming:
        """head: header lines, each with its end. Returns with the headers of the answer. Raises Broken, ValueError."""

    async def close(self) -> None: ...
