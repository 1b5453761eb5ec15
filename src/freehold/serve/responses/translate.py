"""From an OpenAI Responses request to a `Turn`.

`instructions` come first, as a system message. Then items become chat messages in order; neighbouring reasoning,
assistant message and function calls are one assistant message, as the model wrote them. Reasoning handed back is kept
with it, from its text or else from our own `encrypted_content` (see `carried`); the chat template decides which turns
still show it, and `reasoning.context` (`all_turns`, `current_turn`) decides for the template.

`tool_choice` of type `allowed_tools` leaves the other tools out of the prompt, which is the only way to make sure
that they are not called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from freehold.errors import InvalidRequest
from freehold.serve.carried import unpack
from freehold.serve.responses.schema import (
    AllowedTools,
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    InputText,
    JsonObject,
    JsonSchema,
    MessageItem,
    NamedFunction,
    OutputText,
    ReasoningItem,
    Refusal,
    ResponsesRequest,
)
from freehold.serve.schema import MAX_TOKENS
from freehold.serve.state import SamplingDefaults
from freehold.serve.turn import Turn
from freehold.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Translated:
    turn: Turn
    warnings: tuple[str, ...]
    logprobs: bool
    pack_reasoning: bool


def translate(request: ResponsesRequest, defaults: SamplingDefaults) -> Translated:
    """The turn that a request asks for. defaults: for sampling fields left open.

    Raises:
        InvalidRequest: a value is out of range, or the items do not make a conversation; `param` is the path.
    """
    warnings: list[str] = []
    include = request.include or []
    logprobs = "message.output_text.logprobs" in include
    if request.top_logprobs and not logprobs:
        warnings.append("top_logprobs has no effect unless include has message.output_text.logprobs")
    tools, choice = _tools(request)
    turn = Turn(
        messages=tuple(_History(warnings).read(request)),
        params=_sampling(request, defaults, logprobs),
        max_tokens_given=request.max_output_tokens is not None,
        tools=tuple(_function(tool) for tool in tools),
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        response_format=_response_format(request),
        effort=request.reasoning.effort if request.reasoning else None,
        template_kwargs=_template_kwargs(request),
        cache_salt=request.cache_salt,
    )
    return Translated(turn, tuple(warnings), logprobs, "reasoning.encrypted_content" in include)


# ---- items -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _History:
    """Turns items into chat messages, one pass. open_calls: ids of the calls that wait for an output."""

    warnings: list[str]
    out: list[dict[str, Any]] = field(default_factory=list)
    open_calls: list[str] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)

    def read(self, request: ResponsesRequest) -> list[dict[str, Any]]:
        if request.instructions:
            self.out.append({"role": "system", "content": request.instructions})
        if isinstance(request.input, str):
            self.out.append({"role": "user", "content": request.input})
            return self.out
        for index, item in enumerate(request.input):
            path = f"input[{index}]"
            if isinstance(item, FunctionCallOutput):
                self._result(item, path)
                continue
            self._settle(path, ends_turn=isinstance(item, MessageItem) and item.role != "assistant")
            match item:
                case MessageItem():
                    self._message(item)
                case ReasoningItem():
                    self._reasoning(item, path)
                case FunctionCall():
                    self._call(item, path)
        self._settle("input", ends_turn=True)
        return self.out

    def _message(self, item: MessageItem) -> None:
        text = _text(item.content)
        if item.role != "assistant":
            self.out.append({"role": item.role, "content": text})
            return
        turn = self._turn()
        if turn["content"] and not turn.get("tool_calls"):
            turn = self._turn(new=True)
        turn["content"] += text

    def _reasoning(self, item: ReasoningItem, path: str) -> None:
        text = "".join(part.text for part in item.content or ())
        if not text and item.encrypted_content:
            text = unpack(item.encrypted_content, param=f"{path}.encrypted_content") or ""
        if not text:
            if item.encrypted_content or item.summary:
                self.warnings.append("a reasoning item is dropped: it has no text that this server can read")
            return
        turn = self._turn()
        if turn["content"] or turn.get("tool_calls"):
            turn = self._turn(new=True)
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text

    def _call(self, item: FunctionCall, path: str) -> None:
        if item.call_id in self.open_calls:
            raise InvalidRequest(f"{path}.call_id: {item.call_id!r} is used twice", param=f"{path}.call_id")
        _check_arguments(item.arguments, f"{path}.arguments")
        self.open_calls.append(item.call_id)
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        self._turn().setdefault("tool_calls", []).append(call)

    def _turn(self, *, new: bool = False) -> dict[str, Any]:
        """The assistant message being written."""
        if new or not (self.out and self.out[-1]["role"] == "assistant"):
            self.out.append({"role": "assistant", "content": ""})
        return self.out[-1]

    def _result(self, item: FunctionCallOutput, path: str) -> None:
        if item.call_id not in self.open_calls or item.call_id in self.results:
            where = f"{path}.call_id"
            raise InvalidRequest(f"{where}: {item.call_id!r} is not an unanswered function_call", param=where)
        self.results[item.call_id] = _text(item.output)

    def _settle(self, path: str, *, ends_turn: bool) -> None:
        """Before an item that is not an output: append the outputs so far, in the order of their calls.

        ends_turn: the item is not the assistant's, so that calls without an output will never get one.

        The order matters: the chat format tells results apart by position only.
        """
        if not (self.results or (ends_turn and self.open_calls)):
            return
        if missing := [call_id for call_id in self.open_calls if call_id not in self.results]:
            raise InvalidRequest(f"{path}: function_call {', '.join(missing)} has no output before here", param=path)
        for call_id in self.open_calls:
            self.out.append({"role": "tool", "tool_call_id": call_id, "content": self.results[call_id]})
        self.open_calls, self.results = [], {}


def _text(content: str | Sequence[InputText | OutputText | Refusal]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)


def _check_arguments(arguments: str, path: str) -> None:
    try:
        value = msgspec.json.decode(arguments)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{path} must be a JSON object in a string: {error}", param=path) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} must be a JSON object in a string", param=path)


# ---- settings ----------------------------------------------------------------------------------------------


def _tools(request: ResponsesRequest) -> tuple[list[FunctionTool], Any]:
    """(the tools that may be called, the turn's tool_choice)."""
    tools, choice = list(request.tools or ()), request.tool_choice
    by_name = {tool.name: tool for tool in tools}
    if len(by_name) < len(tools):
        raise InvalidRequest("tools: two functions have the same name", param="tools")
    match choice:
        case None:
            return tools, "auto"
        case NamedFunction(name=name):
            _known(name, by_name, "tool_choice.name")
            return tools, ("named", name)
        case AllowedTools(mode=mode, tools=allowed):
            for index, tool in enumerate(allowed):
                _known(tool.name, by_name, f"tool_choice.tools[{index}].name")
            names = {tool.name for tool in allowed}
            return [tool for tool in tools if tool.name in names], mode
        case _:
            if choice == "required" and not tools:
                raise InvalidRequest("tool_choice required needs tools", param="tool_choice")
            return tools, choice


def _known(name: str, by_name: dict[str, FunctionTool], path: str) -> None:
    if name not in by_name:
        raise InvalidRequest(f"{path}: {name!r} is not one of the tools", param=path)


def _function(tool: FunctionTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _template_kwargs(request: ResponsesRequest) -> dict[str, Any]:
    kwargs = dict(request.chat_template_kwargs or {})
    context = request.reasoning.context if request.reasoning else None
    if context in (None, "auto"):
        return kwargs
    clear = context == "current_turn"
    if kwargs.setdefault("clear_thinking", clear) != clear:
        raise InvalidRequest(
            f"reasoning.context {context!r} and chat_template_kwargs.clear_thinking contradict each other; send one",
            param="reasoning.context",
        )
    return kwargs


def _response_format(request: ResponsesRequest) -> dict[str, Any] | None:
    match request.text.format if request.text else None:
        case JsonObject():
            return {"type": "json_object"}
        case JsonSchema() as wanted:
            schema = {"name": wanted.name, "schema": wanted.schema_, "strict": wanted.strict}
            return {"type": "json_schema", "json_schema": schema}
        case _:
            return None


def _sampling(request: ResponsesRequest, defaults: SamplingDefaults, logprobs: bool) -> SamplingParams:
    return SamplingParams(
        max_tokens=MAX_TOKENS if request.max_output_tokens is None else request.max_output_tokens,
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        top_k=max(0, defaults.top_k if request.top_k is None else request.top_k),
        min_p=request.min_p or 0.0,
        seed=request.seed,
        logprobs=(request.top_logprobs or 0) if logprobs else None,
    )
