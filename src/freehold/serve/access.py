"""Who may ask: API keys, and a check of the Host header against DNS rebinding. A plain ASGI middleware.

With keys, every path but `/health` and `/ready` wants one, as `Authorization: Bearer KEY` or `x-api-key: KEY`;
`/metrics` is also open to callers on this machine, so that a scraper beside the server needs no secret
(a reverse proxy on this machine counts as such a caller: let it forward `/v1` only).
Without keys the server is bound to loopback, and then the only callers that are not local programs are web pages: one
that has pointed its own name at 127.0.0.1 is refused by its Host header, and one that has not cannot send
`application/json` across origins, because the server answers no CORS preflight.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Iterable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from freehold.address import is_local_host, is_loopback
from freehold.errors import AuthenticationFailed

Refuse = Callable[[Request, Exception], Awaitable[Response]]

OPEN_PATHS = frozenset({"/health", "/ready"})
LOCAL_PATHS = frozenset({"/metrics"})


class Guard:
    """Lets a request through, or refuses it with 401 or 403.

    refuse: makes the response. api_keys: any of them is accepted; none means that no key is asked for.
    local_only: check the Host header. Set it when the server is bound to loopback and asks for no key.
    """

    def __init__(self, app: ASGIApp, *, refuse: Refuse, api_keys: Iterable[str] = (), local_only: bool = False) -> None:
        self._app = app
        self._refuse = refuse
        self._keys = [_digest(key) for key in api_keys]
        self._local_only = local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(scope)
            if refusal is not None:
                response = await self._refuse(Request(scope), refusal)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Exception | None:
        headers = Headers(scope=scope)
        if self._local_only and not is_local_host(headers.get("host", "")):
            return HTTPException(403, "this server answers only to localhost; start it with an API key to open it up")
        path = scope["path"]
        if not self._keys or path in OPEN_PATHS or (path in LOCAL_PATHS and _is_local_caller(scope)):
            return None
        key = _sent_key(headers)
        if key is None:
            return AuthenticationFailed("no API key was sent; send `Authorization: Bearer KEY`")
        if not self._knows(key):
            return AuthenticationFailed("the API key is not one of this server's")
        return None

    def _knows(self, key: str) -> bool:
        digest = _digest(key)
        found = False
        for known in self._keys:  # all of them, every time: the time taken tells nothing
            found |= hmac.compare_digest(digest, known)
        return found


def cache_salt(request: Request, given: str | None, *, per_key: bool) -> str | None:
    """The prefix cache's salt of a request. given: the client's own.

    per_key: the caller's API key is mixed in, so that nobody can tell from the timing of an answer what the holders of
    other keys have asked.
    """
    key = _sent_key(request.headers) if per_key else None
    if key is None:
        return given
    digest = _digest(key).hex()
    return digest if given is None else f"{digest}:{given}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()  # equal lengths, so that the comparison does not tell the key's


def _sent_key(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or None


def _is_local_caller(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and is_loopback(client[0])
