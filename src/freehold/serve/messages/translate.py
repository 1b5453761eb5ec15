"""From an Anthropic Messages request to a `Turn`.

What the settings become:

* `thinking` absent and no effort: thinking off, because callers who did not ask for it read `content[0].text`.
* `thinking` absent and `output_config.effort` given: thinking on, with that effort.
* `thinking: adaptive`: thinking on, with `output_config.effort` or else the model's default effort.
* `thinking: enabled`: as adaptive; without an effort, a `budget_tokens` under 32,768 asks for `high`. No model of this
  family can be held to a number of thinking tokens, so there is always a warning.
* `thinking: disabled`: thinking off.
* `thinking.display: omitted`: the text of thinking travels in its signature, and comes back from there.
* `context_management`, edit clear_thinking: `keep: all` keeps the thinking of earlier turns in the prompt, one turn
  keeps the latest turn's; the chat template knows nothing between, so more turns keep all, with a warning.
* `output_config.format`: decoding constrained to the JSON schema.
* `tool_choice: any` and `tool`: decoding constrained to a call of any tool, or of that one.

And the messages:

* `thinking` blocks are the assistant turn's reasoning; the chat template decides which turns still show it.
* `redacted_thinking`, and thinking whose text only another provider can read, are dropped with a warning.
* `tool_result` with `is_error`: its text after "Error: ", since the chat format has no flag for it.
* a final assistant message is refused: the model cannot continue one.

Text blocks of one message are joined without anything between them, as chat templates join text parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from freehold.errors import InvalidRequest
from freehold.serve.carried import unpack
from freehold.serve.messages.schema import (
    AssistantMessage,
    ClearThinking,
    Conversation,
    MessagesRequest,
    RedactedThinking,
    SystemMessage,
    TextBlock,
    Thinking,
    ThinkingDisabled,
    ThinkingEnabled,
    ThinkingTurns,
    Tool,
    ToolChoiceAny,
    ToolChoiceNone,
    ToolChoiceTool,
    ToolReference,
    ToolResult,
    ToolUse,
    UserMessage,
)
from freehold.serve.state import SamplingDefaults
from freehold.serve.turn import Turn
from freehold.types import SamplingParams

SMALL_BUDGET = 32_768  # thinking tokens; below this a budget asks for less than the model's default effort


@dataclass(frozen=True, slots=True)
class Translated:
    turn: Turn
    omit_thinking: bool
    warnings: tuple[str, ...]


def translate(request: Conversation, defaults: SamplingDefaults) -> Translated:
    """The turn that a request asks for. defaults: for sampling fields left open.

    Raises:
        InvalidRequest: a value is out of range, or the messages do not make a conversation; `param` is the path.
    """
    warnings: list[str] = []
    effort, template_kwargs = _thinking(request, warnings)
    choice, parallel = _tool_choice(request)
    turn = Turn(
        messages=tuple(_History(warnings).read(request)),
        params=_sampling(request, defaults),
        tools=tuple(_tools(request.tools or ())),
        tool_choice=choice,
        parallel_tool_calls=parallel,
        response_format=_response_format(request),
        effort=effort,
        template_kwargs=template_kwargs,
        stop=tuple(getattr(request, "stop_sequences", None) or ()),
    )
    omit = getattr(request.thinking, "display", None) == "omitted"
    return Translated(turn, omit, tuple(warnings))


# ---- messages ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _History:
    """Turns messages into chat messages, one pass. open_calls: ids of the calls that the next message must answer."""

    warnings: list[str]
    out: list[dict[str, Any]] = field(default_factory=list)
    open_calls: list[str] = field(default_factory=list)

    def read(self, request: Conversation) -> list[dict[str, Any]]:
        if system := _text(request.system):
            self.out.append({"role": "system", "content": system})
        for index, message in enumerate(request.messages):
            path = f"messages[{index}]"
            if isinstance(message, AssistantMessage):
                self._assistant(message, path)
            else:
                self._other(message, path)
        if isinstance(request.messages[-1], AssistantMessage):
            raise InvalidRequest(
                f"messages[{len(request.messages) - 1}]: the last message must be the user's; "
                "the model cannot continue a message that was begun for it",
                param="messages",
            )
        return self.out

    def _assistant(self, message: AssistantMessage, path: str) -> None:
        """Consecutive assistant messages are one turn: thinking, then text, then calls."""
        if not (self.out and self.out[-1]["role"] == "assistant"):
            self.out.append({"role": "assistant", "content": ""})
        turn = self.out[-1]
        blocks = [TextBlock(text=message.content)] if isinstance(message.content, str) else message.content
        for at, block in enumerate(blocks):
            where = f"{path}.content[{at}]"
            match block:
                case TextBlock(text=text):
                    turn["content"] += text
                case Thinking():
                    turn["reasoning_content"] = turn.get("reasoning_content", "") + self._thought(block, where)
                case RedactedThinking():
                    self.warnings.append("redacted_thinking is dropped: only the provider that wrote it can read it")
                case ToolUse(id=call_id, name=name, input=arguments):
                    if call_id in self.open_calls:
                        raise InvalidRequest(f"{where}.id: {call_id!r} is used twice", param=f"{where}.id")
                    self.open_calls.append(call_id)
                    function = {"name": name, "arguments": msgspec.json.encode(arguments).decode()}
                    turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})

    def _thought(self, block: Thinking, where: str) -> str:
        if block.thinking or not block.signature:
            return block.thinking
        text = unpack(block.signature, param=f"{where}.signature")
        if text is None:
            self.warnings.append("thinking without text is dropped: its signature is another provider's")
        return text or ""

    def _other(self, message: UserMessage | SystemMessage, path: str) -> None:
        role = "user" if isinstance(message, UserMessage) else "system"
        blocks = [TextBlock(text=message.content)] if isinstance(message.content, str) else message.content
        results = [block for block in blocks if isinstance(block, ToolResult)]
        texts = [block for block in blocks if isinstance(block, TextBlock)]
        if any(isinstance(block, ToolResult) for block in blocks[len(results) :]):
            raise InvalidRequest(f"{path}.content: tool_result blocks must come before text", param=f"{path}.content")
        self._answer(results, path)
        if texts or not results:
            self.out.append({"role": role, "content": _text(texts)})

    def _answer(self, results: Sequence[ToolResult], path: str) -> None:
        """Check that the results answer the open calls, one each, and append them in the order of the calls.

        The order matters: the chat format tells results apart by position only.
        """
        answers = {result.tool_use_id: result for result in results}
        for at, result in enumerate(results):
            if result.tool_use_id not in self.open_calls or answers[result.tool_use_id] is not result:
                where = f"{path}.content[{at}].tool_use_id"
                raise InvalidRequest(
                    f"{where}: {result.tool_use_id!r} is not an unanswered tool_use of the message before", param=where
                )
        if missing := [call_id for call_id in self.open_calls if call_id not in answers]:
            raise InvalidRequest(
                f"{path}.content: tool_use {', '.join(missing)} of the message before needs a tool_result",
                param=f"{path}.content",
            )
        for call_id in self.open_calls:
            where = f"{path}.content[{results.index(answers[call_id])}]"
            content = _result_content(answers[call_id], where)
            self.out.append({"role": "tool", "tool_call_id": call_id, "content": content})
        self.open_calls = []


def _text(content: str | Sequence[TextBlock] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block.text for block in content)


def _result_content(result: ToolResult, path: str) -> str | list[dict[str, str]]:
    """A tool message's content: text, or references to deferred tools, which the template spells out."""
    blocks = [] if result.content is None or isinstance(result.content, str) else result.content
    references = [block.tool_name for block in blocks if isinstance(block, ToolReference)]
    if references:
        if len(references) < len(blocks) or result.is_error:
            raise InvalidRequest(f"{path}.content: tool_reference blocks cannot be mixed with text", param=path)
        return [{"type": "tool_reference", "name": name} for name in references]
    text = result.content if isinstance(result.content, str) else _text([b for b in blocks if isinstance(b, TextBlock)])
    return f"Error: {text}" if result.is_error else text


