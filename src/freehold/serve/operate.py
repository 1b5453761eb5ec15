"""What operators and load balancers ask: models, health, readiness, metrics, and the OpenAPI document."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from freehold.errors import Unavailable
from freehold.serve.openapi import Operation
from freehold.serve.schema import Health, Model, ModelList
from freehold.serve.wire import json_response

if TYPE_CHECKING:
    from freehold.serve.state import ServerState

OPERATIONS = (
    Operation("GET", "/v1/models", "The models that are served", response=ModelList),
    Operation("GET", "/v1/models/{model}", "One of them", response=Model),
    Operation("GET", "/health", "Live: the engine runs", response=Health, open=True),
    Operation("GET", "/ready", "Ready: a generation completed, and requests are taken", response=Health, open=True),
    Operation("GET", "/metrics", "Prometheus metrics", text="text/plain"),
)

RETRY_SECONDS = 2.0  # how soon to ask again while the engine warms up


def routes(state: ServerState) -> list[Route]:
    """The routes of this module."""

    async def list_models(request: Request) -> Response:
        return json_response(request, ModelList(data=[_model(name) for name in (*state.model_names, *state.adapters)]))

    async def get_model(request: Request) -> Response:
        return json_response(request, _model(state.resolve_model(request.path_params["model"])))

    def _model(name: str) -> Model:
        return Model(
            id=name,
            created=state.started,
            max_model_len=state.engine.config.max_model_len,
            root=state.model_name,
            parent=None if state.adapter(name) is None else state.model_name,
        )

    async def health(request: Request) -> Response:
        if not state.engine.is_alive:
            raise Unavailable("the engine is not running; the log says why, and a restart is needed")
        return json_response(request, Health("ok"))

    async def ready(request: Request) -> Response:
        if not state.engine.is_ready:
            raise Unavailable("not ready: warming up, or shutting down", retry_after=RETRY_SECONDS)
        return json_response(request, Health("ready"))

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(state.engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return [
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", get_model),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
    ]
