"""Chunks to events where no engine is needed to see what happens."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend

from freehold.errors import INTERNAL_ERROR, EngineError, Unavailable
from freehold.model.tokenizer import Tokenizer
from freehold.serve.reader import TextReader, TurnReader, error_of
from freehold.serve.turn import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallStart, TurnFinished
from freehold.types import FinishReason, TokenChunk, ToolSpec, Usage

TOY = Tokenizer.toy(512)
CALL = "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"


def plain_tokenizer() -> Tokenizer:
    """The toy tokenizer without a single control token."""
    raw = json.loads(TOY.backend.to_str())
    raw["added_tokens"] = []
    return Tokenizer(Backend.from_str(json.dumps(raw)), vocab_size=512)


@pytest.mark.parametrize("per_chunk", [1, 3, 1000])
def test_tags_are_found_in_text_where_the_tokenizer_has_no_control_tokens(per_chunk: int) -> None:
    tokenizer = plain_tokenizer()
    reader = TurnReader(tokenizer, thinking=True, tools=(ToolSpec("f", {}),))
    ids = tokenizer.encode(f"a < b</think>c{CALL}")
    events: list[Event] = []
    for start in range(0, len(ids), per_chunk):
        events += reader.read(TokenChunk("r", tuple(ids[start : start + per_chunk])))
    events += reader.read(TokenChunk("r", finish_reason=FinishReason.STOP))
    assert "".join(event.text for event in events if isinstance(event, ReasoningDelta)) == "a < b"
    assert "".join(event.text for event in events if isinstance(event, ContentDelta)) == "c"
    assert [event.name for event in events if isinstance(event, ToolCallStart)] == ["f"]
    assert "".join(event.fragment for event in events if isinstance(event, ToolCallArguments)) == '{"a": 1}'
    finished = events[-1]
    assert isinstance(finished, TurnFinished)
    assert finished.reason == "tool_calls"
    assert 0 < finished.usage.completion_tokens == len(ids)


def test_one_event_of_a_kind_a_chunk() -> None:
    reader = TurnReader(TOY, thinking=True)
    chunk = TokenChunk("r", tuple(TOY.encode("one two</think>three four")))
    assert reader.read(chunk) == [ReasoningDelta("one two"), ContentDelta("three four")]


def test_drafts_behind_a_stop_string_are_not_output() -> None:
    """Two drafts were accepted before the last step, and all four of it but the last token; the stop string cuts it
    after one token, or two."""
    first, second = TOY.encode("ab"), TOY.encode("wxyz")
    assert len(second) == 4
    for stop, taken in (("w", 1), ("wx", 2), ("z", 4), ("!", 4)):
        for reader in (TurnReader(TOY, stop=[stop]), TextReader(TOY, stop=[stop])):
            reader.read(TokenChunk("r", tuple(first), usage=Usage(3, 2, 0, 4, 2)))
            chunk = TokenChunk("r", tuple(second), finish_reason=FinishReason.LENGTH, usage=Usage(3, 6, 0, 7, 5))
            *_, finished = reader.read(chunk)
            assert isinstance(finished, TurnFinished)
            assert finished.usage == Usage(3, len(first) + taken, 0, 7, 2 + min(taken, 3)), stop


def test_a_stream_that_just_ends_is_an_abort() -> None:
    usage = Usage(3, 9)
    for reader in (TurnReader(TOY), TextReader(TOY)):
        reader.read(TokenChunk("r", tuple(TOY.encode("xy")), usage=usage))
        assert not reader.finished
        (finished,) = reader.end()
        assert reader.finished
        assert finished == TurnFinished("abort", Usage(3, len(TOY.encode("xy"))))


def test_errors() -> None:
    assert error_of(TokenChunk("r", finish_reason=FinishReason.LENGTH)) is None
    mine = Unavailable("gone")
    assert error_of(TokenChunk("r", finish_reason=FinishReason.ERROR, error=mine)) is mine
    cause = ValueError("bad")
    wrapped = error_of(TokenChunk("r", finish_reason=FinishReason.ERROR, error=cause))
    assert isinstance(wrapped, EngineError)
    assert (wrapped.message, wrapped.__cause__) == (INTERNAL_ERROR, cause)
    silent = error_of(TokenChunk("r", finish_reason=FinishReason.ERROR))
    assert silent is not None
    assert silent.message == INTERNAL_ERROR


def test_what_was_held_comes_before_an_error() -> None:
    reader = TurnReader(TOY, tools=(ToolSpec("f", {"properties": {"a": {"type": "string"}}}),), stop=("STOP",))
    chunk = TokenChunk(
        "r", tuple(TOY.encode(CALL[:-24] + " STO")), finish_reason=FinishReason.ERROR, error=EngineError("x")
    )
    events = reader.read(chunk)
    assert not any(isinstance(event, TurnFinished) for event in events)
    arguments = "".join(event.fragment for event in events if isinstance(event, ToolCallArguments))
    assert json.loads(arguments) == {"a": "1 STO"}
