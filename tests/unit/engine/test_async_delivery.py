"""When a stream's tokens reach its reader: together, never late, and not without bound if nobody reads."""

from __future__ import annotations

import asyncio

import pytest

from freehold.engine import async_engine
from freehold.engine.async_engine import AsyncEngine
from freehold.errors import SlowReader
from freehold.types import FinishReason
from tests.gated_engine import Gate, ask, collect, empty, tokens_of, until


async def test_a_stream_that_is_not_read_is_ended(
    running: tuple[AsyncEngine, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "MOST_UNREAD", 20)
    monkeypatch.setattr(async_engine, "FLUSH_SECONDS", 0.0)
    engine, gate = running
    slow = ask(engine, "slow", 3000)
    await until(lambda: gate.steps > 20 and empty(engine))
    assert engine.stats().finished[FinishReason.ABORT] == 1
    assert len(tokens_of(await collect(ask(engine, "other", 10)))) == 10, "others do not notice"
    chunks = await collect(slow)
    assert [len(chunk.token_ids) for chunk in chunks] == [20, 0], "what waited is not lost, and comes at once"
    assert isinstance(chunks[-1].error, SlowReader)
    assert chunks[-1].finish_reason is FinishReason.ERROR
    assert len(tokens_of(await collect(ask(engine, "slow", 3)))) == 3, "its id is free again"


async def test_a_stream_that_is_read_in_time_is_not_ended(
    running: tuple[AsyncEngine, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "MOST_UNREAD", 20)
    monkeypatch.setattr(async_engine, "FLUSH_SECONDS", 0.0)
    engine, gate = running
    stream = ask(engine, "a", 21)
    await until(lambda: gate.steps == 21 and empty(engine))
    chunks = await collect(stream)
    assert len(tokens_of(chunks)) == 21, "exactly as many as may wait, and the last"
    assert chunks[-1].finish_reason is FinishReason.LENGTH


async def test_tokens_that_come_fast_travel_together_but_the_first_does_not_wait(
    running: tuple[AsyncEngine, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "FLUSH_SECONDS", 30.0)
    engine, gate = running
    gate.seconds = 0.005
    chunks = await collect(ask(engine, "a", 40))
    assert [tokens_of([chunk]) for chunk in chunks] == [[3], list(range(4, 43))], "the first, and all with the last"


async def test_tokens_do_not_wait_for_the_next_step(
    running: tuple[AsyncEngine, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "FLUSH_SECONDS", 0.2)
    engine, gate = running
    gate.seconds = 0.005
    stream = ask(engine, "a", 3000)
    assert tokens_of([await anext(stream)]) == [3]
    await until(lambda: gate.steps >= 3)
    gate.open.clear()  # as if the next step took for ever
    async with asyncio.timeout(10):
        assert tokens_of([await anext(stream)])[:2] == [4, 5], "what had come in the meantime"
    gate.open.set()
    await stream.aclose()


async def test_a_full_stream_that_is_dropped_is_gone(
    running: tuple[AsyncEngine, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "MOST_UNREAD", 2)
    engine, gate = running
    stream = ask(engine, "a", 2000)
    await until(lambda: gate.steps > 2 and empty(engine))
    await stream.aclose()
    assert await collect(stream) == []
