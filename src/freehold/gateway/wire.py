"""How a request of one API is put to an upstream: as it is where the upstream speaks that API, else translated.

A `Wire` is one way to do so; `wire_for` chooses. Chat and Messages translate into each other; nothing else does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from freehold.gateway.call import Endpoint, Request, Target
from freehold.gateway.outgoing import PATHS, body_for


class StreamTranslator(Protocol):
    def feed(self, events: bytes) -> bytes:
        """Whole events of the upstream's API to whole events of the client's; b"" if there is nothing to say yet."""

    def end(self) -> bytes:
        """What is still to be said when the upstream's stream has ended."""


class Wire(Protocol):
    @property
    def endpoint(self) -> Endpoint:
        """Of the upstream."""

    @property
    def path(self) -> str: ...

    def body(self, request: Request, target: Target, limit: int | None, engine: str) -> bytes:
        """Raises InvalidRequest: it cannot be said in the upstream's API."""

    def whole(self, body: bytes, alias: str) -> bytes: ...

    def error(self, body: bytes, status: int) -> bytes: ...

    def stream(self, request: Request) -> StreamTranslator | None:
        """None: as it comes."""


class Same:
    """The upstream speaks the client's API: bytes go through."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.path = PATHS[endpoint]

    def body(self, request: Request, target: Target, limit: int | None, engine: str) -> bytes:
        return body_for(request, target.model_id, target.effort, limit, engine)

    def whole(self, body: bytes, alias: str) -> bytes:
        return body

    def error(self, body: bytes, status: int) -> bytes:
        return body

    def stream(self, request: Request) -> StreamTranslator | None:
        return None


_SAME: dict[Endpoint, Wire] = {endpoint: Same(endpoint) for endpoint in PATHS}


def wire_for(endpoint: Endpoint, speaks: Sequence[Endpoint]) -> Wire | None:
    """None: there is no way to put it."""
    if endpoint in speaks:
        return _SAME[endpoint]
    return None
