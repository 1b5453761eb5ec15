"""POST /tokenize and /detokenize, in vLLM's shape: what the model sees of a text or of a conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from freehold.errors import InvalidRequest
from freehold.serve.chat_turn import message_dicts, template_kwargs, tool_dicts
from freehold.serve.openapi import Operation
from freehold.serve.params import check_token_ids
from freehold.serve.schema import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from freehold.serve.wire import decode, in_thread_if_large, json_response, read_json

if TYPE_CHECKING:
    from freehold.serve.state import ServerState

OPERATIONS = (
    Operation("POST", "/tokenize", "Text or conversation to token ids", request=TokenizeRequest, response=Tokenized),
    Operation("POST", "/detokenize", "Token ids to text", request=DetokenizeRequest, response=Detokenized),
)

_ONLY_WITH_MESSAGES = ("tools", "chat_template_kwargs", "reasoning_effort", "thinking", "add_generation_prompt")


def routes(state: ServerState) -> list[Route]:
    """The routes of this module."""
    tokenizer = state.chat.tokenizer

    async def tokenize(request: Request) -> Response:
        body = await read_json(request, state.max_body_bytes)
        decoded = decode(body.value, TokenizeRequest, "tokenize")
        state.resolve_model(decoded.value.model)
        tokenized, warnings = await in_thread_if_large(body.size, _tokenize, state, decoded.value)
        return json_response(request, tokenized, warnings=(*decoded.warnings, *warnings))

    async def detokenize(request: Request) -> Response:
        body = await read_json(request, state.max_body_bytes)
        decoded = decode(body.value, DetokenizeRequest, "detokenize")
        state.resolve_model(decoded.value.model)
        check_token_ids("tokens", decoded.value.tokens, state.engine.config.vocab_size)
        text = await in_thread_if_large(body.size, tokenizer.decode, decoded.value.tokens)
        return json_response(request, Detokenized(text), warnings=decoded.warnings)

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


def _tokenize(state: ServerState, ask: TokenizeRequest) -> tuple[Tokenized, tuple[str, ...]]:
    """The answer and its warnings. Raises InvalidRequest."""
    tokenizer = state.chat.tokenizer
    ids, warnings = _prompt_ids(state, ask)
    strings = None
    if ask.return_token_strs:
        strings = [tokenizer.token_bytes(token_id).decode("utf-8", "replace") for token_id in ids]
    return Tokenized(len(ids), state.engine.config.max_model_len, ids, strings), warnings


def _prompt_ids(state: ServerState, ask: TokenizeRequest) -> tuple[list[int], tuple[str, ...]]:
    if (ask.prompt is None) == (ask.messages is None):
        raise InvalidRequest("send either prompt or messages", param="prompt")
    if ask.prompt is not None:
        for name in _ONLY_WITH_MESSAGES:
            if getattr(ask, name) is not None:
                raise InvalidRequest(f"{name} needs messages", param=name)
        return state.chat.tokenizer.encode(ask.prompt), ()
    assert ask.messages is not None  # exactly one of the two is given
    rendered = state.chat.template.render(
        message_dicts(ask.messages),
        tool_dicts(ask.tools or []),
        effort=ask.reasoning_effort,
        template_kwargs=template_kwargs(ask.chat_template_kwargs, ask.thinking),
        add_generation_prompt=ask.add_generation_prompt is not False,
    )
    return list(rendered.encode(state.chat.tokenizer)), rendered.warnings
