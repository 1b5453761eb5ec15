"""From a chat request to a `Turn`: messages and tools as plain dicts, and the rules between fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from freehold.errors import InvalidRequest
from freehold.serve import schema
from freehold.serve.params import check_stream_options, sampling_params, wants_running_usage
from freehold.serve.schema import MAX_TOKENS, ChatRequest
from freehold.serve.turn import Turn

if TYPE_CHECKING:
    from freehold.serve.state import ServerState


def to_turn(ask: ChatRequest, state: ServerState) -> Turn:
    """What the request means. Raises InvalidRequest where its fields contradict each other."""
    check_stream_options(ask)
    if ask.top_logprobs is not None and not ask.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    tools, choice = choose_tools(ask.tools or [], ask.tool_choice)
    limit = _max_tokens(ask)
    params = sampling_params(
        ask, state, max_tokens=limit or MAX_TOKENS, logprobs=(ask.top_logprobs or 0) if ask.logprobs else None
    )
    return Turn(
        messages=message_dicts(ask.messages),
        params=params,
        max_tokens_given=limit is not None,
        tools=tool_dicts(tools),
        tool_choice=choice,
        parallel_tool_calls=ask.parallel_tool_calls is not False,
        response_format=_response_format(ask.response_format),
        effort=ask.reasoning_effort,
        template_kwargs=template_kwargs(ask.chat_template_kwargs, ask.thinking),
        stop=ask.stop_strings(),
        include_stop=bool(ask.include_stop_str_in_output),
        cache_salt=ask.cache_salt,
        running_usage=wants_running_usage(ask),
    )


def message_dicts(messages: Sequence[schema.Message]) -> tuple[Mapping[str, Any], ...]:
    """Messages as the plain dicts that templates take, without what was not given."""
    dicts = []
    for index, message in enumerate(messages):
        item: dict[str, Any] = msgspec.to_builtins(message)
        item.setdefault("content", None)
        if isinstance(message, schema.AssistantMessage):
            _one_reasoning(item, index)
        dicts.append(item)
    return tuple(dicts)


def _one_reasoning(item: dict[str, Any], index: int) -> None:
    """Clients send back what they got, so they may send both names of it."""
    reasoning = item.pop("reasoning", None)
    if reasoning is not None and item.setdefault("reasoning_content", reasoning) != reasoning:
        where = f"messages[{index}].reasoning"
        raise InvalidRequest(f"{where} differs from reasoning_content; send one of them", param=where)


def tool_dicts(tools: Sequence[schema.Tool]) -> tuple[Mapping[str, Any], ...]:
    return tuple(msgspec.to_builtins(tool) for tool in tools)


Choice = Literal["none", "auto", "required"] | tuple[Literal["named"], str]


def choose_tools(
    tools: Sequence[schema.Tool], choice: schema.ToolChoice | None
) -> tuple[Sequence[schema.Tool], Choice]:
    """The tools the model may call, and how. Raises InvalidRequest for a choice among tools that are not there."""
    names = [tool.function.name for tool in tools]
    match choice:
        case None:
            return tools, "auto"
        case schema.NamedToolChoice():
            _check_known(choice.function.name, names)
            return tools, ("named", choice.function.name)
        case schema.AllowedToolsChoice():
            allowed = {reference.function.name for reference in choice.allowed_tools.tools}
            for name in allowed:
                _check_known(name, names)
            return [tool for tool in tools if tool.function.name in allowed], choice.allowed_tools.mode
        case "required" if not tools:
            raise InvalidRequest("tool_choice is required, but there are no tools", param="tool_choice")
        case _:
            return tools, choice


def _check_known(name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise InvalidRequest(f"tool_choice names {name!r}, which is not in tools", param="tool_choice")


def _max_tokens(ask: ChatRequest) -> int | None:
    old, new = ask.max_tokens, ask.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest("max_tokens differs from max_completion_tokens; send one of them", param="max_tokens")
    return old if new is None else new


def _response_format(format_: schema.ResponseFormat | None) -> Mapping[str, Any] | None:
    match format_:
        case None | schema.TextFormat():
            return None
        case schema.JsonObjectFormat():
            return {"type": "json_object"}
        case schema.JsonSchemaFormat():
            if format_.json_schema.schema_ is None:
                where = "response_format.json_schema.schema"
                raise InvalidRequest(f"{where}: is required", param=where)
            body: dict[str, Any] = msgspec.to_builtins(format_)
            return body


def template_kwargs(given: Mapping[str, Any] | None, thinking: schema.Thinking | None) -> Mapping[str, Any]:
    """`chat_template_kwargs`, and `thinking` said in their words. Raises InvalidRequest if the two disagree."""
    kwargs = dict(given or {})
    if thinking is None:
        return kwargs
    said: dict[str, Any] = {"enable_thinking": thinking.type == "enabled"}
    if thinking.clear_thinking is not None:
        said["clear_thinking"] = thinking.clear_thinking
    for key, value in said.items():
        if kwargs.setdefault(key, value) != value:
            raise InvalidRequest(f"thinking contradicts chat_template_kwargs.{key}", param="thinking")
    return kwargs
