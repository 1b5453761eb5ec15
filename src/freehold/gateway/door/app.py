"""The door: an ASGI application that knows whose a request is, reads it, and hands it on.

Calls of models take the short way (`_call`); everything else, which is rare, is a `Handler` in a table of routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
from collections.abc import Mapping, MutableMapping
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl

import msgspec

from freehold.address import is_local_host, is_loopback
from freehold.errors import (
    AuthenticationFailed,
    FreeholdError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RequestTimeout,
    TooLarge,
    Unavailable,
)
from freehold.gateway.call import Caller, Decision, Endpoint, Request, Target
from freehold.gateway.config import Settings
from freehold.gateway.door.relay import Call, Receive, Send
from freehold.gateway.door.reply import as_freehold, error_body, error_headers
from freehold.gateway.door.request import RequestReader
from freehold.gateway.door.upstream import Upstreams
from freehold.gateway.identity import new_id
from freehold.gateway.parts import Answer, Asked, Handler, Header, Parts, Routes

logger = logging.getLogger("freehold.gateway")

Scope: TypeAlias = MutableMapping[str, Any]

CALLS: Final[Mapping[str, Endpoint]] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/embeddings": "embeddings",
}
MAX_MIRRORS: Final = 64  # at once
BODY_SECONDS: Final = 30.0  # for a body to arrive, once its headers have
_CREDENTIALS: Final = frozenset((b"authorization", b"x-api-key", b"cookie", b"proxy-authorization"))
# Of these a request may have one: what stands in front of the gateway may have looked at another than we would.
_ONCE: Final = frozenset(
    "content-length content-type content-encoding host transfer-encoding x-conversation-id x-data-class x-prompt-name "
    "x-prompt-version x-task x-user-id".split()
)


class ClientLeft(Exception):
    """The client closed the connection before its request was whole."""


class Door:
    """The ASGI application. `configure` replaces settings, as for every part. local_only: no key, loopback only.

    admin_key: of `/admin/`; "": there is no such thing here.
    """

    def __init__(
        self,
        settings: Settings,
        parts: Parts,
        upstreams: Upstreams,
        reader: RequestReader,
        *,
        admin_key: str = "",
        local_only: bool = False,
    ) -> None:
        self.draining = False
        self.ready = True
        self.calls: set[Call] = set()
        self._mirrors: set[asyncio.Task[None]] = set()
        self._idle: asyncio.Event | None = None
        self._settings = settings
        self._parts = parts
        self._upstreams = upstreams
        self._reader = reader
        self._admin = hashlib.sha256(admin_key.encode()).digest() if admin_key else None
        self._local_only = local_only
        self._routes = RouteTable({**self._own_routes(), **parts.routes})

    def configure(self, settings: Settings) -> None:
        self._settings = settings

    async def idle(self) -> None:
        """Returns when no call is running; to be asked once, while draining."""
        if self.calls:
            self._idle = asyncio.Event()
            await self._idle.wait()

    async def close(self) -> None:
        """End the copies for shadows that are still running."""
        for task in self._mirrors:
            task.cancel()
        if self._mirrors:
            await asyncio.wait(self._mirrors)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        endpoint = CALLS.get(scope["path"])
        if endpoint is not None and scope["method"] == "POST":
            await self._call(endpoint, scope, receive, send)
        else:
            await self._other(scope, receive, send)

    # ---- calls of models ---------------------------------------------------------------------------------------

    async def _call(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = new_id()
        own: tuple[Header, ...] = ((b"x-request-id", request_id.encode()),)
        try:
            headers, token = read_headers(scope)
            caller = self._caller(headers, token, endpoint)
            if self.draining:
                raise Unavailable("the gateway is draining", retry_after=1)
            body = await read_body(headers, receive, self._settings.gateway.max_body_bytes)
            request = self._reader.read(endpoint, headers, body, caller, request_id)
            if caller.models and request.alias not in caller.models:
                raise PermissionDenied(f"this key may not use {request.alias!r}", param="model")
            if self._parts.router.crossing:
                await self._parts.router.settle(request)
            decision = self._parts.router.decide(request)
            ticket = await self._parts.admission.admit(request, decision)
            call = Call(
                request,
                decision,
                self._settings,
                self._parts,
                self._upstreams,
                send,
                output_limit=ticket.output_limit,
            )
            self.calls.add(call)
            try:
                await call.run(receive, (*own, *ticket.headers))
            finally:
                self.calls.discard(call)
                if self._idle is not None and not self.calls:
                    self._idle.set()
                self._parts.admission.settle(ticket, call.rows)
            if decision.shadow is not None and call.answered is not None:
                self._mirror(request, decision, decision.shadow, call, ticket.output_limit)
        except ClientLeft:
            pass
        except Exception as error:
            await self._refuse(send, error, endpoint, request_id, own)

    def _mirror(
        self, request: Request, decision: Decision, shadow: Target, real: Call, output_limit: int | None
    ) -> None:
        """Ask the shadow what the client asked, and throw its answer away. Too many at once: not this one."""
        if self.draining or len(self._mirrors) >= MAX_MIRRORS or real.answered is None:
            return
        copy = Decision((shadow,), experiment=decision.experiment, arm=shadow.arm, why="shadow")
        call = Call(
            request,
            copy,
            self._settings,
            self._parts,
            self._upstreams,
            _discard,
            output_limit=output_limit,
            shadow_of=real.answered.row_id,
            samplers=real.samplers,
        )
        task = asyncio.create_task(_run_mirror(call))
        self._mirrors.add(task)
        task.add_done_callback(self._mirrors.discard)

    def _caller(self, headers: Mapping[str, str], token: str, scope: str) -> Caller:
        """Raises AuthenticationFailed, PermissionDenied."""
        if self._local_only and not is_local_host(headers.get("host", "")):
            raise PermissionDenied("this gateway answers only to localhost; give it keys to open it up")
        caller = self._parts.keys.authenticate(token)
        if caller is None:
            raise AuthenticationFailed(
                "the API key is not one of this gateway's"
                if token
                else "no API key was sent; send `Authorization: Bearer KEY`"
            )
        if scope not in caller.scopes:
            raise PermissionDenied(f"this key has no scope {scope!r}")
        return caller

    async def _refuse(
        self, send: Send, error: Exception, endpoint: Endpoint | None, request_id: str, own: tuple[Header, ...]
    ) -> None:
        if not isinstance(error, FreeholdError):
            logger.error("request %s failed", request_id, exc_info=error)
        known = as_freehold(error)
        body = error_body(known, endpoint, request_id)
        await respond(send, Answer(body, known.status, headers=(*own, *error_headers(known))))

    # ---- everything else ---------------------------------------------------------------------------------------

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = new_id()
        own: tuple[Header, ...] = ((b"x-request-id", request_id.encode()),)
        path = scope["path"]
        method = "GET" if scope["method"] == "HEAD" else scope["method"]  # the server leaves out the body
        try:
            headers, token = read_headers(scope)
            handler, names = self._routes.find(method, path, admin=self._admin is not None)
            caller = self._allowed(scope, headers, token, path)
            if path == "/v1/feedback" and caller is not None:
                own = (*own, *self._parts.admission.count(caller))
            body = await read_body(headers, receive, self._settings.gateway.max_body_bytes) if method != "GET" else b""
            query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
            answer = await handler(Asked(method, path, query, headers, body, caller, names))
            await respond(send, Answer(answer.body, answer.status, answer.content_type, (*own, *answer.headers)))
        except ClientLeft:
            pass
        except Exception as error:
            endpoint = CALLS.get(path) if path == "/v1/messages" else None
            await self._refuse(send, error, endpoint, request_id, own)

    def _allowed(self, scope: Scope, headers: Mapping[str, str], token: str, path: str) -> Caller | None:
        """Whoever may ask for a path that is no call. Raises AuthenticationFailed, PermissionDenied."""
        if path in ("/health", "/ready"):
            return None
        if path.startswith("/admin/"):
            self._check_admin(token)
            return None
        if path.startswith("/v1/"):
            return (
                self._caller(headers, token, "feedback") if path == "/v1/feedback" else self._any_caller(headers, token)
            )
        client = scope.get("client")
        if client is None or not is_loopback(client[0]) or self._settings.gateway.metrics == "admin":
            self._check_admin(token)  # /metrics
        return None

    def _any_caller(self, headers: Mapping[str, str], token: str) -> Caller:
        caller = self._parts.keys.authenticate(token)
        return self._caller(headers, token, next(iter(caller.scopes), "") if caller is not None else "")

    def _check_admin(self, token: str) -> None:
        digest = hashlib.sha256(token.encode()).digest()
        if self._admin is None or not hmac.compare_digest(digest, self._admin):
            raise AuthenticationFailed("this needs the admin key")

    def _own_routes(self) -> Routes:
        return {
            "GET /health": self._health,
            "GET /ready": self._is_ready,
            "GET /v1/models": self._models,
            "GET /v1/models/{model}": self._model,
        }

    async def _health(self, asked: Asked) -> Answer:
        return Answer(b'{"status":"ok"}')

    async def _is_ready(self, asked: Asked) -> Answer:
        if self.draining or not self.ready:
            raise Unavailable("the gateway is draining" if self.draining else "the gateway is starting", retry_after=1)
        return Answer(b'{"status":"ready"}')

    async def _models(self, asked: Asked) -> Answer:
        models = [self._describe(alias) for alias in self._settings.models if self._may_use(asked.caller, alias)]
        return Answer(msgspec.json.encode({"object": "list", "data": models, "has_more": False}))

    async def _model(self, asked: Asked) -> Answer:
        alias = asked.names["model"]
        if alias not in self._settings.models or not self._may_use(asked.caller, alias):
            raise NotFound(f"there is no model {alias!r}", param="model")
        return Answer(msgspec.json.encode(self._describe(alias)))

    @staticmethod
    def _may_use(caller: Caller | None, alias: str) -> bool:
        return caller is not None and (not caller.models or alias in caller.models)

    def _describe(self, alias: str) -> dict[str, Any]:
        """OpenAI's words and Anthropic's together: each SDK reads its own."""
        described: dict[str, Any] = {"id": alias, "object": "model", "created": 0, "owned_by": "freehold"}
        return described | {"type": "model", "display_name": alias, "created_at": "1970-01-01T00:00:00Z"}


class RouteTable:
    """Routes by method and path. A `{name}` stands for one segment, of a model for all that follow."""

    def __init__(self, routes: Routes) -> None:
        self._exact: dict[str, dict[str, Handler]] = {}
        self._patterns: list[tuple[str, list[str], Handler]] = []
        for route, handler in routes.items():
            method, _, path = route.partition(" ")
            if "{" in path:
                self._patterns.append((method, path.split("/"), handler))
            else:
                self._exact.setdefault(path, {})[method] = handler

    def find(self, method: str, path: str, *, admin: bool) -> tuple[Handler, Mapping[str, str]]:
        """The handler, and what stands for the names. Raises NotFound. admin: whether there is an admin API."""
        if admin or not path.startswith("/admin/"):
            by_method = self._exact.get(path, {})
            if method in by_method:
                return by_method[method], {}
            for wanted, pattern, handler in self._patterns:
                names = _match(pattern, path)
                if names is not None and wanted == method:
                    return handler, names
        raise NotFound(f"there is no {method} {path[:200]} here")


def _match(pattern: list[str], path: str) -> Mapping[str, str] | None:
    segments = path.split("/", len(pattern) - 1)
    if len(segments) != len(pattern):
        return None
    names: dict[str, str] = {}
    for wanted, segment in zip(pattern, segments, strict=True):
        if wanted.startswith("{"):
            if not segment or ("/" in segment and wanted != "{model}") or segment in (".", ".."):
                return None
            names[wanted[1:-1]] = segment
        elif wanted != segment:
            return None
    return names


def read_headers(scope: Scope) -> tuple[dict[str, str], str]:
    """The headers without credentials, and the key that was sent ("": none). Raises InvalidRequest: two of a kind that
    may come once only."""
    headers: dict[str, str] = {}
    bearer = key = ""
    shown: set[bytes] = set()
    for name, value in scope["headers"]:
        if name in _CREDENTIALS:
            if name in shown and name in (b"authorization", b"x-api-key"):
                raise InvalidRequest(f"there are two headers {name.decode()!r}")
            shown.add(name)
            if name == b"authorization":
                scheme, _, token = value.partition(b" ")
                bearer = token.strip().decode("latin-1") if scheme.lower() == b"bearer" else ""
            elif name == b"x-api-key":
                key = value.decode("latin-1")
            continue
        text = name.decode("latin-1")
        if text in headers and text in _ONCE:
            raise InvalidRequest(f"there are two headers {text!r}")
        headers[text] = value.decode("latin-1")
    return headers, bearer or key


async def read_body(headers: Mapping[str, str], receive: Receive, most: int) -> bytes:
    """The whole body. Raises TooLarge, RequestTimeout, InvalidRequest (compressed), ClientLeft."""
    length = headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > most:
        raise TooLarge(f"the body has {length[:20]} bytes; the limit is {most}")
    if headers.get("content-encoding", "identity") != "identity":
        raise InvalidRequest("send the body uncompressed", param="content-encoding")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            first = await receive()
            if first["type"] != "http.request":
                raise ClientLeft
            if first.get("more_body", False):
                return await _rest_of_body(first, receive, most)
        if len(first.get("body", b"")) > most:
            raise TooLarge(f"the body is larger than the limit of {most} bytes")
        return bytes(first.get("body", b""))
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {BODY_SECONDS:g} s") from None


async def _rest_of_body(message: MutableMapping[str, Any], receive: Receive, most: int) -> bytes:
    body = bytearray(message.get("body", b""))
    while message.get("more_body", False):
        message = await receive()
        if message["type"] != "http.request":
            raise ClientLeft
        body += message.get("body", b"")
        if len(body) > most:
            raise TooLarge(f"the body is larger than the limit of {most} bytes")
    return bytes(body)


async def _discard(message: MutableMapping[str, Any]) -> None:
    """Where the answers of shadows go."""


async def _never() -> MutableMapping[str, Any]:
    """There is no client who could leave."""
    await asyncio.Event().wait()
    raise AssertionError


async def _run_mirror(call: Call) -> None:
    with contextlib.suppress(FreeholdError):  # its row says what went wrong
        await call.run(_never, ())


async def respond(send: Send, answer: Answer) -> None:
    """An answer that is whole."""
    head = [
        (b"content-type", answer.content_type.encode()),
        (b"content-length", b"%d" % len(answer.body)),
        *answer.headers,
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": head})
    await send({"type": "http.response.body", "body": answer.body})
