"""The words that engine and serve share."""

from __future__ import annotations

from freehold.types import FinishReason, TokenChunk


def test_chunks_are_merged_but_not_with_an_error() -> None:
    first = TokenChunk("a", (1,))
    last = TokenChunk("a", (2,), finish_reason=FinishReason.STOP)
    assert first.then(last) == TokenChunk("a", (1, 2), finish_reason=FinishReason.STOP)
    assert first.then(TokenChunk("a", finish_reason=FinishReason.ABORT)) is None
    assert first.then(TokenChunk("a", finish_reason=FinishReason.ERROR, error=ValueError())) is None
