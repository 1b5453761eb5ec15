"""Adapters over HTTP: chosen by model name in every API, listed with their parent, and sharing no prefix cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from freehold.engine.sim import build_sim_engine
from freehold.errors import InvalidRequest
from freehold.model.chat.template import ChatTemplate
from freehold.serve.server import build_state
from tests.contract.conftest import LiveServer
from tests.contract.test_salt_per_key import ENDPOINTS


@pytest.mark.parametrize("path", ENDPOINTS)
def test_the_model_name_chooses(start: Callable[..., LiveServer], path: str) -> None:
    """What a request was computed with is seen in what of its prompt is found in the cache."""
    live = start(adapters=("tickets", "house"))
    body, cached_of = ENDPOINTS[path]

    def cached(model: str | None) -> int:
        answer = httpx.post(live.url + path, json=body if model is None else {"model": model, **body})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == (model or "sim")
        return cached_of(answer.json()["usage"])

    for model in ("sim", "tickets", "house"):
        assert cached(model) == 0
        assert cached(model) > 0
    assert cached("alias") > 0, "another name of the model"
    if path != "/v1/messages":  # whose clients must name one
        assert cached(None) > 0, "no name is the model's"
    refused = httpx.post(live.url + path, json={"model": "other", **body})
    assert refused.status_code == 404
    assert "'other' is not served here; this server has: sim, alias, tickets, house" in refused.text
    totals = live.state.engine.metrics.adapters
    assert (totals["tickets"].finished, totals["house"].finished) == (2, 2)


def test_they_are_listed_with_their_parent(start: Callable[..., LiveServer]) -> None:
    live = start(adapters=("tickets",))
    listed: list[dict[str, Any]] = httpx.get(f"{live.url}/v1/models").json()["data"]
    assert [(model["id"], model["root"], model["parent"]) for model in listed] == [
        ("sim", "sim", None),
        ("alias", "sim", None),
        ("tickets", "sim", "sim"),
    ]
    assert httpx.get(f"{live.url}/v1/models/tickets").json() == listed[2]
    assert httpx.get(f"{live.url}/v1/models/other").status_code == 404
    text = httpx.get(f"{live.url}/metrics").text
    assert 'freehold_adapter_requests_finished_total{adapter="tickets",model_name="freehold-sim"} 0.0' in text


def test_an_adapter_cannot_have_a_name_of_the_model() -> None:
    engine, tokenizer = build_sim_engine(adapters=("alias",))
    with pytest.raises(InvalidRequest, match="--lora alias: the model has this name"):
        build_state(engine, tokenizer, ChatTemplate.builtin(), model_names=("sim", "alias"))
