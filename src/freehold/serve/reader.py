"""Engine chunks to events, without waiting for anything: `service` feeds it what the engine streams.

A reader takes chunks until `finished`, which may be before the engine's own last chunk: at a stop string, or after
the one call that `parallel_tool_calls: false` allows. Tokens past that point were never asked for and are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from freehold.errors import INTERNAL_ERROR, EngineError, FreeholdError
from freehold.model.tokenizer import Tokenizer
from freehold.serve.detokenize import Detokenizer, Piece, text_token
from freehold.serve.parse import TAGS, VISIBLE_CONTROL, StreamParser
from freehold.serve.turn import (
    ContentDelta,
    Event,
    PromptScored,
    ReasoningDelta,
    SoFar,
    TextToken,
    ToolCallArguments,
    TurnFinished,
)
from freehold.types import FinishReason, TokenChunk, TokenLogprobs, ToolSpec, Usage

Reason = Literal["stop", "length", "tool_calls", "abort"]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text of a completion.

    tokens: only when logprobs were asked for. prompt: only on the first delta, and only when prompt logprobs were
    asked for: one entry per prompt token, None for the first, which nothing predicts.
    """

    text: str
    tokens: tuple[TextToken, ...] = ()
    prompt: tuple[TextToken | None, ...] | None = None
    so_far: SoFar | None = None


TextEvent = TextDelta | TurnFinished


class TurnReader:
    """Reads one chat turn: reasoning, content and tool calls."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        thinking: bool = False,
        tools: Sequence[ToolSpec] = (),
        parallel: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        running_usage: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._running_usage = running_usage
        text_tags = [tag for tag in TAGS if tokenizer.special_id(tag) is None]
        # Where tags are ordinary text, tokens before and after one must be told apart.
        self._pieces = _PieceReader(tokenizer, stop, include_stop, min_tokens, in_runs=not text_tags)
        self._parser = StreamParser(thinking, tools, parallel=parallel, text_tags=text_tags)
        self.finished = False

    def read(self, chunk: TokenChunk) -> list[Event]:
        """The events of one chunk; after an ERROR chunk the caller raises `error_of(chunk)`."""
        parser, events = self._parser, list[Event]()
        if chunk.prompt_logprobs is not None:
            events.append(PromptScored(_prompt(self._tokenizer, chunk.prompt_logprobs)))
        for piece in self._pieces.read(chunk):
            events += parser.feed(piece.text, control=piece.control, starts=piece.starts, tokens=piece.tokens)
            if parser.done:
                return [*merge(events), self._finish("tool_calls", chunk.usage)]
        reason = self._pieces.reason(chunk)
        if reason is None:
            return self._counted(merge(events), chunk.usage)
        # The model ended its turn by itself only if it was no stop string, limit, abort or error that did.
        events += parser.finish(cut=reason != "stop" or self._pieces.stopped is not None)
        if reason == "stop" and parser.calls and not parser.is_cut:
            reason = "tool_calls"
        return [*merge(events), *([] if _failed(chunk) else [self._finish(reason, chunk.usage)])]

    def _counted(self, events: list[Event], usage: Usage) -> list[Event]:
        """The events, the last of which says what has been generated so far, if that was asked for."""
        if self._running_usage and events and not isinstance(events[-1], PromptScored | TurnFinished):
            events[-1] = replace(events[-1], so_far=SoFar(self._pieces.shown(usage), self._parser.reasoning_tokens))
        return events

    def end(self) -> list[Event]:
        """The engine's stream ended without a last chunk, which is an abort."""
        return [*merge(self._parser.finish(cut=True)), self._finish("abort", self._pieces.usage)]

    def _finish(self, reason: Reason, usage: Usage) -> TurnFinished:
        self.finished = True
        return TurnFinished(reason, self._pieces.shown(usage), self._parser.reasoning_tokens, self._pieces.stopped)


class TextReader:
    """Reads one text completion: the text as it is, reasoning and tool tags included. echo: text to begin with."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        echo: str = "",
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        running_usage: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._running_usage = running_usage
        self._echo = echo
        self._pieces = _PieceReader(tokenizer, stop, include_stop, min_tokens)
        self.finished = False

    def read(self, chunk: TokenChunk) -> list[TextEvent]:
        """The events of one chunk; after an ERROR chunk the caller raises `error_of(chunk)`."""
        events: list[TextEvent] = []
        if self._echo or chunk.prompt_logprobs is not None:
            scored = chunk.prompt_logprobs
            prompt = None if scored is None else _prompt(self._tokenizer, scored)
            events.append(TextDelta(self._echo, (), prompt))
            self._echo = ""
        shown = [p for p in self._pieces.read(chunk) if not p.control or p.text in VISIBLE_CONTROL]
        text, tokens = "".join(p.text for p in shown), tuple(token for p in shown for token in p.tokens)
        if text or tokens:
            so_far = SoFar(self._pieces.shown(chunk.usage)) if self._running_usage else None
            events.append(TextDelta(text, tokens, so_far=so_far))
        reason = self._pieces.reason(chunk)
        if reason is not None and not _failed(chunk):
            events.append(self._finish(reason, chunk.usage))
        return events

    def end(self) -> list[TextEvent]:
        """The engine's stream ended without a last chunk, which is an abort."""
        return [self._finish("abort", self._pieces.usage)]

    def _finish(self, reason: Reason, usage: Usage) -> TurnFinished:
        self.finished = True
        return TurnFinished(reason, self._pieces.shown(usage), 0, self._pieces.stopped)


