"""The wire format of the OpenAI-compatible endpoints: what may be sent, within which ranges, and what comes back.

Requests forbid unknown fields; `wire.decode` turns what msgspec finds into errors that name the field. Ranges stand in
the annotations, so they are checked while decoding and shown in `/openapi.json`. Rules between fields are in
`chat.py` and `completions.py`. Known fields that are not here are in `fields.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

MAX_TOKENS = 131_072
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16

StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
MaxTokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
ToolName = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\s<>]+$")]


class Request(Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of everything that is received. (`omit_defaults`: what was not sent is not passed on.)"""


class StreamOptions(Request):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(Request):
    """The fields that chat and text completions share. null everywhere means "not given"."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1, description="0 and -1: off")] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=4096, description="token id → bias")
        ]
        | None
    ) = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    prompt_logprobs: TopLogprobs | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None

    def stop_strings(self) -> tuple[str, ...]:
        match self.stop:
            case None:
                return ()
            case str():
                return (self.stop,)
            case _:
                return tuple(self.stop)


# ---- chat request ------------------------------------------------------------------------------------------


class TextPart(Request, tag_field="type", tag="text"):
    text: str


class ToolReferencePart(Request, tag_field="type", tag="tool_reference"):
    """A tool that was declared with `defer_loading` and is now available (GLM's own extension)."""

    name: str | None = None
    tool_name: str | None = None


Content = str | list[TextPart]


class FunctionCall(Request):
    name: ToolName
    arguments: Annotated[str, Meta(description="a JSON object, as text")]


class ToolCall(Request):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class SystemMessage(Request, tag_field="role", tag="system"):
    content: Content


class DeveloperMessage(Request, tag_field="role", tag="developer"):
    content: Content


class UserMessage(Request, tag_field="role", tag="user"):
    content: Content


class AssistantMessage(Request, tag_field="role", tag="assistant"):
    content: Content | None = None
    reasoning_content: str | None = None
    reasoning: Annotated[str, Meta(description="another name of reasoning_content")] | None = None
    tool_calls: list[ToolCall] | None = None


class ToolMessage(Request, tag_field="role", tag="tool"):
    content: str | list[TextPart | ToolReferencePart]
    tool_call_id: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class FunctionSpec(Request):
    name: ToolName
    description: str | None = None
    parameters: Annotated[dict[str, Any], Meta(description="JSON schema of the arguments")] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class Tool(Request):
    type: Literal["function"]
    function: FunctionSpec


class FunctionName(Request):
    name: ToolName


class NamedToolChoice(Request, tag_field="type", tag="function"):
    function: FunctionName


class ToolReference(Request):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Request):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolReference], Meta(min_length=1)]


class AllowedToolsChoice(Request, tag_field="type", tag="allowed_tools"):
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice


class TextFormat(Request, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Request, tag_field="type", tag="json_object"):
    pass


class JsonSchema(Request):
    name: Annotated[str, Meta(min_length=1, max_length=128)]
    schema_: dict[str, Any] | None = field(name="schema", default=None)
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Request, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class Thinking(Request):
    """Z.ai's own way to switch thinking; the same as `chat_template_kwargs` with enable_thinking."""

    type: Literal["enabled", "disabled"]
    clear_thinking: bool | None = None


class ChatRequest(SamplingRequest, kw_only=True):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Meta(min_length=1)]
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None
    max_completion_tokens: MaxTokens | None = None
    max_tokens: MaxTokens | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None


# ---- completions, tokenize ---------------------------------------------------------------------------------


class CompletionRequest(SamplingRequest, kw_only=True):
    """POST /v1/completions"""

    prompt: Annotated[
        str | list[str | TokenId | list[TokenId]],
        Meta(description="a text, a list of texts, a list of token ids, or a list of those"),
    ]
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS, description="0 only with echo")] | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None


class TokenizeRequest(Request):
    """POST /tokenize: either `prompt`, or `messages` and what goes with them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Request):
    """POST /detokenize"""

    tokens: list[TokenId]
    model: str | None = None


# ---- responses ---------------------------------------------------------------------------------------------


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(Struct, frozen=True):
    """Of the drafts that were proposed (speculative decoding), how many became output and how many did not."""

    reasoning_tokens: int
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class UsageBody(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(Struct, frozen=True, gc=False):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class PromptLogprob(Struct, frozen=True, gc=False):
    """One candidate for one prompt position (vLLM's extension). rank is 1 for the most likely."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # keys are token ids; the first entry is null

FinishReasonWord = Literal["stop", "length", "tool_calls"]


class ChatLogprobs(Struct, frozen=True, omit_defaults=True):
    """content: the tokens of `message.content`. reasoning: those of `message.reasoning_content`."""

    content: list[TokenLogprob] | None
    reasoning: list[TokenLogprob] | UnsetType = UNSET


class FunctionCallOut(Struct, frozen=True):
    name: str
    arguments: str


class ToolCallOut(Struct, frozen=True):
    id: str
    type: Literal["function"]
    function: FunctionCallOut


class AssistantOut(Struct, frozen=True, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None
    reasoning: str | None
    tool_calls: list[ToolCallOut] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    index: int
    message: AssistantOut
    finish_reason: FinishReasonWord
    logprobs: ChatLogprobs | None = None
    stop_reason: Annotated[str, Meta(description="the stop string that ended it")] | None = None


class ChatCompletion(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class FunctionDelta(Struct, frozen=True, omit_defaults=True):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Struct, frozen=True, omit_defaults=True):
    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(Struct, frozen=True, omit_defaults=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReasonWord | None = None


class ChatChunk(Struct, frozen=True, kw_only=True):
    """One SSE event of a chat stream. usage is absent unless asked for; then null until the last chunk."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: UsageBody | UnsetType | None = UNSET


class CompletionLogprobs(Struct, frozen=True):
    """Aligned lists. A prompt's first token, which nothing predicts, has null. bytes is our extension."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    bytes: list[list[int]]


class CompletionChoice(Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReasonWord | None = None
    stop_reason: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct, frozen=True, kw_only=True):
    """A text completion, and also one SSE event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageBody | UnsetType | None = UNSET


class Model(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "freehold"
    max_model_len: int
    root: str
    parent: str | None = None


class ModelList(Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class Tokenized(Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Struct, frozen=True):
    prompt: str


class Health(Struct, frozen=True):
    status: Literal["ok", "ready"]
