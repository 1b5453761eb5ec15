"""Turns as the chat service gives them, for the tests of what they become."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st

from freehold.serve.turn import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    TurnFinished,
)
from freehold.types import Usage

USAGE = Usage(prompt_tokens=30, completion_tokens=12, cached_tokens=20)

EVERYTHING: tuple[Event, ...] = (
    ReasoningDelta("think "),
    ReasoningDelta("hard"),
    ContentDelta("Hel"),
    ContentDelta("lo"),
    ToolCallStart(0, "call_1", "weather"),
    ToolCallArguments(0, '{"city":'),
    ToolCallArguments(0, '"Zürich"}'),
    ToolCallStart(1, "call_2", "now"),
    ToolCallArguments(1, "{}"),
    TurnFinished("tool_calls", USAGE, reasoning_tokens=2),
)

TEXT = st.text(max_size=8)
CALL = st.tuples(st.sampled_from(["weather", "now"]), st.dictionaries(st.text(max_size=4), st.integers(), max_size=3))


@st.composite
def turns(draw: st.DrawFn) -> list[Event]:
    """The events of a turn, in any order and any cut."""
    events: list[Event] = []
    calls = 0
    for kind in draw(st.lists(st.sampled_from(["think", "text", "call"]), max_size=8)):
        if kind != "call":
            events += [(ReasoningDelta if kind == "think" else ContentDelta)(part) for part in draw(st.lists(TEXT))]
            continue
        name, arguments = draw(CALL)
        text = msgspec.json.encode(arguments).decode()
        cut = draw(st.integers(0, len(text)))
        events.append(ToolCallStart(calls, f"call_{calls}", name))
        events += [ToolCallArguments(calls, part) for part in (text[:cut], text[cut:]) if part]
        calls += 1
    reason: Any = draw(st.sampled_from(["stop", "length", "tool_calls"]))
    return [*events, TurnFinished(reason, USAGE, reasoning_tokens=draw(st.integers(0, 12)))]
