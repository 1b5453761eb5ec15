"""Prompts in every form, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from freehold.engine.sim import build_sim_engine
from freehold.model.chat.template import ChatTemplate
from freehold.serve.app import build_app
from freehold.serve.server import build_state


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(build_state(*build_sim_engine(), ChatTemplate.builtin()))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as found,
    ):
        yield found


@pytest.mark.parametrize(
    ("prompt", "choices", "tokens"),
    [("a", 1, 1), (["a", "b"], 2, 2), ([5, 6, 7], 1, 3), ([[5, 6], [7]], 2, 3), ([[5]], 1, 1), (["a"], 1, 1)],
)
async def test_prompts(client: httpx.AsyncClient, prompt: Any, choices: int, tokens: int) -> None:
    answer = (await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})).json()
    assert len(answer["choices"]) == choices
    assert answer["usage"]["prompt_tokens"] == tokens


async def test_control_tokens_may_be_written_out(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/v1/completions", json={"prompt": "[gMASK]<sop><|user|>", "max_tokens": 1})).json()
    assert answer["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": ["a", [5]]}, "prompt"),
        ({"prompt": [[5], 6]}, "prompt"),
        ({"prompt": [999_999]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": ["x"] * 100, "n": 2}, "n"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": "x", "stream_options": {}}, "stream_options"),
        ({"prompt": "x", "messages": []}, "messages"),
    ],
)
async def test_refusals_name_the_field(client: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("harmless", [{"suffix": ""}, {"best_of": 1}, {"suffix": None, "best_of": None}])
async def test_fields_that_ask_for_nothing_pass(client: httpx.AsyncClient, harmless: dict[str, Any]) -> None:
    response = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, **harmless})
    assert response.status_code == 200
    assert "x-freehold-warning" not in response.headers
