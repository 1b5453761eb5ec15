"""From turn events to the Anthropic message, streamed or whole.

One writer makes both: every event becomes stream events, and the same calls build `message`, which is what a request
without `stream` gets. So the two cannot differ.

Stream order: `message_start`, `ping`, then per block `content_block_start`, `content_block_delta`…,
`content_block_stop`, then `message_delta` (stop reason, final usage) and `message_stop`. Blocks never overlap.

`message_start` counts the whole prompt as `input_tokens`, since how much of it the prefix cache serves is not known
before the first step; `message_delta` has the final split.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from freehold.errors import Unavailable
from freehold.serve.carried import pack
from freehold.serve.messages import reply
from freehold.serve.messages.reply import (
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    MessageBody,
    MessageUsage,
    StreamEvent,
)
from freehold.serve.turn import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    TurnFinished,
)

# Thinking text is shown in full, so nothing needs proving when it comes back. The field is required, and some clients
# drop a block whose signature is empty (which would lose thinking between tool calls), so it says what it is.
UNSIGNED = "unsigned"


class MessageWriter:
    """Feed it `start()` and then every event of one turn; `message` is complete after `TurnFinished`.

    max_tokens: what the request asked for; a generation that ends on length before that ran into the context's end.
    omit_thinking: thinking text is left out of the thinking block and travels in its signature (`carried`).
    """

    def __init__(
        self, *, message_id: str, model: str, prompt_tokens: int, max_tokens: int, omit_thinking: bool
    ) -> None:
        self.message = MessageBody(message_id, model, [], MessageUsage(prompt_tokens, 0, 0))
        self._max_tokens = max_tokens
        self._omit_thinking = omit_thinking
        self._open: Block | None = None  # the block being written; its text gathers in _parts
        self._parts: list[str] = []

    def start(self) -> list[StreamEvent]:
        """What can be said before the first token."""
        begun = MessageBody(self.message.id, self.message.model, [], self.message.usage)
        return [reply.MessageStart(begun), reply.Ping()]

    def feed(self, event: Event) -> list[StreamEvent]:
        """The stream events of one event.

        Raises:
            Unavailable: the turn was aborted by the server; there is no such stop reason.
        """
        match event:
            case ReasoningDelta(text=text):
                return self._thinking(text) if text else []
            case ContentDelta(text=text):
                return self._text(text) if text else []
            case ToolCallStart(id=call_id, name=name):
                return self._begin(lambda: reply.ToolUseOut(call_id, name, {}))
            case ToolCallArguments(fragment=fragment):
                self._parts.append(fragment)
                return [BlockDelta(self._index, reply.InputJsonDelta(fragment))]
            case TurnFinished():
                return self._finish(event)
            case _:  # prompt logprobs, which this API cannot ask for
                return []

    def _text(self, text: str) -> list[StreamEvent]:
        begun = [] if isinstance(self._open, reply.TextOut) else self._begin(reply.TextOut)
        self._parts.append(text)
        return [*begun, BlockDelta(self._index, reply.TextDelta(text))]

    def _thinking(self, text: str) -> list[StreamEvent]:
        begun = [] if isinstance(self._open, reply.ThinkingOut) else self._begin(reply.ThinkingOut)
        self._parts.append(text)
        return begun if self._omit_thinking else [*begun, BlockDelta(self._index, reply.ThinkingDelta(text))]

    def _begin(self, empty: Callable[[], Block]) -> list[StreamEvent]:
        """Start a block. Two are made: the one in the event stays empty, the one in the message is filled in."""
        events = self._close()
        self._open, self._parts = empty(), []
        self.message.content.append(self._open)
        return [*events, BlockStart(self._index, empty())]

    def _close(self) -> list[StreamEvent]:
        """End the open block, if there is one, and fill in what it adds up to."""
        block, text = self._open, "".join(self._parts)
        self._open = None
        match block:
            case None:
                return []
            case reply.TextOut():
                block.text = text
            case reply.ToolUseOut():
                block.input = _arguments(text)
            case reply.ThinkingOut():
                block.thinking = "" if self._omit_thinking else text
                block.signature = pack(text) if self._omit_thinking else UNSIGNED
                signed = BlockDelta(self._index, reply.SignatureDelta(block.signature))
                return [signed, BlockStop(self._index)]
        return [BlockStop(self._index)]

    def _finish(self, event: TurnFinished) -> list[StreamEvent]:
        if event.reason == "abort":
            raise Unavailable("the server ended this generation before it was complete; send the request again")
        events = self._close()
        message, used = self.message, event.usage
        message.stop_reason = self._stop_reason(event)
        message.stop_sequence = event.stop_sequence
        message.usage = MessageUsage(
            used.prompt_tokens - used.cached_tokens,
            used.cached_tokens,
            used.completion_tokens,
            output_tokens_details=reply.OutputTokensDetails(event.reasoning_tokens),
        )
        stop = reply.Stop(message.stop_reason, message.stop_sequence)
        return [*events, reply.MessageDelta(stop, message.usage), reply.MessageStop()]

    def _stop_reason(self, event: TurnFinished) -> reply.StopReason:
        if event.stop_sequence is not None:
            return "stop_sequence"
        if event.reason == "tool_calls":
            return "tool_use"
        if event.reason == "length":
            ran_out = event.usage.completion_tokens < self._max_tokens
            return "model_context_window_exceeded" if ran_out else "max_tokens"
        return "end_turn"

    @property
    def _index(self) -> int:
        return len(self.message.content) - 1


def _arguments(text: str) -> dict[str, object]:
    """A call's input as an object; {} if generation was cut off inside it (the stop reason is then not `tool_use`)."""
    try:
        value = msgspec.json.decode(text) if text else {}
    except msgspec.DecodeError:
        return {}
    return value if isinstance(value, dict) else {}
