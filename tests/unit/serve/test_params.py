"""Every sampling field reaches the engine, from both APIs, and rules between fields are kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from freehold.engine.sim import build_sim_engine
from freehold.errors import InvalidRequest
from freehold.model.chat.template import ChatTemplate
from freehold.serve.app import build_app
from freehold.serve.chat_turn import to_turn
from freehold.serve.params import sampling_params
from freehold.serve.schema import ChatRequest, CompletionRequest, SamplingRequest
from freehold.serve.server import build_state
from freehold.serve.state import ServerState
from freehold.serve.wire import decode
from freehold.types import SamplingParams

SHARED = {
    "temperature": 0.3,
    "top_p": 0.4,
    "top_k": 5,
    "min_p": 0.2,
    "frequency_penalty": 0.6,
    "presence_penalty": -0.7,
    "repetition_penalty": 1.1,
    "logit_bias": {"12": 3},
    "seed": 9,
    "stop": ["zzz"],
    "stop_token_ids": [13],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "min_tokens": 2,
    "prompt_logprobs": 1,
    "cache_salt": "salt",
}
EXPECTED: dict[str, Any] = {
    "temperature": 0.3,
    "top_p": 0.4,
    "top_k": 5,
    "min_p": 0.2,
    "frequency_penalty": 0.6,
    "presence_penalty": -0.7,
    "repetition_penalty": 1.1,
    "logit_bias": {12: 3.0},
    "seed": 9,
    "stop_token_ids": (13,),
    "ignore_eos": True,
    "min_tokens": 2,
    "prompt_logprobs": 1,
}


@pytest.fixture
def state() -> ServerState:
    return build_state(*build_sim_engine(), ChatTemplate.builtin())


def test_the_table_above_has_every_shared_field() -> None:
    assert set(SHARED) == set(SamplingRequest.__struct_encode_fields__) - {"model", "stream", "stream_options", "n"}


def test_a_chat_request_reaches_the_turn_whole(state: ServerState) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    raw = {
        **SHARED,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 33,
        "logprobs": True,
        "top_logprobs": 4,
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "response_format": {"type": "json_object"},
        "reasoning_effort": "high",
        "chat_template_kwargs": {"clear_thinking": True},
        "thinking": {"type": "enabled"},
    }
    turn = to_turn(decode(raw, ChatRequest, "chat").value, state)
    assert turn.params == SamplingParams(**EXPECTED, max_tokens=33, logprobs=4)
    assert turn.max_tokens_given
    assert turn.tools == (tool,)
    assert turn.tool_choice == "required"
    assert not turn.parallel_tool_calls
    assert turn.response_format == {"type": "json_object"}
    assert turn.effort == "high"
    assert turn.template_kwargs == {"clear_thinking": True, "enable_thinking": True}
    assert (turn.stop, turn.include_stop, turn.cache_salt) == (("zzz",), True, "salt")


def test_an_empty_chat_request_asks_for_nothing(state: ServerState) -> None:
    raw = {"messages": [{"role": "user", "content": "hi"}]}
    turn = to_turn(decode(raw, ChatRequest, "chat").value, state)
    assert not turn.max_tokens_given
    assert turn.params == SamplingParams(max_tokens=turn.params.max_tokens)
    assert (turn.tools, turn.tool_choice, turn.response_format, turn.effort) == ((), "auto", None, None)
    assert (turn.parallel_tool_calls, turn.stop, turn.include_stop, turn.cache_salt) == (True, (), False, None)


@pytest.fixture
async def submitted(state: ServerState, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """Posts to /v1/completions and returns what CompletionService was asked to run."""
    seen: list[tuple[tuple[int, ...], SamplingParams, dict[str, Any]]] = []
    run = state.completion.run

    def spy(prompt: tuple[int, ...], params: SamplingParams, **options: Any) -> Any:
        seen.append((prompt, params, options))
        return run(prompt, params, **options)

    monkeypatch.setattr(state.completion, "run", spy)
    app = build_app(state)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):

        async def post(**body: Any) -> Any:
            seen.clear()
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            return seen

        yield post


async def test_a_completion_request_reaches_the_engine_whole(submitted: Any) -> None:
    ((prompt, params, options),) = await submitted(**SHARED, prompt=[5, 6], max_tokens=3, logprobs=2)
    assert prompt == (5, 6)
    assert params == SamplingParams(**EXPECTED, max_tokens=3, logprobs=2)
    options.pop("request_id")
    assert options == {
        "stop": ("zzz",),
        "include_stop": True,
        "cache_salt": "salt",
        "adapter": None,
        "seed_offset": 0,
        "running_usage": False,
    }


async def test_choices_of_a_prompt_have_seeds_and_ids_of_their_own(submitted: Any) -> None:
    seen = await submitted(prompt=[[5], [6]], n=2, max_tokens=1)
    assert [(prompt, options["seed_offset"]) for prompt, _, options in seen] == [
        ((5,), 0),
        ((5,), 1),
        ((6,), 0),
        ((6,), 1),
    ]
    assert len({options["request_id"] for _, _, options in seen}) == 4


@pytest.mark.parametrize(
    ("body", "prompt_logprobs"),
    [
        ({}, None),
        ({"echo": True}, None),
        ({"logprobs": 2}, None),
        ({"echo": True, "logprobs": 2}, 2),
        ({"echo": True, "logprobs": 2, "prompt_logprobs": 5}, 5),
        ({"echo": True, "logprobs": 2, "prompt_logprobs": 1}, 2),
    ],
)
async def test_an_echo_with_logprobs_scores_the_prompt(
    submitted: Any, body: dict[str, Any], prompt_logprobs: int | None
) -> None:
    ((_, params, _),) = await submitted(prompt="hi", max_tokens=1, **body)
    assert params.prompt_logprobs == prompt_logprobs


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"2048": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"stop_token_ids": [2048]}, "stop_token_ids"),
        ({"min_tokens": 17}, "min_tokens"),
    ],
)
def test_what_no_range_can_say(state: ServerState, fields: dict[str, Any], param: str) -> None:
    ask = decode({"prompt": "x", **fields}, CompletionRequest, "completions").value
    with pytest.raises(InvalidRequest) as caught:
        sampling_params(ask, state, max_tokens=16, logprobs=None)
    assert caught.value.param == param
