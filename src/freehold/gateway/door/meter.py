"""Watches one answer go by: how many tokens, when, how it ended, and whether it was any good.

Who counts: the upstream's `usage`, wherever it came; after it, or without any, a chunk that carries text is one token
(`counted` says which). Speculative decoding puts several tokens into a chunk, so a stream that was cut before its
usage is then counted too low, unless every chunk has one: `continuous_usage` of the upstream.

Failure classes are looked for in this order once an answer is complete:
    tool_json     arguments of a tool call that are not JSON
    refusal       the upstream says so: a `refusal`, a content filter, or the stop reason
    empty         neither content, reasoning nor a tool call
    thinking_cut  stopped by the length limit before any content or tool call
    looping       stopped by the length limit, and the last 600 characters repeat something of at most 120
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from freehold.gateway.call import Endpoint
from freehold.gateway.door import dialects
from freehold.gateway.door.dialects import Usage
from freehold.gateway.http.sse import DONE
from freehold.ledger import Counted, ErrorClass
from freehold.timing import StreamClock

MAX_GAPS = 65_536  # of a stream that are kept for the percentiles
MAX_ARGUMENTS = 1 << 20  # characters of tool arguments that are kept to be checked
MAX_KEPT_TEXT = 1 << 18  # characters of an answer that are put aside for a sampler
_TAIL = 600
_LONGEST_PERIOD = 120

_LENGTH: Final = frozenset(("length", "max_tokens", "max_output_tokens", "model_context_window_exceeded"))
_REFUSED: Final = frozenset(("content_filter", "refusal"))


class Meter:
    """One attempt's. started: `time.perf_counter()` when the request was sent. keep_text: for a sampler."""

    def __init__(self, endpoint: Endpoint, started: float, *, keep_text: bool = False) -> None:
        self.clock = StreamClock(started)
        self.finish_reason = ""
        self.complete = False  # the end came: `[DONE]`, `message_stop`, `response.completed`
        self.error_event: Any = None  # what the upstream's error event said
        self.input_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.reasoning_tokens: int | None = None
        self._usage_output: int | None = None
        self._since_usage = 0  # tokens counted after the last usage
        self._gaps: list[float] = []
        self._has_content = False
        self._has_reasoning = False
        self._has_tools = False
        self._refused = False
        self._arguments: dict[tuple[int, int], list[str]] = {}
        self._argument_size = 0
        self._tail = ""
        self._kept: list[str] | None = [] if keep_text else None
        self._kept_size = 0
        self._read_event, self._read_whole = _READERS[endpoint]

    # ---- what goes by ------------------------------------------------------------------------------------------

    def event(self, data: bytes, now: float) -> bool:
        """Note one event of a stream; True if it carries nothing but usage. Raises ValueError: it is no JSON object
        of this API."""
        if data == DONE:
            self.complete = True
            return False
        pieces = self._read_event(self, data)
        if pieces > 0:
            gap = self.clock.tick(now, pieces)
            if gap is not None and len(self._gaps) < MAX_GAPS:
                self._gaps.append(gap)
        return pieces < 0

    def whole(self, body: bytes) -> None:
        """Note an answer that came in one piece. Raises ValueError, as `event`."""
        self._read_whole(self, body)
        self.complete = True

    # ---- what was found ----------------------------------------------------------------------------------------

    @property
    def output_tokens(self) -> int | None:
        """All that were seen so far; None before any was."""
        if self._usage_output is None and not self._since_usage:
            return None
        return (self._usage_output or 0) + self._since_usage

    @property
    def counted(self) -> Counted:
        if self._since_usage:
            return "counted"
        return "none" if self._usage_output is None else "upstream"

    @property
    def tpot(self) -> float | None:
        tokens = self.output_tokens
        if self.clock.first is None or self.clock.last is None or tokens is None or tokens < 2:
            return None
        return (self.clock.last - self.clock.first) / (tokens - 1)

    def itl(self) -> tuple[float | None, float | None]:
        """p50 and p99 of the gaps between chunks with tokens: the smallest gap that so many percent do not exceed."""
        if not self._gaps:
            return None, None
        ordered = sorted(self._gaps)
        return _rank(ordered, 0.50), _rank(ordered, 0.99)

    @property
    def text(self) -> str:
        """Of the first choice, as far as it was kept."""
        return "".join(self._kept or ())

    def failure(self) -> ErrorClass:
        """What is wrong with a complete answer; "": nothing. See the module."""
        if self._has_tools and self.finish_reason not in _LENGTH and not all(map(_is_json, self._arguments.values())):
            return "tool_json"
        if self._refused or self.finish_reason in _REFUSED:
            return "refusal"
        if not (self._has_content or self._has_reasoning or self._has_tools):
            return "empty"
        if self.finish_reason in _LENGTH:
            if not (self._has_content or self._has_tools):
                return "thinking_cut"
            if is_looping(self._tail):
                return "looping"
        return ""

    # ---- what readers note -------------------------------------------------------------------------------------

    def count(self, pieces: int) -> None:
        """Chunks with text that no usage is known to include."""
        self._since_usage += pieces

    def note_usage(self, usage: Usage) -> None:
        """Counts are cumulative: later ones replace earlier ones, and what one does not say stays."""
        if usage.input is not None:
            self.input_tokens = usage.input
        if usage.cached is not None:
            self.cached_tokens = usage.cached
        if usage.reasoning is not None:
            self.reasoning_tokens = usage.reasoning
        if usage.output is not None:
            self._usage_output = usage.output
            self._since_usage = 0

    def note_content(self, text: str) -> None:
        self._has_content = True
        self._tail = (self._tail + text)[-_TAIL:]
        if self._kept is not None and self._kept_size < MAX_KEPT_TEXT:
            self._kept.append(text)
            self._kept_size += len(text)

    def note_reasoning(self) -> None:
        self._has_reasoning = True

    def note_refusal(self) -> None:
        self._refused = True

    def note_tool(self, choice: int = 0, index: int = 0, arguments: str = "") -> None:
        self._has_tools = True
        if arguments and self._argument_size < MAX_ARGUMENTS:
            self._arguments.setdefault((choice, index), []).append(arguments)
            self._argument_size += len(arguments)


