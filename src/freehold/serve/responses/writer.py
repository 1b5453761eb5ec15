"""From turn events to an OpenAI response object, streamed or whole.

One writer makes both: every event becomes stream events, and the same calls build `response`, which is what a request
without `stream` gets. So the two cannot differ.

Stream order: `response.created`, `response.in_progress`, then per output item `output_item.added`, its parts' and
deltas' events, `output_item.done`, then exactly one of `response.completed`, `.incomplete` or `.failed`. Items never
overlap. `sequence_number` counts from 0 without gaps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec

from freehold.errors import Overloaded, Unavailable
from freehold.serve.bodies import token_logprob
from freehold.serve.carried import pack
from freehold.serve.responses import reply
from freehold.serve.responses.reply import (
    FunctionCallOut,
    ItemStatus,
    MessageOut,
    OutputItem,
    OutputTextPart,
    ReasoningOut,
    ReasoningTextPart,
    ResponseBody,
    StreamEvent,
)
from freehold.serve.schema import TokenLogprob
from freehold.serve.turn import (
    ContentDelta,
    Event,
    ReasoningDelta,
    TextToken,
    ToolCallArguments,
    ToolCallStart,
    TurnFinished,
)
from freehold.serve.wire import error_body

L = TypeVar("L", bound=reply.Lifecycle)


class ResponseWriter:
    """Feed it `start()` and then every event of one turn; `response` is complete after `TurnFinished`.

    response: id, model and settings; the writer fills in the rest.
    new_id: makes an item's id from its prefix ("rs", "msg", "fc").
    logprobs: whether tokens are reported with output text.
    pack_reasoning: reasoning items also carry their text in `encrypted_content` (see `carried`).
    """

    def __init__(
        self, response: ResponseBody, *, new_id: Callable[[str], str], logprobs: bool, pack_reasoning: bool
    ) -> None:
        self.response = response
        self._new_id = new_id
        self._logprobs = logprobs
        self._pack_reasoning = pack_reasoning
        self._sequence = 0
        self._open: OutputItem | None = None  # the item being written; what it says gathers in the next two
        self._parts: list[str] = []
        self._tokens: list[TokenLogprob] = []

    def start(self) -> list[StreamEvent]:
        """What can be said before the first token."""
        return [self._lifecycle(reply.Created), self._lifecycle(reply.InProgress)]

    def feed(self, event: Event) -> list[StreamEvent]:
        """The stream events of one event.

        Raises:
            Unavailable: the turn was aborted by the server.
        """
        match event:
            case ReasoningDelta(text=text):
                return self._reasoning(text) if text else []
            case ContentDelta(text=text, tokens=tokens):
                return self._text(text, tokens) if text or tokens else []
            case ToolCallStart(id=call_id, name=name):
                return self._begin(FunctionCallOut(self._new_id("fc"), call_id, name))
            case ToolCallArguments(fragment=fragment):
                self._parts.append(fragment)
                return [reply.ArgumentsDelta(*self._place(), fragment)]
            case TurnFinished():
                return self._finish(event)
            case _:  # prompt logprobs, which this API cannot ask for
                return []

    def fail(self, error: Exception) -> list[StreamEvent]:
        """End the response as failed; the item being written stays, marked incomplete."""
        events = self._close("incomplete")
        self.response.status = "failed"
        code: Literal["server_error", "rate_limit_exceeded"]
        code = "rate_limit_exceeded" if isinstance(error, Overloaded) else "server_error"
        self.response.error = reply.ResponseError(code, error_body(error).error.message)
        return [*events, self._lifecycle(reply.Failed)]

    def _reasoning(self, text: str) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        if not isinstance(self._open, ReasoningOut):
            events = self._begin(ReasoningOut(self._new_id("rs")))
            events.append(reply.PartAdded(*self._place(), ReasoningTextPart()))
        self._parts.append(text)
        return [*events, reply.ReasoningDelta(*self._place(), text)]

    def _text(self, text: str, tokens: tuple[TextToken, ...]) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        if not isinstance(self._open, MessageOut):
            events = self._begin(MessageOut(self._new_id("msg")))
            events.append(reply.PartAdded(*self._place(), OutputTextPart()))
        logprobs = [token_logprob(token) for token in tokens] if self._logprobs else []
        self._parts.append(text)
        self._tokens += logprobs
        return [*events, reply.TextDelta(*self._place(), text, logprobs)]

    def _begin(self, item: OutputItem) -> list[StreamEvent]:
        """Start an item. The event gets a copy, which stays empty."""
        events = self._close("completed")
        self._open, self._parts, self._tokens = item, [], []
        self.response.output.append(item)
        events.append(reply.ItemAdded(self._number(), self._index, msgspec.structs.replace(item)))
        return events

    def _close(self, status: ItemStatus) -> list[StreamEvent]:
        """End the open item, if there is one, and fill in what it adds up to."""
        item, text = self._open, "".join(self._parts)
        events: list[StreamEvent] = []
        match item:
            case None:
                return events
            case FunctionCallOut():
                item.arguments = text
                events.append(reply.ArgumentsDone(*self._place(), item.name, text))
            case MessageOut():
                part = OutputTextPart(text, logprobs=self._tokens)
                item.content = [part]
                events.append(reply.TextDone(*self._place(), text, self._tokens))
                events.append(reply.PartDone(*self._place(), part))
            case ReasoningOut():
                thought = ReasoningTextPart(text)
                item.content = [thought]
                if self._pack_reasoning:
                    item.encrypted_content = pack(text)
                events.append(reply.ReasoningDone(*self._place(), text))
                events.append(reply.PartDone(*self._place(), thought))
        item.status = status
        events.append(reply.ItemDone(self._number(), self._index, item))
        self._open = None
        return events

    def _finish(self, event: TurnFinished) -> list[StreamEvent]:
        if event.reason == "abort":
            raise Unavailable("the server ended this generation before it was complete; send the request again")
        cut = event.reason == "length"
        events = self._close("incomplete" if cut else "completed")
        used, response = event.usage, self.response
        response.usage = reply.ResponseUsage(
            used.prompt_tokens,
            reply.InputTokensDetails(used.cached_tokens),
            used.completion_tokens,
            reply.OutputTokensDetails(event.reasoning_tokens),
            used.prompt_tokens + used.completion_tokens,
        )
        if cut:
            response.status = "incomplete"
            response.incomplete_details = reply.IncompleteDetails("max_output_tokens")
            return [*events, self._lifecycle(reply.Incomplete)]
        response.status = "completed"
        response.completed_at = int(time.time())
        return [*events, self._lifecycle(reply.Completed)]

    # ---- places and numbers ----

    @property
    def _index(self) -> int:
        return len(self.response.output) - 1

    def _number(self) -> int:
        self._sequence += 1
        return self._sequence - 1

    def _place(self) -> tuple[int, int, str]:
        """The first fields of an event inside the open item."""
        assert self._open is not None  # every caller has begun an item
        return self._number(), self._index, self._open.id

    def _lifecycle(self, kind: type[L]) -> L:
        # A copy, because events are encoded after the writer has moved on.
        return kind(self._number(), msgspec.structs.replace(self.response, output=list(self.response.output)))
