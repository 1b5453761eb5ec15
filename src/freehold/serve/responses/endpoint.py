"""The route of the Responses API: read, translate, run, write."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from freehold.serve.dialect import RESPONSES
from freehold.serve.openapi import Operation
from freehold.serve.responses.reply import ReasoningSettings, ResponseBody, StreamEvent
from freehold.serve.responses.schema import ResponsesRequest, prepare_raw
from freehold.serve.responses.translate import translate
from freehold.serve.responses.writer import ResponseWriter
from freehold.serve.stream import EventStream, sse, until_disconnect
from freehold.serve.turn import Event, PreparedTurn
from freehold.serve.wire import decode, encode_json, in_thread_if_large, json_response, new_id, read_json

if TYPE_CHECKING:
    from freehold.serve.state import ServerState

OPERATIONS = (
    Operation(
        "POST",
        "/v1/responses",
        "Answer a conversation (OpenAI Responses)",
        request=ResponsesRequest,
        response=ResponseBody,
        event=StreamEvent,
    ),
)


def routes(state: ServerState) -> list[Route]:
    """The routes of this module."""

    async def create(request: Request) -> Response:
        body = await read_json(request, state.max_body_bytes)
        prepare_raw(body.value)
        decoded = decode(body.value, ResponsesRequest, "responses")
        ask = decoded.value
        model = state.resolve_model(ask.model)
        translated = translate(ask, state.sampling)
        salt = state.cache_salt(request, ask.cache_salt)
        turn = replace(translated.turn, cache_salt=salt, adapter=state.adapter(model))
        with RESPONSES.errors():
            prepared = await in_thread_if_large(body.size, state.chat.prepare, turn)
        warnings = (*decoded.warnings, *translated.warnings, *map(RESPONSES.say, prepared.warnings))
        writer = ResponseWriter(
            _begun(ask, model, prepared, body.value),
            new_id=lambda prefix: new_id(f"{prefix}_"),
            logprobs=translated.logprobs,
            pack_reasoning=translated.pack_reasoning,
        )
        with RESPONSES.errors():
            events = state.chat.run(prepared, request_id=writer.response.id)
        if ask.stream:
            # A failure after the first event is the end of the response: `response.failed`, with what came before it.
            return EventStream(
                request,
                _frames(writer, events),
                warnings=warnings,
                error_frame=lambda error: _encode(writer.fail(error)),
            )
        response = await until_disconnect(request, _collect(writer, events))
        return json_response(request, response, warnings=warnings)

    return [Route("/v1/responses", create, methods=["POST"])]


def _begun(ask: ResponsesRequest, model: str, prepared: PreparedTurn, raw: Mapping[str, Any]) -> ResponseBody:
    """The response before the first token: its id, and the settings in force (some of them word for word)."""
    return ResponseBody(
        id=new_id("resp_"),
        created_at=int(time.time()),
        model=model,
        instructions=ask.instructions,
        max_output_tokens=ask.max_output_tokens,
        metadata=ask.metadata or {},
        parallel_tool_calls=ask.parallel_tool_calls is not False,
        reasoning=ReasoningSettings(ask.reasoning.effort if ask.reasoning else None),
        temperature=prepared.params.temperature,
        text={"format": (raw.get("text") or {}).get("format") or {"type": "text"}},
        tool_choice=raw.get("tool_choice") or "auto",
        tools=raw.get("tools") or [],
        top_logprobs=ask.top_logprobs or 0,
        top_p=prepared.params.top_p,
    )


async def _collect(writer: ResponseWriter, events: AsyncGenerator[Event, None]) -> ResponseBody:
    async with aclosing(events):
        async for event in events:
            writer.feed(event)
    return writer.response


async def _frames(writer: ResponseWriter, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    """The stream. Nothing is sent before the first event, so that a failure up to there is still an HTTP error."""
    pending = writer.start()
    async with aclosing(events):
        async for event in events:
            pending += writer.feed(event)
            if pending:
                yield _encode(pending)
                pending = []


def _encode(events: list[StreamEvent]) -> bytes:
    return b"".join(sse(encode_json(event), str(event.__struct_config__.tag)) for event in events)
