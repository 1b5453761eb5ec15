"""A client of chat completions in front of an upstream that speaks Messages: the request."""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

import msgspec

from freehold.errors import InvalidRequest, UnsupportedField
from freehold.gateway.call import Effort
from freehold.gateway.door.translate.words import check_fields, objects, text_of

_KNOWN: Final = frozenset(
    "model messages max_tokens max_completion_tokens temperature top_p top_k stop stream tools tool_choice "
    "parallel_tool_calls reasoning_effort response_format user".split()
)
_LEFT_OUT: Final = frozenset(
    "stream_options store metadata prompt_cache_key prompt_cache_retention safety_identifier service_tier verbosity "
    "seed".split()
)
_NEUTRAL: Final = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "modalities": ["text"],
}
_CHOICES: Final = {"auto": "auto", "none": "none", "required": "any"}


def request_to_messages(chat: dict[str, Any], model_id: str, limit: int, effort: Effort | None) -> dict[str, Any]:
    """limit: for a request that has none (Messages wants one). effort: replaces the request's, unless None.

    Raises InvalidRequest, UnsupportedField: it cannot be said.
    """
    check_fields(chat, _KNOWN, _LEFT_OUT, _NEUTRAL)
    system, messages = _conversation(objects(chat.get("messages"), "messages"))
    given = (chat.get("max_completion_tokens"), chat.get("max_tokens"), limit)
    body: dict[str, Any] = {
        "model": model_id,
        "max_tokens": next(each for each in given if each is not None),
        "messages": messages,
    }
    if system:
        body["system"] = system
    if chat.get("temperature") is not None:
        if chat["temperature"] > 1:
            raise UnsupportedField("temperature: this model's upstream takes at most 1", param="temperature")
        body["temperature"] = chat["temperature"]
    body |= {name: chat[name] for name in ("top_p", "top_k", "stream") if chat.get(name) is not None}
    if chat.get("stop"):
        body["stop_sequences"] = [chat["stop"]] if isinstance(chat["stop"], str) else chat["stop"]
    if chat.get("user"):
        body["metadata"] = {"user_id": chat["user"]}
    _tools(chat, body)
    _output(chat, body, chat.get("reasoning_effort") if effort is None else effort)
    return body


def _conversation(chat: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The system prompt, and messages in which user and assistant take turns."""
    system: list[str] = []
    messages: list[dict[str, Any]] = []
    for index, message in enumerate(chat):
        where = f"messages[{index}]"
        match message.get("role"):
            case "system" | "developer":
                system.append(text_of(message.get("content"), f"{where}.content"))
            case "user":
                _add(messages, "user", _user_blocks(message.get("content"), f"{where}.content"))
            case "tool":
                result = text_of(message.get("content"), f"{where}.content")
                block = {"type": "tool_result", "tool_use_id": message.get("tool_call_id", ""), "content": result}
                _add(messages, "user", [block])
            case "assistant":
                _add(messages, "assistant", _assistant_blocks(message, where))
            case role:
                raise InvalidRequest(f"{where}.role: {role!r} is none", param=f"{where}.role")
    return "\n\n".join(system), messages


def _add(messages: list[dict[str, Any]], role: str, blocks: list[dict[str, Any]]) -> None:
    if not blocks:
        return
    if messages and messages[-1]["role"] == role:
        messages[-1]["content"] += blocks
    else:
        messages.append({"role": role, "content": blocks})


def _user_blocks(content: object, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    blocks: list[dict[str, Any]] = []
    for at, part in enumerate(objects(content, where)):
        match part:
            case {"type": "text", "text": str(text)}:
                blocks.append({"type": "text", "text": text})
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                blocks.append({"type": "image", "source": _image(url, f"{where}[{at}]")})
            case _:
                raise UnsupportedField(f"{where}[{at}]: only text and images can be sent here", param=where)
    return blocks


def _image(url: str, where: str) -> dict[str, str]:
    if not url.startswith("data:"):
        return {"type": "url", "url": url}
    kind, _, data = url[5:].partition(";base64,")
    try:
        base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{where}: an image's data must be base64", param=where) from None
    return {"type": "base64", "media_type": kind, "data": data}


def _assistant_blocks(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    text = text_of(message.get("content"), f"{where}.content")
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    for at, call in enumerate(objects(message.get("tool_calls") or [], f"{where}.tool_calls")):
        match call:
            case {"id": str(call_id), "function": {"name": str(name), "arguments": str(arguments)}}:
                blocks.append({"type": "tool_use", "id": call_id, "name": name, "input": _arguments(arguments, where)})
            case _:
                path = f"{where}.tool_calls[{at}]"
                raise InvalidRequest(f"{path}: a call has an id and a function with name and arguments", param=path)
    return blocks


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{where}.tool_calls: arguments must be a JSON object", param=where) from None


def _tools(chat: dict[str, Any], body: dict[str, Any]) -> None:
    if chat.get("tools"):
        tools = [_tool(tool, f"tools[{at}]") for at, tool in enumerate(objects(chat["tools"], "tools"))]
        body["tools"] = tools
    match chat.get("tool_choice"):
        case None:
            choice: dict[str, Any] = {}
        case str(word) if word in _CHOICES:
            choice = {"type": _CHOICES[word]}
        case {"type": "function", "function": {"name": str(name)}}:
            choice = {"type": "tool", "name": name}
        case _:
            raise UnsupportedField("tool_choice: auto, none, required or one function", param="tool_choice")
    if chat.get("parallel_tool_calls") is False and body.get("tools") and choice.get("type") != "none":
        choice = {"type": "auto"} | choice | {"disable_parallel_tool_use": True}
    if choice:
        body["tool_choice"] = choice


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    match tool:
        case {"type": "function", "function": {"name": str(name), **rest}}:
            schema = rest.get("parameters") or {"type": "object", "properties": {}}
            described = {"name": name, "description": rest.get("description"), "input_schema": schema}
            if rest.get("strict") is not None:
                described["strict"] = rest["strict"]
            return {key: value for key, value in described.items() if value is not None}
    raise UnsupportedField(f"{where}: only functions can be called here", param=where)


def _output(chat: dict[str, Any], body: dict[str, Any], effort: str | None) -> None:
    config: dict[str, Any] = {}
    if effort == "none":
        body["thinking"] = {"type": "disabled"}
    elif effort:
        body["thinking"] = {"type": "adaptive"}
        config["effort"] = "low" if effort == "minimal" else effort
    match chat.get("response_format"):
        case None | {"type": "text"}:
            pass
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            config["format"] = {"type": "json_schema", "schema": schema}
        case _:
            raise UnsupportedField("response_format: text or json_schema can be had here", param="response_format")
    if config:
        body["output_config"] = config
