"""A client of Messages in front of an upstream that speaks chat completions: the request."""

from __future__ import annotations

from typing import Any, Final

from freehold.errors import InvalidRequest, UnsupportedField
from freehold.gateway.call import Effort
from freehold.gateway.door.translate.words import check_fields, encode, objects, text_of

_KNOWN: Final = frozenset(
    "model messages system max_tokens temperature top_p top_k stop_sequences stream tools tool_choice thinking "
    "output_config metadata".split()
)
_LEFT_OUT: Final = frozenset("service_tier inference_geo speed context_management cache_control".split())
_CHOICES: Final = {"auto": "auto", "none": "none", "any": "required"}


def request_to_chat(
    message: dict[str, Any], model_id: str, limit: int | None, effort: Effort | None, engine: str
) -> dict[str, Any]:
    """limit: for a request that has none. effort: replaces the request's, unless None. engine: the upstream's kind.

    Raises InvalidRequest, UnsupportedField: it cannot be said.
    """
    check_fields(message, _KNOWN, _LEFT_OUT, {})
    body: dict[str, Any] = {"model": model_id, "messages": _conversation(message)}
    given = message.get("max_tokens")
    if (most := limit if given is None else given) is not None:
        body["max_completion_tokens" if engine == "api" else "max_tokens"] = most
    body |= {name: message[name] for name in ("temperature", "top_p", "top_k") if message.get(name) is not None}
    if message.get("stop_sequences"):
        body["stop"] = message["stop_sequences"]
    if message.get("stream"):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    match message.get("metadata"):
        case {"user_id": str(user)}:
            body["user"] = user
    _tools(message, body)
    _output(message, body, effort, engine)
    return body


def _conversation(message: dict[str, Any]) -> list[dict[str, Any]]:
    system = text_of(message.get("system"), "system")
    chat: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for index, turn in enumerate(objects(message.get("messages"), "messages")):
        where = f"messages[{index}]"
        content = turn.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else objects(content, where)
        match turn.get("role"):
            case "user":
                chat += _user(blocks, where)
            case "assistant":
                chat.append(_assistant(blocks, where))
            case "system":
                chat.append({"role": "system", "content": text_of(blocks, where)})
            case role:
                raise InvalidRequest(f"{where}.role: {role!r} is none", param=f"{where}.role")
    return chat


def _user(blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Results of tools come first: they answer the calls just before."""
    results: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for at, block in enumerate(blocks):
        match block:
            case {"type": "text", "text": str(text)}:
                parts.append({"type": "text", "text": text})
            case {"type": "tool_result", "tool_use_id": str(call_id)}:
                content = text_of(block.get("content"), f"{where}.content[{at}]")
                if block.get("is_error"):
                    content = f"Error: {content}"
                results.append({"role": "tool", "tool_call_id": call_id, "content": content})
            case {"type": "image", "source": {"type": "base64", "media_type": str(kind), "data": str(data)}}:
                parts.append({"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}})
            case {"type": "image", "source": {"type": "url", "url": str(url)}}:
                parts.append({"type": "image_url", "image_url": {"url": url}})
            case _:
                raise _unknown(block, f"{where}.content[{at}]")
    if all(part["type"] == "text" for part in parts):
        text = "".join(part["text"] for part in parts)
        return [*results, {"role": "user", "content": text}] if parts else results
    return [*results, {"role": "user", "content": parts}]


def _assistant(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    texts: list[str] = []
    thinking: list[str] = []
    calls: list[dict[str, Any]] = []
    for at, block in enumerate(blocks):
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "thinking", "thinking": str(text)}:
                thinking.append(text)
            case {"type": "redacted_thinking"}:
                pass  # only who made it can read it
            case {"type": "tool_use", "id": str(call_id), "name": str(name), "input": dict(given)}:
                function = {"name": name, "arguments": encode(given).decode()}
                calls.append({"id": call_id, "type": "function", "function": function})
            case _:
                raise _unknown(block, f"{where}.content[{at}]")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
    if thinking:
        message["reasoning_content"] = message["reasoning"] = "".join(thinking)
    if calls:
        message["tool_calls"] = calls
    return message


def _unknown(block: dict[str, Any], where: str) -> UnsupportedField:
    return UnsupportedField(f"{where}: {str(block.get('type'))[:60]!r} cannot be sent to this model", param=where)


def _tools(message: dict[str, Any], body: dict[str, Any]) -> None:
    if message.get("tools"):
        body["tools"] = [_tool(tool, f"tools[{at}]") for at, tool in enumerate(objects(message["tools"], "tools"))]
    match message.get("tool_choice"):
        case None:
            return
        case {"type": "tool", "name": str(name)}:
            body["tool_choice"] = {"type": "function", "function": {"name": name}}
        case {"type": str(word)} if word in _CHOICES:
            body["tool_choice"] = _CHOICES[word]
        case _:
            raise UnsupportedField("tool_choice: auto, any, none or tool", param="tool_choice")
    if message["tool_choice"].get("disable_parallel_tool_use"):
        body["parallel_tool_calls"] = False


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    match tool:
        case {"name": str(name), "input_schema": dict(schema)} if tool.get("type") in (None, "custom"):
            function = {"name": name, "description": tool.get("description"), "parameters": schema}
            if tool.get("strict") is not None:
                function["strict"] = tool["strict"]
            return {"type": "function", "function": {key: val for key, val in function.items() if val is not None}}
    raise UnsupportedField(f"{where}: only tools with a name and an input_schema can be had here", param=where)


def _output(message: dict[str, Any], body: dict[str, Any], effort: Effort | None, engine: str) -> None:
    config = message.get("output_config") or {}
    thinking = message.get("thinking") or {}
    if not isinstance(config, dict) or not isinstance(thinking, dict):
        raise InvalidRequest("thinking and output_config must be objects", param="thinking")
    # Without a word about it, Messages does not think; engines do, and models behind other APIs may not know the field.
    silent = thinking.get("type", "disabled" if engine != "api" else None) == "disabled"
    asked = "none" if silent else config.get("effort")
    wanted = asked if effort is None else effort
    if wanted:
        body["reasoning_effort"] = wanted
    match config.get("format"):
        case None:
            pass
        case {"type": "json_schema", "schema": dict(schema)}:
            named = {"name": "answer", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        case _:
            raise UnsupportedField("output_config.format: only json_schema can be had here", param="output_config")
