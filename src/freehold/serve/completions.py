"""POST /v1/completions: text or token ids in, text out, streamed or whole, with echo and logprobs."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from freehold.errors import InvalidRequest
from freehold.serve import schema
from freehold.serve.completion_reply import Asked, CompletionWriter, collect
from freehold.serve.openapi import Operation
from freehold.serve.params import (
    check_stream_options,
    check_token_ids,
    sampling_params,
    wants_running_usage,
    wants_usage,
)
from freehold.serve.schema import MAX_CHOICES, CompletionRequest
from freehold.serve.service import check_bytes
from freehold.serve.stream import DONE, EventStream, all_or_none, merge, until_disconnect
from freehold.serve.wire import decode, in_thread_if_large, json_response, new_id, read_json
from freehold.types import SamplingParams

if TYPE_CHECKING:
    from freehold.serve.reader import TextEvent
    from freehold.serve.state import ServerState

DEFAULT_MAX_TOKENS = 16  # OpenAI's

OPERATIONS = (
    Operation(
        "POST",
        "/v1/completions",
        "Continue texts",
        request=CompletionRequest,
        response=schema.Completion,
        event=schema.Completion,
        last="[DONE]",
    ),
)


def routes(state: ServerState) -> list[Route]:
    """The routes of this module."""

    async def create(request: Request) -> Response:
        body = await read_json(request, state.max_body_bytes)
        decoded = decode(body.value, CompletionRequest, "completions")
        ask = decoded.value
        model = state.resolve_model(ask.model)
        job = await in_thread_if_large(body.size, _read, ask, state, model)
        salt = state.cache_salt(request, ask.cache_salt)
        streams = await all_or_none(lambda index: _submit(state, ask, job, index, salt), len(job.prompts) * job.asked.n)
        if ask.stream:
            writer = CompletionWriter(job.asked, with_usage=wants_usage(ask), running=wants_running_usage(ask))
            return EventStream(request, _frames(writer, streams), warnings=decoded.warnings)
        completion = await until_disconnect(request, collect(job.asked, streams))
        return json_response(request, completion, warnings=decoded.warnings)

    return [Route("/v1/completions", create, methods=["POST"])]


async def _frames(
    writer: CompletionWriter, streams: Sequence[AsyncGenerator[TextEvent, None]]
) -> AsyncGenerator[bytes, None]:
    merged = merge(streams)
    try:
        async for index, event in merged:
            if frame := writer.frame(index, event):
                yield frame
    finally:
        await merged.aclose()
    yield writer.usage_frame() + DONE


@dataclass(frozen=True, slots=True)
class _Job:
    """A request, read: what to submit for each prompt, and how to answer."""

    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    asked: Asked


def _read(ask: CompletionRequest, state: ServerState, model: str) -> _Job:
    """Tokenise and check. Raises InvalidRequest."""
    check_stream_options(ask)
    echo, n = bool(ask.echo), ask.n or 1
    max_tokens = DEFAULT_MAX_TOKENS if ask.max_tokens is None else ask.max_tokens
    if max_tokens == 0 and not echo:
        raise InvalidRequest("max_tokens must be at least 1, unless the prompt is echoed", param="max_tokens")
    prompts = _prompt_ids(ask, state)
    if len(prompts) * n > MAX_CHOICES:
        raise InvalidRequest(f"{len(prompts)} prompts with n {n} are more than {MAX_CHOICES} choices", param="n")
    # Scoring only: the engine always generates, so one token is generated and left out of the answer.
    params = sampling_params(ask, state, max_tokens=max_tokens or 1, logprobs=ask.logprobs)
    if echo and ask.logprobs is not None:
        params = replace(params, prompt_logprobs=max(ask.logprobs, ask.prompt_logprobs or 0))
    asked = Asked(
        id=new_id("cmpl-"),
        created=int(time.time()),
        model=model,
        n=n,
        prompts=prompts,
        tokenizer=state.completion.tokenizer,
        echo=echo,
        generated=max_tokens > 0,
        logprobs=ask.logprobs,
        prompt_logprobs=ask.prompt_logprobs,
    )
    return _Job(prompts, params, asked)


def _submit(
    state: ServerState, ask: CompletionRequest, job: _Job, index: int, cache_salt: str | None
) -> AsyncGenerator[TextEvent, None]:
    prompt, choice = divmod(index, job.asked.n)
    return state.completion.run(
        job.prompts[prompt],
        job.params,
        request_id=f"{job.asked.id}-{index}",
        stop=ask.stop_strings(),
        include_stop=bool(ask.include_stop_str_in_output),
        cache_salt=cache_salt,
        adapter=state.adapter(job.asked.model),
        seed_offset=choice,
        running_usage=wants_running_usage(ask),
    )


def _prompt_ids(ask: CompletionRequest, state: ServerState) -> tuple[tuple[int, ...], ...]:
    """Token ids of every prompt. Raises InvalidRequest for lists of mixed kinds, and for what is empty."""
    prompt = ask.prompt
    items: list[str | list[int]]
    if isinstance(prompt, str):
        items = [prompt]
    elif ids := [item for item in prompt if isinstance(item, int)]:
        items = [ids] if len(ids) == len(prompt) else []
    else:
        items = [item for item in prompt if not isinstance(item, int)]
    if not items or len({type(item) for item in items}) > 1:
        raise InvalidRequest(
            "prompt: must be a text, texts, token ids, or lists of token ids; not empty and not mixed", param="prompt"
        )
    return tuple(_one_prompt(item, state) for item in items)


def _one_prompt(item: str | list[int], state: ServerState) -> tuple[int, ...]:
    if isinstance(item, str):
        check_bytes(state.engine, state.completion.tokenizer, item, param="prompt")
        ids = state.completion.tokenizer.encode(item)
    else:
        ids = item
    if not ids:
        raise InvalidRequest("prompt: is empty; the model needs at least one token to continue", param="prompt")
    check_token_ids("prompt", ids, state.engine.config.vocab_size)
    return tuple(ids)
