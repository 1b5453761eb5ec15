"""The `openai` SDK against a live server: text completions and models."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.contract.conftest import LiveServer
from tests.contract.openai_chat import MODEL


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8)
    (choice,) = answer.choices
    assert choice.text.startswith(" and so it goes")
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"


def test_completion_is_16_tokens_long_unless_asked(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_completions_of_texts_and_token_ids_are_the_same(server: LiveServer, client: openai.OpenAI) -> None:
    texts = ["Once upon", "a time there"]
    ids = [server.state.chat.tokenizer.encode(text) for text in texts]
    by_text = client.completions.create(model=MODEL, prompt=texts, n=2, echo=True)
    by_ids = client.completions.create(model=MODEL, prompt=ids, n=2, echo=True)
    assert [choice.index for choice in by_text.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_ids.choices]
    assert [choice.text.startswith(texts[i // 2]) for i, choice in enumerate(by_text.choices)] == [True] * 4
    assert by_text.usage is not None
    assert by_text.usage.prompt_tokens == sum(map(len, ids))
    one = client.completions.create(model=MODEL, prompt=ids[0])
    assert by_text.choices[0].text == texts[0] + one.choices[0].text


@pytest.mark.parametrize("echo", [False, True])
def test_completion_stream(client: openai.OpenAI, echo: bool) -> None:
    options: Any = {"model": MODEL, "prompt": ["Once upon", "a time"], "echo": echo, "logprobs": 1, "seed": 3}
    whole = client.completions.create(**options)
    *chunks, last = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    for index, expected in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == expected.text
        assert [choice.finish_reason for choice in mine][-1] == expected.finish_reason
        assert expected.logprobs is not None
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = [item for choice in mine if choice.logprobs for item in getattr(choice.logprobs, name)]
            assert joined == getattr(expected.logprobs, name)


def test_completion_logprobs_align(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Grüße 🌍 an", echo=True, logprobs=2, max_tokens=4)
    (choice,) = answer.choices
    lists: Any = choice.logprobs
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.text_offset) == len(lists.top_logprobs)
    assert b"".join(map(bytes, lists.bytes)).decode() == choice.text
    assert lists.token_logprobs[0] is None
    assert lists.top_logprobs[0] is None
    assert all(logprob < 0 for logprob in lists.token_logprobs[1:])
    for token, offset in zip(lists.tokens, lists.text_offset, strict=True):
        if "\ufffd" not in token:  # a whole character, or several
            assert choice.text[offset : offset + len(token)] == token


def test_scoring_only(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Score this", echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == "Score this"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or ()) == answer.usage.prompt_tokens


def test_completion_prompt_logprobs(server: LiveServer, client: openai.OpenAI) -> None:
    ids = server.state.chat.tokenizer.encode("Score this text")
    answer = client.completions.create(model=MODEL, prompt=ids, max_tokens=1, extra_body={"prompt_logprobs": 0})
    first, *rest = (answer.choices[0].model_extra or {})["prompt_logprobs"]
    assert first is None
    assert [next(iter(position)) for position in rest] == [str(token_id) for token_id in ids[1:]]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["sim", "alias"]
    model = client.models.retrieve("alias")
    assert (model.object, model.owned_by) == ("model", "freehold")
    assert (model.model_extra or {})["root"] == "sim"
