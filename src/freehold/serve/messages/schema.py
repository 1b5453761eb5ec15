"""The Anthropic Messages request as structs: the fields that are honoured.

Known fields that are not are in `serve/fields.py`; anything else is refused by name. Content blocks that the model
cannot read (images, documents, server tools) are refused before decoding, so that the message says why.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from freehold.errors import InvalidRequest, NotFound, UnsupportedField
from freehold.serve.schema import MaxTokens, Request, ToolName

MIN_BUDGET = 1024  # Anthropic's own bound
MAX_STOP_SEQUENCES = 64

# Anthropic asks for more than white space.
StopSequence = Annotated[str, Meta(min_length=1, max_length=1024, pattern=r"\S")]

# ---- content -----------------------------------------------------------------------------------------------


class TextBlock(Request, tag="text"):
    text: str


class ToolReference(Request, tag="tool_reference"):
    """A tool with `defer_loading` that the caller's tool search found; from here on the model knows it."""

    tool_name: str


class ToolResult(Request, tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock | ToolReference] | None = None
    is_error: bool | None = None


class ToolUse(Request, tag="tool_use"):
    id: str
    name: ToolName
    input: dict[str, Any]


class Thinking(Request, tag="thinking"):
    thinking: str
    signature: str = ""


class RedactedThinking(Request, tag="redacted_thinking"):
    data: str


class UserMessage(Request, tag_field="role", tag="user"):
    content: str | list[TextBlock | ToolResult]


class AssistantMessage(Request, tag_field="role", tag="assistant"):
    content: str | list[TextBlock | Thinking | RedactedThinking | ToolUse]


class SystemMessage(Request, tag_field="role", tag="system"):
    content: str | list[TextBlock]


Message = UserMessage | AssistantMessage | SystemMessage


# ---- settings ----------------------------------------------------------------------------------------------


class Tool(Request):
    name: ToolName
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class ToolChoiceAuto(Request, tag="auto"):
    disable_parallel_tool_use: bool | None = None


class ToolChoiceAny(Request, tag="any"):
    disable_parallel_tool_use: bool | None = None


class ToolChoiceTool(Request, tag="tool"):
    name: str
    disable_parallel_tool_use: bool | None = None


class ToolChoiceNone(Request, tag="none"):
    pass


Display = Literal["summarized", "omitted"]


class ThinkingEnabled(Request, tag="enabled"):
    budget_tokens: Annotated[int, Meta(ge=MIN_BUDGET)]
    display: Display | None = None


class ThinkingAdaptive(Request, tag="adaptive"):
    display: Display | None = None


class ThinkingDisabled(Request, tag="disabled"):
    pass


class JsonFormat(Request, tag="json_schema"):
    schema: dict[str, Any]


class OutputConfig(Request):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class ThinkingTurns(Request, tag="thinking_turns"):
    value: Annotated[int, Meta(ge=1)]


class AllThinkingTurns(Request, tag="all"):
    pass


class ClearThinking(Request, tag="clear_thinking_20251015"):
    keep: Literal["all"] | ThinkingTurns | AllThinkingTurns | None = None


class ContextManagement(Request):
    edits: list[ClearThinking] | None = None


# ---- requests ----------------------------------------------------------------------------------------------


class Conversation(Request):
    """What `/v1/messages/count_tokens` takes: all that the prompt depends on."""

    model: str
    messages: Annotated[list[Message], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoiceAuto | ToolChoiceAny | ToolChoiceTool | ToolChoiceNone | None = None
    thinking: ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None


class MessagesRequest(Conversation, kw_only=True):
    """`/v1/messages`."""

    max_tokens: MaxTokens
    stream: bool | None = None
    stop_sequences: Annotated[list[StopSequence], Meta(max_length=MAX_STOP_SEQUENCES)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None


# ---- what the model cannot read ----------------------------------------------------------------------------

_BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}


def refuse_unsupported(raw: object) -> None:
    """Refuse, by path and reason, blocks and tools that the structs above could only call invalid values.

    raw: a parsed body; anything that is not of the expected shape is left for the decoder to refuse.
    """
    if not isinstance(raw, dict):
        return
    for index, message in enumerate(_objects(raw.get("messages"))):
        allowed = _BLOCKS.get(str(message.get("role")))
        if allowed is None:
            continue
        for at, block in enumerate(_objects(message.get("content"))):
            path = f"messages[{index}].content[{at}]"
            _check_block(block, allowed, path)
            for inner_at, inner in enumerate(_objects(block.get("content"))):
                _check_block(inner, ("text", "tool_reference"), f"{path}.content[{inner_at}]")
    for index, tool in enumerate(_objects(raw.get("tools"))):
        kind = tool.get("type")
        if isinstance(kind, str) and kind != "custom":
            raise UnsupportedField(
                f"tools[{index}].type: there is no built-in tool {kind!r} here; "
                "define a tool with name, description and input_schema",
                param=f"tools[{index}].type",
            )
    _check_settings(raw)


def _check_block(block: dict[str, Any], allowed: tuple[str, ...], path: str) -> None:
    kind = block.get("type")
    if not isinstance(kind, str) or kind in allowed:
        return
    raise UnsupportedField(
        f"{path}.type: {kind!r} blocks are not supported here (the model reads text only); use {', '.join(allowed)}",
        param=f"{path}.type",
    )


class ThreadsUnsupported(UnsupportedField):
    """The code on which Anthropic's SDK sends the conversation again, whole and without `thread`."""

    code = "thread_unsupported_request"


class ThreadNotFound(NotFound):
    """The code on which Anthropic's SDK sends the conversation again, whole, as a new thread."""

    code = "thread_not_found"


def _check_settings(raw: dict[str, Any]) -> None:
    thread = raw.get("thread")
    if isinstance(thread, dict):
        refusal = ThreadNotFound if thread.get("type") == "continue" else ThreadsUnsupported
        raise refusal("thread: nothing is stored here; send the whole conversation in `messages`", param="thread")
    thinking = raw.get("thinking")
    if isinstance(thinking, dict) and thinking.get("type") == "between_tools":
        raise UnsupportedField(
            "thinking.type: the model cannot think only between tool calls; use adaptive, enabled or disabled",
            param="thinking.type",
        )
    management = raw.get("context_management")
    for index, edit in enumerate(_objects(management.get("edits") if isinstance(management, dict) else None)):
        kind = edit.get("type")
        if isinstance(kind, str) and kind != "clear_thinking_20251015":
            path = f"context_management.edits[{index}]"
            raise UnsupportedField(
                f"{path}.type: {kind!r} is not supported: conversations are never shortened here", param=f"{path}.type"
            )
    if raw.get("max_tokens") == 0:
        raise InvalidRequest("max_tokens must be at least 1; a request cannot only warm the cache", param="max_tokens")


def _objects(value: object) -> list[dict[str, Any]]:
    """The array's objects; other items become empty ones so that indexes stay right."""
    return [item if isinstance(item, dict) else {} for item in value] if isinstance(value, list) else []