# ---- tools and format --------------------------------------------------------------------------------------


def _tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    seen: set[str] = set()
    functions = []
    for index, tool in enumerate(tools):
        if tool.name in seen:
            path = f"tools[{index}].name"
            raise InvalidRequest(f"{path}: {tool.name!r} is defined twice", param=path)
        seen.add(tool.name)
        function: dict[str, Any] = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        function["parameters"] = tool.input_schema
        if tool.strict is not None:
            function["strict"] = tool.strict
        if tool.defer_loading is not None:
            function["defer_loading"] = tool.defer_loading
        functions.append({"type": "function", "function": function})
    return functions


def _tool_choice(request: Conversation) -> tuple[Any, bool]:
    """(the turn's tool_choice, whether parallel calls are allowed)."""
    choice = request.tool_choice
    if choice is None:
        return "auto", True
    if isinstance(choice, ToolChoiceNone):
        return "none", True
    names = [tool.name for tool in request.tools or ()]
    parallel = not choice.disable_parallel_tool_use
    if isinstance(choice, ToolChoiceTool):
        if choice.name not in names:
            raise InvalidRequest(f"tool_choice.name: {choice.name!r} is not one of the tools", param="tool_choice.name")
        return ("named", choice.name), parallel
    if isinstance(choice, ToolChoiceAny):
        if not names:
            raise InvalidRequest("tool_choice any needs tools", param="tool_choice")
        return "required", parallel
    return "auto", parallel


