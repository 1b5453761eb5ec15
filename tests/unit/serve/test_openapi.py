"""The OpenAPI document says what the server does."""

from __future__ import annotations

import msgspec
from starlette.routing import Route

from freehold.engine.sim import build_sim_engine
from freehold.model.chat.template import ChatTemplate
from freehold.serve.app import API_MODULES, build_app, operations
from freehold.serve.openapi import document
from freehold.serve.server import build_state


def test_every_route_is_in_the_document_and_the_other_way_round() -> None:
    app = build_app(build_state(*build_sim_engine(), ChatTemplate.builtin()))
    routes = {
        (method, route.path.replace(":path", ""))
        for route in app.routes
        if isinstance(route, Route) and route.path != "/openapi.json"
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert routes == {(operation.method, operation.path) for operation in operations()}
    assert len(API_MODULES) >= 4


def test_references_lead_somewhere() -> None:
    text = msgspec.json.encode(document(operations(), with_keys=True)).decode()
    known = document(operations(), with_keys=True)["components"]["schemas"]
    references = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert references
    assert references <= set(known)


def test_requests_allow_no_other_fields() -> None:
    schemas = document(operations(), with_keys=False)["components"]["schemas"]
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert schemas["ChatRequest"]["properties"]["temperature"]["anyOf"][0] == {
        "type": "number",
        "minimum": 0,
        "maximum": 2,
    }


def test_keys_are_asked_for_where_they_are_needed() -> None:
    paths = document(operations(), with_keys=True)["paths"]
    assert "security" in paths["/v1/chat/completions"]["post"]
    assert "security" not in paths["/health"]["get"]
    assert "security" not in document(operations(), with_keys=False)["paths"]["/v1/chat/completions"]["post"]


def test_operation_ids_are_unique() -> None:
    paths = document(operations(), with_keys=False)["paths"]
    ids = [operation["operationId"] for path in paths.values() for operation in path.values()]
    assert len(set(ids)) == len(ids)