def _prompt(tokenizer: Tokenizer, entries: Iterable[TokenLogprobs | None]) -> tuple[TextToken | None, ...]:
    return tuple(None if entry is None else text_token(tokenizer, entry) for entry in entries)


def error_of(chunk: TokenChunk) -> FreeholdError | None:
    """What to raise after reading a chunk, if the engine failed."""
    if not _failed(chunk):
        return None
    if isinstance(chunk.error, FreeholdError):
        return chunk.error
    found = EngineError(INTERNAL_ERROR)
    found.__cause__ = chunk.error
    return found


def merge(events: Iterable[Event]) -> list[Event]:
    """The events with neighbouring deltas of one kind joined: a chunk of several tokens is sent as one."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        match last, event:
            case (ReasoningDelta(), ReasoningDelta()):
                merged[-1] = ReasoningDelta(last.text + event.text, last.tokens + event.tokens)
            case (ContentDelta(), ContentDelta()):
                merged[-1] = ContentDelta(last.text + event.text, last.tokens + event.tokens)
            case (ToolCallArguments(), ToolCallArguments()) if last.index == event.index:
                merged[-1] = ToolCallArguments(event.index, last.fragment + event.fragment)
            case _:
                merged.append(event)
    return merged


def _failed(chunk: TokenChunk) -> bool:
    return chunk.error is not None or chunk.finish_reason is FinishReason.ERROR


class _PieceReader:
    """Chunks to pieces of text, without the token that ended the output. usage: of the last chunk."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        include_stop: bool,
        min_tokens: int,
        *,
        in_runs: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._in_runs = in_runs
        self._include_stop = include_stop
        self._detokenizer = Detokenizer(tokenizer, stop, include_stop, min_tokens)
        self._hidden_stop = 0  # 1 if the token that ended the output was taken without showing it
        self.usage = Usage()
        self._before = Usage(), 0  # before the last chunk: the usage, and the tokens taken

    @property
    def stopped(self) -> str | None:
        return self._detokenizer.stopped

    @property
    def count(self) -> int:
        """Completion tokens: those taken, with the one that ended the output."""
        return self._detokenizer.count + self._hidden_stop

    def shown(self, usage: Usage) -> Usage:
        """A usage that counts only what became output: of the last chunk, tokens behind a stop string did not, be they
        drafts that were accepted."""
        before, taken = self._before
        accepted = min(usage.draft_accepted, before.draft_accepted + max(0, self.count - taken))
        return replace(usage, completion_tokens=self.count, draft_accepted=accepted)

    def read(self, chunk: TokenChunk) -> Iterator[Piece]:
        self._before = self.usage, self.count
        self.usage = chunk.usage
        token_ids, hidden = chunk.token_ids, chunk.stop_token_id is not None and not self._is_shown(chunk.token_ids[-1])
        if hidden:
            token_ids = token_ids[:-1]
        if chunk.logprobs is not None:
            for token_id, entry in zip(token_ids, chunk.logprobs, strict=False):
                yield from self._detokenizer.feed(token_id, text_token(self._tokenizer, entry))
        elif self._in_runs:
            yield from self._detokenizer.feed_runs(token_ids)
        else:
            for token_id in token_ids:
                yield from self._detokenizer.feed(token_id)
        if self.stopped is not None:
            return
        self._hidden_stop = int(hidden)
        if chunk.finish_reason is not None or chunk.error is not None:
            yield from self._detokenizer.finish()

    def reason(self, chunk: TokenChunk) -> Reason | None:
        """Why the output is over after this chunk has been read; None if it goes on. For errors: "abort"."""
        if self.stopped is not None:
            return "stop"
        match chunk.finish_reason:
            case None:
                return None if chunk.error is None else "abort"
            case FinishReason.STOP:
                return "stop"
            case FinishReason.LENGTH:
                return "length"
            case _:
                return "abort"

    def _is_shown(self, token_id: int) -> bool:
        """Whether the token that ended the output is part of its text: as a stop string is; no control token is."""
        return self._include_stop and not self._tokenizer.is_special(token_id)
