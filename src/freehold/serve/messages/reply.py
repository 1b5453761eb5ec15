"""The Anthropic message and the events of its stream, as structs: what comes back."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class TextOut(Struct, tag="text"):
    text: str = ""


class ThinkingOut(Struct, tag="thinking"):
    thinking: str = ""
    signature: str = ""


class ToolUseOut(Struct, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


Block = TextOut | ThinkingOut | ToolUseOut


class OutputTokensDetails(Struct, frozen=True):
    thinking_tokens: int


class MessageUsage(Struct, frozen=True):
    """The prompt is `input_tokens` + `cache_read_input_tokens`.

    The prefix cache keeps every prompt without being asked and bills nothing for it, so nothing counts as created.
    """

    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    output_tokens_details: OutputTokensDetails | UnsetType = UNSET


class MessageBody(Struct):
    """The message, whole; also, empty, the beginning of its stream."""

    id: str
    model: str
    content: list[Block]
    usage: MessageUsage
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class TokenCount(Struct, frozen=True):
    """What `/v1/messages/count_tokens` answers."""

    input_tokens: int


# ---- stream ------------------------------------------------------------------------------------------------


class MessageStart(Struct, frozen=True, tag="message_start"):
    message: MessageBody


class Ping(Struct, frozen=True, tag="ping"):
    pass


class BlockStart(Struct, frozen=True, tag="content_block_start"):
    index: int
    content_block: Block


class TextDelta(Struct, frozen=True, tag="text_delta"):
    text: str


class ThinkingDelta(Struct, frozen=True, tag="thinking_delta"):
    thinking: str


class SignatureDelta(Struct, frozen=True, tag="signature_delta"):
    signature: str


class InputJsonDelta(Struct, frozen=True, tag="input_json_delta"):
    partial_json: str


Delta = TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class BlockDelta(Struct, frozen=True, tag="content_block_delta"):
    index: int
    delta: Delta


class BlockStop(Struct, frozen=True, tag="content_block_stop"):
    index: int


class Stop(Struct, frozen=True):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Struct, frozen=True, tag="message_delta"):
    """usage is cumulative and final, and replaces what `message_start` had."""

    delta: Stop
    usage: MessageUsage


class MessageStop(Struct, frozen=True, tag="message_stop"):
    pass


StreamEvent = MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop


# ---- errors ------------------------------------------------------------------------------------------------


class MessageErrorDetails(Struct, frozen=True, omit_defaults=True):
    """Where the SDK looks for a stable code; `param` is the path of the field at fault."""

    error_code: str
    param: str | None = None


class MessageErrorDetail(Struct, frozen=True):
    type: str
    message: str
    details: MessageErrorDetails | UnsetType = UNSET


class MessageError(Struct, frozen=True, tag="error"):
    """An error, as a body and as the last event of a stream that failed."""

    error: MessageErrorDetail