def _response_format(request: Conversation) -> dict[str, Any] | None:
    wanted = request.output_config.format if request.output_config else None
    if wanted is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": wanted.schema, "strict": True}}


# ---- thinking ----------------------------------------------------------------------------------------------


def _thinking(request: Conversation, warnings: list[str]) -> tuple[str | None, dict[str, Any]]:
    """(effort, template kwargs): the table in the module's docstring."""
    effort = request.output_config.effort if request.output_config else None
    kwargs = _kept_thinking(request, warnings)
    thinking = request.thinking
    if isinstance(thinking, ThinkingDisabled) or (thinking is None and effort is None):
        return effort, {**kwargs, "enable_thinking": False}
    if isinstance(thinking, ThinkingEnabled):
        _check_budget(thinking, request)
        warnings.append("thinking.budget_tokens is not enforced: the model cannot be held to a number of tokens")
        if effort is None and thinking.budget_tokens < SMALL_BUDGET:
            effort = "high"
    return effort, kwargs


def _check_budget(thinking: ThinkingEnabled, request: Conversation) -> None:
    if isinstance(request, MessagesRequest) and thinking.budget_tokens >= request.max_tokens:
        raise InvalidRequest(
            f"thinking.budget_tokens must be less than max_tokens: {thinking.budget_tokens} is not less than "
            f"{request.max_tokens}",
            param="thinking.budget_tokens",
        )


def _kept_thinking(request: Conversation, warnings: list[str]) -> dict[str, Any]:
    """`clear_thinking`, if the request says which thinking of earlier turns stays in the prompt."""
    edits = (request.context_management.edits if request.context_management else None) or []
    if not edits:
        return {}
    if len(edits) > 1:
        raise InvalidRequest("context_management.edits: clear_thinking is given twice", param="context_management")
    keep = edits[0].keep
    turns = keep.value if isinstance(keep, ThinkingTurns) else 1
    if turns > 1:
        warnings.append("context_management keeps the thinking of all turns: the model keeps the latest turn's or all")
    return {"clear_thinking": turns == 1 and not _keeps_all(edits[0])}


def _keeps_all(edit: ClearThinking) -> bool:
    return edit.keep is not None and not isinstance(edit.keep, ThinkingTurns)


# ---- sampling ----------------------------------------------------------------------------------------------


def _sampling(request: Conversation, defaults: SamplingDefaults) -> SamplingParams:
    if not isinstance(request, MessagesRequest):  # a count generates nothing
        return SamplingParams(max_tokens=1)
    return SamplingParams(
        max_tokens=request.max_tokens,
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        top_k=defaults.top_k if request.top_k is None else request.top_k,
    )