def is_looping(tail: str) -> bool:
    """Whether the text is one thing over and over: it repeats with a period of at most `_LONGEST_PERIOD`."""
    if len(tail) < _TAIL:
        return False
    probe = tail[-_LONGEST_PERIOD:]
    at = tail.rfind(probe, 0, -1)
    period = len(tail) - len(probe) - at
    return at >= 0 and period <= _LONGEST_PERIOD and tail[period:] == tail[:-period]


def _is_json(pieces: Sequence[str]) -> bool:
    text = "".join(pieces)
    if len(text) >= MAX_ARGUMENTS:
        return True  # too long to be kept whole
    try:
        msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _rank(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


# ---- readers: an event gives how many pieces of text it carries, or -1 if it carries nothing but usage -----


def _chat_event(meter: Meter, data: bytes) -> int:
    chunk = dialects.completion.decode(data)
    if chunk.error is not None:
        meter.error_event = chunk.error
        return 0
    pieces = 0
    for choice in chunk.choices or ():
        if choice.finish_reason is not None:
            meter.finish_reason = choice.finish_reason
        if choice.delta is not None:
            pieces += _delta(meter, choice.index, choice.delta)
        elif choice.text:
            meter.note_content(choice.text)
            pieces += 1
    meter.count(pieces)
    if chunk.usage is None:
        return pieces
    meter.note_usage(chunk.usage)
    return pieces if chunk.choices else -1


def _completion(meter: Meter, body: bytes) -> None:
    answer = dialects.completion.decode(body)
    if answer.error is not None or answer.choices is None:
        raise ValueError("no choices")
    for choice in answer.choices:
        meter.finish_reason = choice.finish_reason or meter.finish_reason
        if choice.message is not None:
            _delta(meter, choice.index, choice.message)
        elif choice.text:
            meter.note_content(choice.text)
    if answer.usage is not None:
        meter.note_usage(answer.usage)


def _delta(meter: Meter, choice: int, delta: dialects.Delta) -> int:
    """1 if the delta, or the message, has any text."""
    found = 0
    if delta.content:
        meter.note_content(delta.content if isinstance(delta.content, str) else _text_of(delta.content))
        found = 1
    if delta.reasoning_content or delta.reasoning:
        meter.note_reasoning()
        found = 1
    if delta.tool_calls:
        for position, call in enumerate(delta.tool_calls):
            given = call.function.arguments if call.function is not None else None
            index = call.index or position
            meter.note_tool(choice, index, given if isinstance(given, str) else "")
        found = 1
    if delta.refusal:
        meter.note_refusal()
        found = 1
    return found


def _text_of(parts: Any) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "".join(text for text in texts if isinstance(text, str))


def _message_event(meter: Meter, data: bytes) -> int:
    event = dialects.message_event.decode(data)
    match event.type:
        case "message_start":
            if event.message is not None and (usage := event.message.usage) is not None:
                usage.output_tokens = None  # of what has not been said yet
                meter.note_usage(usage)
        case "content_block_start":
            if event.content_block is not None and event.content_block.type == "tool_use":
                meter.note_tool(index=event.index)
        case "content_block_delta":
            pieces = 0 if event.delta is None else _message_delta(meter, event.index, event.delta)
            meter.count(pieces)
            return pieces
        case "message_delta":
            if event.delta is not None and event.delta.stop_reason is not None:
                meter.finish_reason = event.delta.stop_reason
            if event.usage is not None:
                meter.note_usage(event.usage)
        case "message_stop":
            meter.complete = True
        case "error":
            meter.error_event = event.error or "error"
    return 0


def _message_delta(meter: Meter, index: int, delta: dialects.MessageDelta) -> int:
    if delta.text:
        meter.note_content(delta.text)
    elif delta.thinking:
        meter.note_reasoning()
    elif delta.partial_json:
        meter.note_tool(index=index, arguments=delta.partial_json)
    else:
        return 0
    return 1


def _message(meter: Meter, body: bytes) -> None:
    answer = dialects.message.decode(body)
    if answer.type == "error" or answer.content is None:
        raise ValueError("no content")
    for block in answer.content:
        if block.text:
            meter.note_content(block.text)
        elif block.type in ("thinking", "redacted_thinking"):
            meter.note_reasoning()
        elif block.type == "tool_use":
            meter.note_tool()
    meter.finish_reason = answer.stop_reason or ""
    if answer.usage is not None:
        meter.note_usage(answer.usage)


_RESPONSE_ENDS: Final = {"response.completed": "stop", "response.incomplete": "length", "response.failed": "error"}


def _response_event(meter: Meter, data: bytes) -> int:
    event = dialects.response_event.decode(data)
    pieces = 0
    if event.type.endswith(".delta") and isinstance(event.delta, str) and event.delta:
        pieces = 1
        match event.type:
            case "response.output_text.delta":
                meter.note_content(event.delta)
            case "response.function_call_arguments.delta" | "response.custom_tool_call_input.delta":
                given = event.delta if event.type == "response.function_call_arguments.delta" else ""
                meter.note_tool(index=event.output_index, arguments=given)
            case "response.refusal.delta":
                meter.note_refusal()
            case _:
                meter.note_reasoning()
        meter.count(pieces)
    elif event.type in _RESPONSE_ENDS:
        meter.complete = True
        meter.finish_reason = _RESPONSE_ENDS[event.type]
        if event.response is not None:
            _note_response(meter, event.response)
        if event.type == "response.failed":
            meter.error_event = (event.response.error if event.response is not None else None) or "failed"
    elif event.type == "error":
        meter.error_event = event.error or event.message or "error"
    return pieces


def _response(meter: Meter, body: bytes) -> None:
    answer = dialects.response.decode(body)
    if answer.output is None or answer.status == "failed":
        raise ValueError("no output")
    meter.finish_reason = "length" if answer.status == "incomplete" else "stop"
    for item in answer.output:
        match item.type:
            case "message":
                for part in item.content or ():
                    if part.text:
                        meter.note_content(part.text)
                    elif part.refusal:
                        meter.note_refusal()
            case "reasoning":
                meter.note_reasoning()
            case "function_call":
                meter.note_tool(arguments=item.arguments or "")
            case _:
                meter.note_tool()  # a call of a tool of the provider's own
    _note_response(meter, answer)


def _note_response(meter: Meter, answer: dialects.Response) -> None:
    if answer.usage is not None:
        meter.note_usage(answer.usage)
    if answer.incomplete_details is not None and answer.incomplete_details.reason:
        meter.finish_reason = answer.incomplete_details.reason


def _embeddings(meter: Meter, body: bytes) -> None:
    answer = dialects.embeddings.decode(body)
    if answer.error is not None or not answer.data:
        raise ValueError("no embeddings")
    meter.note_content("[]")  # vectors are content; `failure` asks only whether there is any
    if answer.usage is not None:
        meter.note_usage(answer.usage)
    meter.finish_reason = "stop"


def _no_stream(meter: Meter, data: bytes) -> int:
    raise ValueError("embeddings are not streamed")


_READERS: Final[dict[Endpoint, tuple[Callable[[Meter, bytes], int], Callable[[Meter, bytes], None]]]] = {
    "chat": (_chat_event, _completion),
    "completions": (_chat_event, _completion),
    "messages": (_message_event, _message),
    "responses": (_response_event, _response),
    "embeddings": (_no_stream, _embeddings),
}
