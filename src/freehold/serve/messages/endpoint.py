"""The routes of the Messages API: read, translate, run, write."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freehold.serve.dialect import MESSAGES
from freehold.serve.messages.errors import error_body, error_frame
from freehold.serve.messages.reply import MessageBody, MessageError, StreamEvent, TokenCount
from freehold.serve.messages.schema import Conversation, MessagesRequest, refuse_unsupported
from freehold.serve.messages.translate import translate
from freehold.serve.messages.writer import MessageWriter
from freehold.serve.openapi import Operation
from freehold.serve.stream import EventStream, sse, until_disconnect
from freehold.serve.turn import Event, PreparedTurn
from freehold.serve.wire import decode, encode_json, in_thread_if_large, json_response, new_id, read_json, request_id

if TYPE_CHECKING:
    from freehold.serve.state import ServerState

OPERATIONS = (
    Operation(
        "POST",
        "/v1/messages",
        "Answer a conversation (Anthropic Messages)",
        request=MessagesRequest,
        response=MessageBody,
        event=StreamEvent,
        errors=error_body,
        error=MessageError,
    ),
    Operation(
        "POST",
        "/v1/messages/count_tokens",
        "Count the tokens of a conversation (Anthropic Messages)",
        request=Conversation,
        response=TokenCount,
        errors=error_body,
        error=MessageError,
    ),
)

PING = sse(b'{"type":"ping"}', "ping")

R = TypeVar("R", bound=Conversation)


def routes(state: ServerState) -> list[Route]:
    """The routes of this module."""

    async def create(request: Request) -> Response:
        read = _fit(await _read(request, state, MessagesRequest), state.engine.config.max_model_len)
        writer = MessageWriter(
            message_id=new_id("msg_"),
            model=read.model,
            prompt_tokens=len(read.prepared.prompt_token_ids),
            max_tokens=read.ask.max_tokens,
            omit_thinking=read.omit_thinking,
        )
        with MESSAGES.errors():
            events = state.chat.run(read.prepared, request_id=writer.message.id)
        if read.ask.stream:
            frames = _frames(writer, events)
            return EventStream(request, frames, warnings=read.warnings, error_frame=error_frame, keep_alive=PING)
        message = await until_disconnect(request, _collect(writer, events))
        return json_response(request, message, warnings=read.warnings)

    async def count_tokens(request: Request) -> Response:
        read = await _read(request, state, Conversation)
        return json_response(request, TokenCount(len(read.prepared.prompt_token_ids)), warnings=read.warnings)

    aliased = [Middleware(_RequestIdHeader)]
    return [
        Route("/v1/messages", create, methods=["POST"], middleware=aliased),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"], middleware=aliased),
    ]


@dataclass(frozen=True, slots=True)
class _Read(Generic[R]):
    """A request, understood."""

    ask: R
    model: str
    prepared: PreparedTurn
    omit_thinking: bool
    warnings: tuple[str, ...]


async def _read(request: Request, state: ServerState, type_: type[R]) -> _Read[R]:
    body = await read_json(request, state.max_body_bytes)
    refuse_unsupported(body.value)
    decoded = decode(body.value, type_, "messages")
    model = state.resolve_model(decoded.value.model)
    translated = translate(decoded.value, state.sampling)
    salt = state.cache_salt(request, translated.turn.cache_salt)
    turn = replace(translated.turn, cache_salt=salt, adapter=state.adapter(model))
    with MESSAGES.errors():
        prepared = await in_thread_if_large(body.size, state.chat.prepare, turn)
    warnings = (*decoded.warnings, *translated.warnings, *map(MESSAGES.say, prepared.warnings))
    return _Read(decoded.value, model, prepared, translated.omit_thinking, warnings)


def _fit(read: _Read[MessagesRequest], max_model_len: int) -> _Read[MessagesRequest]:
    """Ask for no more tokens than the context has left, as this API does: it ends with its own stop reason instead.

    (Its clients ask for tens of thousands of tokens as a matter of course.) A prompt that leaves no room at all is
    for the engine to refuse.
    """
    room = max_model_len - len(read.prepared.prompt_token_ids)
    if room < 1 or read.ask.max_tokens <= room:
        return read
    prepared = replace(read.prepared, params=replace(read.prepared.params, max_tokens=room))
    warning = f"max_tokens is more than the {room} tokens that the context has left"
    return replace(read, prepared=prepared, warnings=(*read.warnings, warning))


async def _collect(writer: MessageWriter, events: AsyncGenerator[Event, None]) -> MessageBody:
    async with aclosing(events):
        async for event in events:
            writer.feed(event)
    return writer.message


async def _frames(writer: MessageWriter, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    """The stream. Nothing is sent before the first event, so that a failure up to there is still an HTTP error."""
    pending = writer.start()
    async with aclosing(events):
        async for event in events:
            pending += writer.feed(event)
            if pending:
                yield b"".join(_frame(item) for item in pending)
                pending = []


def _frame(event: StreamEvent) -> bytes:
    return sse(encode_json(event), str(event.__struct_config__.tag))


class _RequestIdHeader:
    """The request's id also under the name that Anthropic's SDK reads."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (b"request-id", request_id(Request(scope)).encode())
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        await self._app(scope, receive, named)
