"""schemathesis on the server's own OpenAPI document: what fits it never gives a 5xx, and answers fit it too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from freehold.serve.app import operations
from freehold.serve.openapi import document
from tests.contract.conftest import LiveServer

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def small_server() -> Iterator[LiveServer]:
    """Short answers, whatever is asked for."""
    live = LiveServer(max_model_len=256, num_blocks=512)
    yield live
    live.wait(live.is_idle)
    live.stop()


DOCUMENT = document(operations(), with_keys=False)


# For arrays of these requests' unions of blocks schemathesis sometimes finds no element that is wrong, and then gives
# up with an error of its own (InvalidSchema). Their wrong requests are in tests/unit/serve/test_messages.py.
POSITIVE_ONLY = {"include-path": ["/v1/messages", "/v1/messages/count_tokens"], "generation": {"mode": "positive"}}


def phase(name: str) -> schemathesis.BaseSchema:
    """The document, with one way of making requests from it."""
    names = ("examples", "coverage", "fuzzing")
    phases = {each: {"enabled": each == name} for each in names}
    config = schemathesis.Config.from_dict({"phases": phases, "operations": [POSITIVE_ONLY]})
    return schemathesis.openapi.from_dict(DOCUMENT, config=config)


def test_the_document_is_the_one_that_is_served(small_server: LiveServer) -> None:
    assert httpx.get(f"{small_server.url}/openapi.json").json() == DOCUMENT


@phase("fuzzing").parametrize()
@hypothesis.settings(max_examples=30)
def test_random_requests(case: schemathesis.Case, small_server: LiveServer) -> None:
    case.call_and_validate(base_url=small_server.url, checks=CHECKS, timeout=20)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 4}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 16}),
        ("/v1/messages", {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
    ],
)
def test_the_events_of_a_stream_fit_the_document(path: str, body: dict[str, Any], small_server: LiveServer) -> None:
    """To the end: random requests are seldom streams, and of long ones schemathesis reads the beginning only."""
    case = phase("examples")[path]["POST"].Case(body={**body, "stream": True}, media_type="application/json")
    case.call_and_validate(base_url=small_server.url, checks=CHECKS, timeout=20)


@pytest.mark.nightly
@phase("coverage").parametrize()
def test_every_boundary_of_every_field(case: schemathesis.Case, small_server: LiveServer) -> None:
    case.call_and_validate(base_url=small_server.url, checks=CHECKS, timeout=20)
