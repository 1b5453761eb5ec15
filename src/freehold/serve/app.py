"""The ASGI application: the routes of every API, the guard in front of them, and errors in each API's own shape."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from freehold.errors import FreeholdError
from freehold.serve import chat, completions, messages, operate, responses, tokenize
from freehold.serve.access import Guard
from freehold.serve.openapi import Operation, document
from freehold.serve.state import ServerState
from freehold.serve.wire import encode_json, error_headers, error_response, error_status, json_response, log_failure

logger = logging.getLogger("freehold.serve")

# Each has OPERATIONS and routes(state).
API_MODULES = (chat, completions, responses, messages, tokenize, operate)


def operations() -> list[Operation]:
    """What the server does, for its OpenAPI document."""
    return [operation for module in API_MODULES for operation in module.OPERATIONS]


def build_app(state: ServerState, *, on_warm: Callable[[Exception | None], None] | None = None) -> Starlette:
    """The whole application. Its lifespan starts the engine, warms it up, and closes it.

    on_warm: called when a first generation has completed, or with what went wrong with it.
    """
    handler = partial(_handle_error, {operation.path: operation for operation in operations()})
    body = encode_json(document(operations(), with_keys=bool(state.api_keys)))

    local_only = state.loopback and not state.api_keys

    async def openapi(request: Request) -> Response:
        return Response(body, media_type="application/json")

    app = Starlette(
        routes=[
            *(route for module in API_MODULES for route in module.routes(state)),
            Route("/openapi.json", openapi),
        ],
        middleware=[Middleware(Guard, refuse=handler, api_keys=state.api_keys, local_only=local_only)],
        exception_handlers={
            FreeholdError: handler,
            HTTPException: handler,
            ClientDisconnect: handler,
            Exception: handler,
        },
        lifespan=lambda _: _lifespan(state, on_warm),
    )
    app.router.redirect_slashes = False  # a 404 says more than a redirect that drops the body
    return app


async def _handle_error(by_path: dict[str, Operation], request: Request, error: Exception) -> Response:
    path = request.scope["path"]
    operation = by_path.get(path)
    if isinstance(error, FreeholdError):  # the server logs the others
        log_failure(f"{request.method} {path}", error)
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        error = HTTPException(error.status_code, f"no {request.method} {path} here; see /openapi.json", error.headers)
    if operation is None or isinstance(error, ClientDisconnect):
        return error_response(request, error)
    body = operation.errors(error)
    return json_response(request, body, status=error_status(error), headers=error_headers(error))


@asynccontextmanager
async def _lifespan(state: ServerState, on_warm: Callable[[Exception | None], None] | None) -> AsyncIterator[None]:
    engine = state.engine
    await engine.start()

    async def warm_up() -> None:
        failure: Exception | None = None
        try:
            await engine.warm_up()
        except Exception as error:
            failure = error
            logger.error("the first generation failed: %s", error)
        if on_warm is not None:
            on_warm(failure)

    warming = asyncio.create_task(warm_up(), name="warm-up")
    try:
        yield
    finally:
        warming.cancel()
        await asyncio.wait({warming})
        await engine.close()
