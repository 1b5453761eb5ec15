"""POST /v1/chat/completions: OpenAI chat in, OpenAI chat out, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from freehold.serve import schema
from freehold.serve.chat_reply import ChunkWriter, Reply, collect
from freehold.serve.chat_turn import to_turn
from freehold.serve.openapi import Operation
from freehold.serve.params import wants_running_usage, wants_usage
from freehold.serve.schema import ChatRequest
from freehold.serve.stream import DONE, EventStream, all_or_none, merge, until_disconnect
from freehold.serve.turn import Event, PreparedTurn
from freehold.serve.wire import decode, in_thread_if_large, json_response, new_id, read_json

if TYPE_CHECKING:
    from freehold.serve.state import ServerState

OPERATIONS = (
    Operation(
        "POST",
        "/v1/chat/completions",
        "Answer a conversation",
        request=ChatRequest,
        response=schema.ChatCompletion,
        event=schema.ChatChunk,
        last="[DONE]",
    ),
)


def routes(state: ServerState) -> list[Route]:
    """The routes of this module."""

    async def create(request: Request) -> Response:
        body = await read_json(request, state.max_body_bytes)
        decoded = decode(body.value, ChatRequest, "chat")
        ask = decoded.value
        model = state.resolve_model(ask.model)
        salt = state.cache_salt(request, ask.cache_salt)
        turn = replace(to_turn(ask, state), cache_salt=salt, adapter=state.adapter(model))
        # Compiling a grammar takes as long as it takes, however short the request.
        weight = body.size if turn.response_format is None and turn.tool_choice in ("auto", "none") else inf
        prepared = await in_thread_if_large(weight, state.chat.prepare, turn)
        warnings = (*decoded.warnings, *prepared.warnings)
        reply = Reply(new_id("chatcmpl-"), int(time.time()), model, logprobs=bool(ask.logprobs))
        streams = await open_streams(state, prepared, ask.n or 1, reply.id)
        if ask.stream:
            writer = ChunkWriter(reply, with_usage=wants_usage(ask), running=wants_running_usage(ask))
            return EventStream(request, _frames(writer, streams), warnings=warnings)
        completion = await until_disconnect(request, collect(reply, streams))
        return json_response(request, completion, warnings=warnings)

    return [Route("/v1/chat/completions", create, methods=["POST"])]


async def _frames(writer: ChunkWriter, streams: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[bytes, None]:
    merged = merge(streams)
    try:
        async for index, event in merged:
            if frame := writer.frame(index, event):
                yield frame
    finally:
        await merged.aclose()
    yield writer.usage_frame() + DONE


async def open_streams(
    state: ServerState, prepared: PreparedTurn, n: int, request_id: str
) -> list[AsyncGenerator[Event, None]]:
    """Submit n generations of one turn: all of them or, if one is refused, none."""

    def submit(index: int) -> AsyncGenerator[Event, None]:
        name = request_id if n == 1 else f"{request_id}-{index}"
        return state.chat.run(prepared, request_id=name, seed_offset=index)

    return await all_or_none(submit, n)
