"""The OpenAI response object and the events of its stream, as structs: what comes back."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType, field

from freehold.serve.schema import TokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]

# ---- output items ------------------------------------------------------------------------------------------


class OutputTextPart(Struct, tag="output_text"):
    text: str = ""
    annotations: list[Any] = field(default_factory=list)  # nothing here cites anything
    logprobs: list[TokenLogprob] = field(default_factory=list)


class ReasoningTextPart(Struct, tag="reasoning_text"):
    text: str = ""


Part = OutputTextPart | ReasoningTextPart


class MessageOut(Struct, tag="message"):
    id: str
    status: ItemStatus = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputTextPart] = field(default_factory=list)


class ReasoningOut(Struct, tag="reasoning"):
    """The model's own reasoning. There is no summary, because nothing makes one."""

    id: str
    status: ItemStatus = "in_progress"
    summary: list[Any] = field(default_factory=list)
    content: list[ReasoningTextPart] = field(default_factory=list)
    encrypted_content: str | UnsetType = UNSET


class FunctionCallOut(Struct, tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: ItemStatus = "in_progress"


OutputItem = MessageOut | ReasoningOut | FunctionCallOut


# ---- the response ------------------------------------------------------------------------------------------


class InputTokensDetails(Struct, frozen=True):
    """The prefix cache keeps every prompt, unasked and unbilled, so nothing counts as written."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct, frozen=True):
    reasoning_tokens: int


class ResponseUsage(Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct, frozen=True):
    code: Literal["server_error", "rate_limit_exceeded"]
    message: str


class IncompleteDetails(Struct, frozen=True):
    reason: Literal["max_output_tokens"]


class ReasoningSettings(Struct, frozen=True):
    effort: str | None
    summary: None = None


class ResponseBody(Struct, kw_only=True):
    """The response, whole; also, as far as it has got, in the first and the last events of its stream.

    The settings are those in force, so that `store` is always false and `truncation` always disabled.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputItem] = field(default_factory=list)
    usage: ResponseUsage | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: ReasoningSettings
    store: Literal[False] = False
    background: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"


# ---- stream ------------------------------------------------------------------------------------------------


class Created(Struct, frozen=True, tag="response.created"):
    sequence_number: int
    response: ResponseBody


class InProgress(Struct, frozen=True, tag="response.in_progress"):
    sequence_number: int
    response: ResponseBody


class Completed(Struct, frozen=True, tag="response.completed"):
    sequence_number: int
    response: ResponseBody


class Incomplete(Struct, frozen=True, tag="response.incomplete"):
    sequence_number: int
    response: ResponseBody


class Failed(Struct, frozen=True, tag="response.failed"):
    sequence_number: int
    response: ResponseBody


class ItemAdded(Struct, frozen=True, tag="response.output_item.added"):
    sequence_number: int
    output_index: int
    item: OutputItem


class ItemDone(Struct, frozen=True, tag="response.output_item.done"):
    sequence_number: int
    output_index: int
    item: OutputItem


class OfItem(Struct, frozen=True):
    """What every event inside an item begins with."""

    sequence_number: int
    output_index: int
    item_id: str


class PartAdded(OfItem, frozen=True, tag="response.content_part.added"):
    part: Part
    content_index: int = 0


class PartDone(OfItem, frozen=True, tag="response.content_part.done"):
    part: Part
    content_index: int = 0


class TextDelta(OfItem, frozen=True, tag="response.output_text.delta"):
    delta: str
    logprobs: list[TokenLogprob]
    content_index: int = 0


class TextDone(OfItem, frozen=True, tag="response.output_text.done"):
    text: str
    logprobs: list[TokenLogprob]
    content_index: int = 0


class ReasoningDelta(OfItem, frozen=True, tag="response.reasoning_text.delta"):
    delta: str
    content_index: int = 0


class ReasoningDone(OfItem, frozen=True, tag="response.reasoning_text.done"):
    text: str
    content_index: int = 0


class ArgumentsDelta(OfItem, frozen=True, tag="response.function_call_arguments.delta"):
    delta: str


class ArgumentsDone(OfItem, frozen=True, tag="response.function_call_arguments.done"):
    name: str
    arguments: str


Lifecycle = Created | InProgress | Completed | Incomplete | Failed

StreamEvent = (
    Lifecycle
    | ItemAdded
    | ItemDone
    | PartAdded
    | PartDone
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
)
