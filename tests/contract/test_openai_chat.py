"""The `openai` SDK against a live server: chat, streams, thinking and logprobs."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.contract.openai_chat import MODEL, collect, function, user


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("Grüße an alle 🌍"))
    (choice,) = answer.choices
    assert choice.message.content == "You said: Grüße an alle 🌍"
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert choice.message.tool_calls is None
    assert choice.message.model_extra is not None
    assert "Grüße" in choice.message.model_extra["reasoning_content"]
    assert choice.message.model_extra["reasoning"] == choice.message.model_extra["reasoning_content"]
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")


def test_usage_counts_reasoning_and_cached_tokens(client: openai.OpenAI) -> None:
    messages = user("count me " * 100)
    first, second = (client.chat.completions.create(model=MODEL, messages=messages).usage for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.total_tokens == first.prompt_tokens + first.completion_tokens
    assert first.completion_tokens_details is not None
    assert 0 < (first.completion_tokens_details.reasoning_tokens or 0) < first.completion_tokens
    assert second.prompt_tokens_details is not None
    assert 0 < (second.prompt_tokens_details.cached_tokens or 0) < second.prompt_tokens


def test_a_cache_salt_keeps_callers_apart(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int | None:
        answer = client.chat.completions.create(
            model=MODEL, messages=user("salted " * 100), extra_body={"cache_salt": salt}
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached("ann") == 0
    assert cached("bob") == 0
    assert cached("ann")


def test_an_alias_answers_under_its_own_name(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model="alias", messages=user("hi")).model == "alias"


def test_a_conversation_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    weather = function("get_weather", city={"type": "string"})
    messages: list[Any] = user("weather please")
    first = client.chat.completions.create(model=MODEL, messages=messages, tools=[weather])
    (call,) = first.choices[0].message.tool_calls or ()
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "21 °C"}]
    second = client.chat.completions.create(model=MODEL, messages=messages, tools=[weather])
    assert second.choices[0].message.content == "The tool says: 21 °C"


def test_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=user("Grüße an alle 🌍")).choices[0].message
    chunks = list(client.chat.completions.create(model=MODEL, messages=user("Grüße an alle 🌍"), stream=True))
    message = collect(chunks)
    assert message["content"] == whole.content
    assert message["reasoning"] == (whole.model_extra or {})["reasoning"]
    assert message["finish"] == "stop"
    assert message["roles"] == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    assert all(len(chunk.choices) == 1 for chunk in chunks)


def test_stream_usage_is_the_last_chunk_and_only_that(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=user("hi"), extra_body={"cache_salt": "s1"}).usage
    *chunks, last = client.chat.completions.create(
        model=MODEL,
        messages=user("hi"),
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"cache_salt": "s2"},
    )
    assert last.choices == []
    assert last.usage == whole
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert all("usage" in chunk.model_fields_set for chunk in chunks)


def test_the_sdks_own_stream_reader_understands_it(client: openai.OpenAI) -> None:
    tools = [function("get_weather", city={"type": "string"})]
    with client.chat.completions.stream(model=MODEL, messages=user("weather"), tools=tools) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert (final.choices[0].message.tool_calls or ())[0].function.name == "get_weather"


def test_n_gives_that_many_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("hi"), n=2, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1]
    first, second = (choice.message.content for choice in answer.choices)
    assert first != second, "each choice has a seed of its own"
    one = client.chat.completions.create(model=MODEL, messages=user("hi"), seed=7)
    assert one.choices[0].message.content == first
    assert answer.usage is not None
    assert one.usage is not None
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens, "the prompt counts once"
    assert answer.usage.completion_tokens > one.usage.completion_tokens


def test_n_streams_interleave(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=user("hi"), n=3, seed=7)
    chunks = list(client.chat.completions.create(model=MODEL, messages=user("hi"), n=3, seed=7, stream=True))
    for choice in whole.choices:
        assert collect(chunks, choice.index)["content"] == choice.message.content
    order = [chunk.choices[0].index for chunk in chunks]
    assert order != sorted(order), "they come as they are made, not one after the other"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_ends_it(client: openai.OpenAI, name: str) -> None:
    limit: Any = {name: 5}
    answer = client.chat.completions.create(model=MODEL, messages=user("hi"), **limit)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("stop", "content"), [("two", "You said: one "), (["x", " two"], "You said: one"), (None, None)]
)
def test_stop_strings(client: openai.OpenAI, stop: Any, content: str | None) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=user("one two three"), stop=stop, reasoning_effort="none"
    )
    assert answer.choices[0].message.content == (content or "You said: one two three")
    assert answer.choices[0].finish_reason == "stop"


def test_a_stop_string_can_be_kept(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=user("one two three"),
        stop="two",
        reasoning_effort="none",
        extra_body={"include_stop_str_in_output": True},
    )
    assert answer.choices[0].message.content == "You said: one two"
    assert (answer.choices[0].model_extra or {})["stop_reason"] == "two"


@pytest.mark.parametrize(
    "off",
    [
        {"reasoning_effort": "none"},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"extra_body": {"thinking": {"type": "disabled"}}},
    ],
)
def test_thinking_can_be_switched_off(client: openai.OpenAI, off: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("hi"), **off)
    assert (answer.choices[0].message.model_extra or {})["reasoning_content"] is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_an_effort_that_the_model_maps_is_said_in_a_header(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=user("hi"), reasoning_effort="low", user="ann"
    )
    warning = raw.headers["x-freehold-warning"]
    assert "low" in warning
    assert "user is ignored" in warning
    assert raw.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: openai.OpenAI, stream: bool) -> None:
    options: Any = {"model": MODEL, "messages": user("Grüße 🌍"), "logprobs": True, "top_logprobs": 3}
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True))
        content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        found = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
        tokens = [token for logprobs in found for token in logprobs.content or ()]
        thoughts = [token for logprobs in found for token in (logprobs.model_extra or {}).get("reasoning", ())]
    else:
        (choice,) = client.chat.completions.create(**options).choices
        assert choice.logprobs is not None
        content, tokens = choice.message.content or "", choice.logprobs.content or []
        thoughts = (choice.logprobs.model_extra or {})["reasoning"]
    assert b"".join(bytes(token.bytes or ()) for token in tokens).decode() == content
    assert b"Gr\xc3\xbc\xc3\x9fe" in b"".join(bytes(token["bytes"]) for token in thoughts)
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= max(top.logprob for top in token.top_logprobs) < 0


def test_no_logprobs_unless_asked(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model=MODEL, messages=user("hi")).choices[0].logprobs is None
    answer = client.chat.completions.create(model=MODEL, messages=user("hi"), logprobs=True)
    assert answer.choices[0].logprobs is not None
    assert all(token.top_logprobs == [] for token in answer.choices[0].logprobs.content or ())


def test_chat_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=user("hi"), max_tokens=1, extra_body={"prompt_logprobs": 2}
    )
    assert answer.usage is not None
    first, *rest = (answer.model_extra or {})["prompt_logprobs"]
    assert first is None
    assert len(rest) == answer.usage.prompt_tokens - 1
    for position in rest:
        assert 2 <= len(position) <= 3
        own = next(iter(position.values()))
        assert set(own) == {"logprob", "rank", "decoded_token"}
        assert own["rank"] >= 1
