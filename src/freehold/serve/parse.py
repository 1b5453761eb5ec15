"""Generated text to events: one state machine for reasoning, content and tool calls, fed in pieces of any size.

    reasoning --</think>--> content --<tool_call>--> name --<arg_key>--> key, value, … --</tool_call>--> content

How the text is cut into pieces does not change what comes out in sum. Half a tag never comes out. Decisions:

* `<tool_call>` inside thinking ends the reasoning, `</think>` or not.
* A call of a tool that was not declared is content, verbatim, tags and all. So is every tool tag when no tools were
  declared: the text is what the model wrote, nothing is lost, and no client is told to run what it did not offer.
* White space before a tool call, and after the last one at the end of the turn, is dropped (up to 32 characters);
  all other text is exact.
* A repeated argument is dropped: the first one, which may have streamed already, counts.
* When generation is cut (length, abort) inside a call, the arguments are closed to one valid JSON object: a string
  that was streaming as far as it got, other incomplete values left out; an unfinished name is no call. The finish
  reason (`length`) is what tells a client not to run such a call.
* When the model itself ends the turn inside a call, the call is taken as complete.
* Control tokens that are not part of the grammar (`<|user|>`, `[gMASK]`, …) are dropped from reasoning and content.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import Enum, auto

from freehold.serve.arguments import ArgumentsWriter
from freehold.serve.turn import (
    ContentDelta,
    Event,
    ReasoningDelta,
    TextToken,
    ToolCallArguments,
    ToolCallStart,
)
from freehold.types import ToolSpec

TAGS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip

# Control tokens whose text a reader may see; the others only structure the conversation.
VISIBLE_CONTROL = frozenset({*TAGS, "<tool_response>", "</tool_response>", "/nothink"})


_MAX_SPACE = 32  # more white space than this is no separator, and a model that repeats it must not be held back


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    NAME = auto()  # after <tool_call>
    BETWEEN = auto()  # inside a call, outside an argument
    KEY = auto()
    AFTER_KEY = auto()
    VALUE = auto()
    FOREIGN = auto()  # a call of an undeclared tool, which is content


# The tags that mean something in a state. Elsewhere they are text.
_TAGS_IN = {
    _State.REASONING: ("<think>", "</think>", "<tool_call>"),
    _State.CONTENT: ("<think>", "</think>", "<tool_call>"),
    _State.NAME: ("<arg_key>", "</tool_call>", "<tool_call>"),
    _State.BETWEEN: ("<arg_key>", "</tool_call>", "<tool_call>"),
    _State.KEY: ("</arg_key>", "<arg_value>", "</tool_call>"),
    _State.AFTER_KEY: ("<arg_key>", "<arg_value>", "</tool_call>"),
    _State.VALUE: ("</arg_value>", "</tool_call>"),
    _State.FOREIGN: ("</tool_call>", "<tool_call>"),
}


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class StreamParser:
    """Parses one generated turn.

    thinking: generation starts inside `<think>`. tools: the declared tools. parallel: False ends the turn after the
    first call (`done`). text_tags: the tags to look for in ordinary text, which is none where the tokenizer has
    them as control tokens: then a model that writes about "<tool_call>" does not make a call.

    calls: calls begun so far. is_cut: the last of them was cut. reasoning_tokens: tokens inside thinking, without the
    tags. done: feed no more.
    """

    def __init__(
        self,
        thinking: bool,
        tools: Sequence[ToolSpec] = (),
        *,
        parallel: bool = True,
        text_tags: Collection[str] = TAGS,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._tools = {tool.name: tool.schema for tool in tools}
        self._parallel = parallel
        self._new_id = new_id
        self._tags = {state: self._tags_in(state) for state in _State}
        self._text_tags = {state: tuple(t for t in tags if t in text_tags) for state, tags in self._tags.items()}
        self._patterns = {state: _any_of(tags) for state, tags in self._text_tags.items()}
        self._state = _State.REASONING if thinking else _State.CONTENT
        self._events: list[Event] = []
        self._tokens: list[TextToken] = []  # not given out yet
        self._buffer = ""  # ordinary text that may be the beginning of a tag
        self._space = ""  # white space of content that is dropped if a call follows
        self._is_long_space = False  # the white space that is running was too long to hold
        self._is_after_call = False  # no text since the last call
        self._name = ""
        self._key = ""
        self._arguments: ArgumentsWriter | None = None
        self.calls = 0
        self.is_cut = False
        self.reasoning_tokens = 0
        self.done = False

    def feed(
        self, text: str, *, control: bool = False, starts: int = 0, tokens: Iterable[TextToken] = ()
    ) -> list[Event]:
        """Take a piece of text (fields as in `detokenize.Piece`); the events it makes certain."""
        if self.done:
            return []
        was_reasoning = self._state is _State.REASONING
        self._tokens += tokens
        if control:
            self._flush_buffer()
            self._on_control(text)
        else:
            self._buffer += text
            self._scan()
        if was_reasoning and self._state is _State.REASONING:
            self.reasoning_tokens += starts
        if self._arguments is not None:
            self._tokens.clear()
        return self._drain()

    def finish(self, *, cut: bool = False) -> list[Event]:
        """The turn is over. cut: by a limit or an abort, not by the model."""
        if self.done:
            return []
        if not cut:  # else what is held may be half a tag, and is lost
            self._flush_buffer()
            if self._state is _State.NAME:
                self._end_name()
        if self._arguments is not None:
            self.is_cut = cut
            self._end_call(cut=cut)
        if not self._is_after_call:
            self._emit_content(self._space)
        self.done = True
        return self._drain()

    # -- finding tags ---------------------------------------------------------------------------------------------

    def _tags_in(self, state: _State) -> tuple[str, ...]:
        without_calls = not self._tools and state in (_State.REASONING, _State.CONTENT)
        return tuple(tag for tag in _TAGS_IN[state] if not (without_calls and tag == "<tool_call>"))

    def _on_control(self, text: str) -> None:
        if text in self._tags[self._state]:
            self._on_tag(text)
        elif text in VISIBLE_CONTROL or self._state not in (_State.REASONING, _State.CONTENT):
            self._on_text(text)

    def _scan(self) -> None:
        """Act on all of the buffer but an end that may become a tag."""
        while self._buffer and not self.done:
            pattern = self._patterns[self._state]
            match = pattern.search(self._buffer) if pattern is not None else None
            if match is None:
                keep = _possible_tag(self._buffer, self._text_tags[self._state])
                ready, self._buffer = self._buffer[: len(self._buffer) - keep], self._buffer[len(self._buffer) - keep :]
                state = self._state
                self._on_text(ready)
                if self._state is state or not keep:
                    return
                continue  # an undeclared name: other tags count now
            ready, self._buffer = self._buffer[: match.start()], self._buffer[match.end() :]
            self._on_text(ready)
            self._on_tag(match[0])

    def _flush_buffer(self) -> None:
        text, self._buffer = self._buffer, ""
        self._on_text(text)

    # -- the machine ----------------------------------------------------------------------------------------------

    def _on_text(self, text: str) -> None:
        if not text:
            return
        match self._state:
            case _State.REASONING:
                self._events.append(ReasoningDelta(text, self._take_tokens()))
            case _State.CONTENT:
                self._on_content(text)
            case _State.FOREIGN:
                self._emit_content(text)
            case _State.NAME:
                self._name += text
                if not any(name.startswith(self._name.strip()) for name in self._tools):
                    self._become_foreign()
            case _State.KEY:
                self._key += text
            case _State.VALUE:
                self._emit_arguments(self._writer.text(text))
            case _:  # nothing belongs between arguments
                pass

    def _on_tag(self, tag: str) -> None:
        if tag not in self._tags[self._state]:  # a name has just turned out to be undeclared
            self._on_text(tag)
            return
        match self._state, tag:
            case ((_State.REASONING | _State.CONTENT), "<tool_call>"):
                self._begin_call()
            case ((_State.REASONING | _State.CONTENT), _):
                self._tokens.clear()
                self._state = _State.REASONING if tag == "<think>" else _State.CONTENT
            case _State.NAME, "<arg_key>":
                if not self._end_name():
                    self._emit_content(tag)
                else:
                    self._begin_key()
            case _State.NAME, "</tool_call>":
                if self._end_name():
                    self._end_call()
                else:
                    self._emit_content(tag)
                    self._state = _State.CONTENT
            case _State.NAME, _:  # <tool_call>: the call before has no end of its own
                if self._end_name():
                    self._end_call()
                self._begin_call()
            case _State.FOREIGN, "</tool_call>":
                self._emit_content(tag)
                self._state = _State.CONTENT
            case ((_State.FOREIGN | _State.BETWEEN), "<tool_call>"):
                self._end_call()
                self._begin_call()
            case _, "</tool_call>":
                self._end_call()
            case _, "<arg_key>":
                self._begin_key()
            case _, "</arg_key>":
                self._state = _State.AFTER_KEY
            case _, "<arg_value>":
                self._writer.open_value(self._key)
                self._state = _State.VALUE
            case _:  # </arg_value>
                self._emit_arguments(self._writer.close_value())
                self._state = _State.BETWEEN

    def _begin_call(self) -> None:
        if not self.done:
            self._name, self._state = "", _State.NAME

    def _begin_key(self) -> None:
        self._key, self._state = "", _State.KEY

    def _end_name(self) -> bool:
        """The name is complete: start the call, or find that there is no such tool."""
        name = self._name.strip()
        if name not in self._tools:
            self._become_foreign()
            return False
        self._space, self._is_long_space = "", False
        self._events.append(ToolCallStart(self.calls, self._new_id(), name))
        self._arguments = ArgumentsWriter(self._tools[name])
        self.calls += 1
        self._state = _State.BETWEEN
        return True

    def _become_foreign(self) -> None:
        self._state = _State.FOREIGN
        space, self._space, self._is_long_space = self._space, "", False
        self._emit_content(f"{space}<tool_call>{self._name}")

    def _end_call(self, *, cut: bool = False) -> None:
        if self._arguments is not None:
            self._emit_arguments(self._arguments.finish(cut=cut))
            self._arguments = None
            self._tokens.clear()
            self._is_after_call = True
            self.done = not self._parallel
        self._state = _State.CONTENT

    @property
    def _writer(self) -> ArgumentsWriter:
        assert self._arguments is not None  # every state inside a call has one
        return self._arguments

    # -- giving out -----------------------------------------------------------------------------------------------

    def _on_content(self, text: str) -> None:
        if not self._tools:
            self._emit_content(text)
            return
        visible = text.rstrip()
        if visible:
            self._emit_content(self._space + visible)
            self._space, self._is_long_space = "", False
        self._space += text[len(visible) :]
        if self._is_long_space or len(self._space) > _MAX_SPACE:
            self._emit_content(self._space)
            self._space, self._is_long_space = "", True

    def _emit_content(self, text: str) -> None:
        if text:
            self._is_after_call = False
            self._events.append(ContentDelta(text, self._take_tokens()))

    def _emit_arguments(self, fragment: str) -> None:
        if fragment:
            self._events.append(ToolCallArguments(self.calls - 1, fragment))

    def _take_tokens(self) -> tuple[TextToken, ...]:
        taken, self._tokens = tuple(self._tokens), []
        return taken

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def _any_of(tags: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, tags))) if tags else None


def _possible_tag(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of the text that begins a tag."""
    if not tags:
        return 0
    at = text.rfind("<", -max(map(len, tags)))  # every tag has one "<", at its beginning
    return len(text) - at if at >= 0 and any(tag.startswith(text[at:]) for tag in tags) else 0
