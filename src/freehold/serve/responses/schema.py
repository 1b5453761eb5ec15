"""The OpenAI Responses request as structs: the fields that are honoured.

Known fields that are not are in `serve/fields.py`; anything else is refused by name. Items and parts that the model
cannot read (images, files, built-in tools) are refused before decoding, so that the message says why.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, field

from freehold.errors import UnsupportedField
from freehold.serve.schema import MaxTokens, Request, ToolName, TopLogprobs

# ---- input items -------------------------------------------------------------------------------------------


class InputText(Request, tag="input_text"):
    text: str


class OutputText(Request, tag="output_text"):
    """An output part handed back. Annotations and logprobs describe the text; the model reads the text."""

    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Refusal(Request, tag="refusal"):
    refusal: str


class Item(Request):
    """Items handed back carry their id and status; both mean nothing to a server that keeps no state."""

    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(Item, kw_only=True, tag="message"):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText | Refusal]
    phase: Literal["commentary", "final_answer"] | None = None


class SummaryText(Request, tag="summary_text"):
    text: str


class ReasoningText(Request, tag="reasoning_text"):
    text: str


class ReasoningItem(Item, kw_only=True, tag="reasoning"):
    summary: list[SummaryText] = field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None


class FunctionCall(Item, kw_only=True, tag="function_call"):
    call_id: str
    name: ToolName
    arguments: str


class FunctionCallOutput(Item, kw_only=True, tag="function_call_output"):
    call_id: str
    name: str | None = None  # the call's own name counts
    output: str | list[InputText]


InputItem = MessageItem | ReasoningItem | FunctionCall | FunctionCallOutput


# ---- settings ----------------------------------------------------------------------------------------------


class FunctionTool(Request, tag="function"):
    name: ToolName
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class NamedFunction(Request, tag="function"):
    name: str


class AllowedTools(Request, tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Meta(min_length=1)]


class PlainText(Request, tag="text"):
    pass


class JsonObject(Request, tag="json_object"):
    pass


class JsonSchema(Request, tag="json_schema"):
    name: Annotated[str, Meta(min_length=1, max_length=128)]
    schema_: dict[str, Any] = field(name="schema")
    strict: bool | None = None
    description: str | None = None


class TextConfig(Request):
    format: PlainText | JsonObject | JsonSchema | None = None


class ReasoningConfig(Request):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None


class StreamOptions(Request):
    pass


Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    # These ask for details of things that never occur here, so there is nothing to leave out.
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesRequest(Request):
    """`/v1/responses`."""

    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_logprobs: TopLogprobs | None = None
    include: list[Include] | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # The engine's own settings, as on /v1/chat/completions.
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1, description="0 and -1: off")] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# ---- what the model cannot read ----------------------------------------------------------------------------

_ITEMS = ("message", "reasoning", "function_call", "function_call_output")
_PARTS = {
    "message": ("input_text", "output_text", "refusal"),
    "reasoning": ("reasoning_text",),
    "function_call_output": ("input_text",),
}


def prepare_raw(raw: object) -> None:
    """Name the type of messages that leave it out, and refuse by path and reason what the structs cannot express.

    raw: a parsed body, changed in place; what is not of the expected shape is left for the decoder to refuse.
    """
    if not isinstance(raw, dict):
        return
    for index, item in enumerate(_objects(raw.get("input"))):
        if "type" not in item and "role" in item:
            item["type"] = "message"
        _check_item(item, f"input[{index}]")
    for index, tool in enumerate(_objects(raw.get("tools"))):
        _check_kind(tool, ("function",), f"tools[{index}]", "there are no built-in tools here")
    choice = raw.get("tool_choice")
    if isinstance(choice, dict):
        _check_kind(choice, ("function", "allowed_tools"), "tool_choice", "there are no built-in tools here")
        for index, tool in enumerate(_objects(choice.get("tools"))):
            _check_kind(tool, ("function",), f"tool_choice.tools[{index}]", "there are no built-in tools here")


def _check_item(item: dict[str, Any], path: str) -> None:
    kind = item.get("type")
    if kind == "item_reference" or (kind is None and "id" in item):
        raise UnsupportedField(
            f"{path}: nothing is stored here, so an item cannot be referred to; send the item itself", param=path
        )
    _check_kind(item, _ITEMS, path, "there are no built-in tools here")
    for key in ("content", "output"):
        for at, part in enumerate(_objects(item.get(key))):
            allowed = _PARTS.get(str(kind), ())
            _check_kind(part, allowed, f"{path}.{key}[{at}]", "the model reads text only")


def _check_kind(value: dict[str, Any], allowed: tuple[str, ...], path: str, why: str) -> None:
    kind = value.get("type")
    if isinstance(kind, str) and kind not in allowed:
        raise UnsupportedField(
            f"{path}.type: {kind!r} is not supported here ({why}); use {', '.join(allowed)}", param=f"{path}.type"
        )


def _objects(value: object) -> list[dict[str, Any]]:
    """The array's objects; other items become empty ones so that indexes stay right."""
    return [item if isinstance(item, dict) else {} for item in value] if isinstance(value, list) else []
