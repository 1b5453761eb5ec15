"""The engine behind asyncio: streams, aborts, refusals, failures, shutdown. Nothing may hang and nothing may leak."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest
from blockbuster import blockbuster_ctx

from freehold.engine.async_engine import AsyncEngine
from freehold.errors import (
    ContextTooLong,
    EngineError,
    FreeholdError,
    InsufficientMemory,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from freehold.types import FinishReason, SamplingParams, TokenChunk
from tests.gated_engine import Gate, ask, collect, empty, make, tokens_of, until

# ── streams ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_tokens_arrive_in_order_and_end(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    streams = [ask(engine, f"r{n}", max_tokens=n + 1) for n in range(4)]
    for n, chunks in enumerate(await asyncio.gather(*map(collect, streams))):
        assert tokens_of(chunks) == list(range(3, 4 + n))
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [FinishReason.LENGTH]
    await until(lambda: empty(engine))


async def test_a_finished_stream_stays_finished(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    stream = ask(engine, "a")
    await collect(stream)
    assert await collect(stream) == []
    await stream.aclose()
    assert len(tokens_of(await collect(ask(engine, "a")))) == 5, "its id is free again"


async def test_the_runner_is_used_by_one_thread_only(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    await collect(ask(engine, "a"))
    await engine.close()
    assert gate.threads == {"freehold-engine"}
    assert gate.is_closed


async def test_an_idle_engine_uses_no_time(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    await collect(ask(engine, "a"))
    await until(lambda: empty(engine))
    steps, before = gate.steps, time.process_time()
    await asyncio.sleep(0.3)
    assert gate.steps == steps
    assert time.process_time() - before < 0.15


async def test_the_event_loop_is_never_blocked() -> None:
    with blockbuster_ctx():
        engine, _ = make()
        await engine.start()
        await engine.warm_up()
        streams = [ask(engine, f"r{n}", max_tokens=20) for n in range(8)]
        await streams[0].aclose()
        await asyncio.gather(*map(collect, streams[1:]))
        kept = [ask(engine, f"s{n}", 3000) for n in range(8)]
        with pytest.raises(Overloaded):
            ask(engine, "one too many")
        assert len(kept) == 8
        engine.stats()
        await engine.drain(0.01)
        await engine.close()


# ── going away ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("read", [0, 1])
async def test_closing_a_stream_aborts(running: tuple[AsyncEngine, Gate], read: int) -> None:
    engine, _ = running
    stream = ask(engine, "a", max_tokens=3000)
    for _ in range(read):
        await anext(stream)
    await stream.aclose()
    assert await collect(stream) == []
    await until(lambda: engine.stats().finished[FinishReason.ABORT] == 1)
    assert empty(engine)


async def test_cancelling_the_reader_aborts(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    reader = asyncio.create_task(collect(ask(engine, "a", max_tokens=3000)))
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    gate.open.set()
    await until(lambda: empty(engine))
    await collect(ask(engine, "b"))


async def test_dropping_a_stream_aborts(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    stream = ask(engine, "a", max_tokens=3000)
    await anext(stream)
    del stream
    gc.collect()
    await until(lambda: empty(engine))


async def test_closing_wakes_who_waits(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    stream = ask(engine, "a")
    reader = asyncio.create_task(collect(stream))
    await asyncio.sleep(0.01)
    await stream.aclose()
    assert await asyncio.wait_for(reader, 5) == []


async def test_abort_by_id_ends_the_stream_with_abort(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    stream = ask(engine, "a", max_tokens=3000)
    await anext(stream)
    engine.abort("a")
    engine.abort("nobody")
    assert (await collect(stream))[-1].finish_reason is FinishReason.ABORT
    await until(lambda: empty(engine))


async def test_a_used_id_is_refused_until_its_request_has_ended(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    stream = ask(engine, "a")
    with pytest.raises(InvalidRequest, match="in use"):
        ask(engine, "a")
    await stream.aclose()
    with pytest.raises(InvalidRequest, match="in use"):
        ask(engine, "a")  # else the old request's chunks would reach the new stream
    gate.open.set()
    await until(lambda: not engine._streams)
    assert len(tokens_of(await collect(ask(engine, "a")))) == 5


async def test_throwing_into_a_stream_aborts(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    stream = ask(engine, "a", max_tokens=3000)
    with pytest.raises(ValueError, match="mine"):
        await stream.athrow(ValueError("mine"))
    await until(lambda: empty(engine))


async def test_many_come_and_half_of_them_go() -> None:
    engine, _ = make(max_num_seqs=16, max_queue=64, num_blocks=60)
    await engine.start()

    async def one(n: int) -> None:
        stream = ask(engine, f"r{n}", max_tokens=20)
        if n % 2:
            async for chunk in stream:
                if chunk.usage.completion_tokens >= n % 10:
                    break
            await stream.aclose()
        else:
            chunks = await collect(stream)
            assert [token for chunk in chunks for token in chunk.token_ids] == list(range(3, 23))

    await asyncio.gather(*(one(n) for n in range(64)))
    await until(lambda: empty(engine))
    await engine.close()
    engine.engine.check_integrity()


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_full_queue_refuses_at_once(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    streams = [ask(engine, f"r{n}") for n in range(8)]  # 4 run, 4 wait
    with pytest.raises(Overloaded) as caught:
        ask(engine, "one too many")
    assert caught.value.retry_after == 1.0, "nothing is known yet"
    gate.open.set()
    await asyncio.gather(*map(collect, streams))
    assert len(tokens_of(await collect(ask(engine, "later")))) == 5


async def test_retry_after_follows_the_latencies_seen(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    engine.metrics.begin("past", 0.0)
    engine.metrics.record([TokenChunk("past", (1,), finish_reason=FinishReason.STOP)], 7.0)
    gate.open.clear()
    for n in range(8):
        ask(engine, f"r{n}")
    with pytest.raises(Overloaded) as caught:
        ask(engine, "one too many")
    assert caught.value.retry_after == 14.0  # two rounds of 7 s


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error"),
    [
        ([1] * 4990, 20, ContextTooLong),
        ([1] * 3000, 500, InsufficientMemory),
        ([], 5, InvalidRequest),
        ([5000], 5, InvalidRequest),
    ],
)
async def test_what_cannot_run_is_refused_at_once(
    running: tuple[AsyncEngine, Gate], prompt: list[int], max_tokens: int, error: type[FreeholdError]
) -> None:
    engine, _ = running
    with pytest.raises(error):
        engine.submit("a", prompt, SamplingParams(max_tokens=max_tokens))
    assert not engine._streams


async def test_before_the_start_it_is_unavailable() -> None:
    engine, gate = make()
    assert not engine.is_alive
    with pytest.raises(Unavailable, match="starting") as caught:
        ask(engine, "a")
    assert caught.value.retry_after
    await engine.close()
    assert gate.is_closed


# ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_ready_only_after_a_generation(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    assert engine.is_alive
    assert not engine.is_ready
    await engine.warm_up()
    assert engine.is_ready
    assert engine.stats().generation_tokens == 0, "a warm-up is in no metric"
    await engine.close()
    assert not engine.is_ready
    assert not engine.is_alive


async def test_a_warm_up_that_fails_says_so(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.fail = RuntimeError("no kernel")
    with pytest.raises(EngineError, match="internal error; see the server's log"):
        await engine.warm_up()
    assert not engine.is_ready


async def test_a_failing_runner_fails_every_stream_and_nothing_hangs(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    streams = [ask(engine, f"r{n}", max_tokens=3000) for n in range(6)]
    gate.fail = RuntimeError("boom")
    gate.open.set()
    for chunks in await asyncio.wait_for(asyncio.gather(*map(collect, streams)), 10):
        assert chunks[-1].finish_reason is FinishReason.ERROR
        assert "internal error" in str(chunks[-1].error)
        assert "boom" not in str(chunks[-1].error)  # for the log, not for whoever else was being served
    assert not engine.is_alive
    with pytest.raises(Unavailable, match="internal error"):
        ask(engine, "late")
    await until(lambda: gate.is_closed)
    await engine.drain(1)


async def test_a_request_that_races_with_the_failure_is_failed_too(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    first = ask(engine, "a")
    await until(lambda: engine.stats().running == 1)
    gate.fail = RuntimeError("boom")
    late = ask(engine, "b")  # in the inbox when the thread ends
    gate.open.set()
    for chunks in await asyncio.wait_for(asyncio.gather(collect(first), collect(late)), 10):
        assert chunks[-1].finish_reason is FinishReason.ERROR


async def test_drain_lets_requests_end_and_refuses_new_ones(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    await engine.warm_up()
    gate.open.clear()
    stream = ask(engine, "a")
    draining = asyncio.create_task(engine.drain(10))
    await asyncio.sleep(0.01)
    with pytest.raises(Unavailable, match="shutting down"):
        ask(engine, "b")
    assert engine.is_alive
    assert not engine.is_ready
    gate.open.set()
    await asyncio.wait_for(draining, 10)
    assert (await collect(stream))[-1].finish_reason is FinishReason.LENGTH


async def test_drain_aborts_what_takes_too_long(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    stream = ask(engine, "a", max_tokens=3000)
    asyncio.get_running_loop().call_later(0.1, gate.open.set)
    await asyncio.wait_for(engine.drain(0.02), 10)
    assert (await collect(stream))[-1].finish_reason is FinishReason.ABORT


async def test_a_hanging_step_does_not_hang_the_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freehold.engine.async_engine._GRACE", 0.05)
    engine, gate = make()
    await engine.start()
    gate.open.clear()
    stream = ask(engine, "a")
    await until(lambda: engine.stats().running == 1)
    await asyncio.wait_for(engine.drain(0.01), 5)
    assert [chunk.finish_reason for chunk in await asyncio.wait_for(collect(stream), 5)] == [FinishReason.ABORT]
    await asyncio.wait_for(engine.close(), 5)
    assert not engine.is_alive
    gate.open.set()
    await until(lambda: gate.is_closed)


async def test_close_ends_streams(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    stream = ask(engine, "a", max_tokens=3000)
    await anext(stream)
    await engine.close()
    await engine.close()
    assert (await asyncio.wait_for(collect(stream), 5))[-1].finish_reason is FinishReason.ABORT
    with pytest.raises(Unavailable, match="closed"):
        ask(engine, "b")


def test_a_loop_that_dies_without_close_leaves_no_thread_behind() -> None:
    engine, gate = make()

    async def forget() -> object:
        await engine.start()
        stream = ask(engine, "a", max_tokens=3000)
        await anext(stream)
        gate.open.clear()  # it must not be done before the loop is
        return stream

    stream = asyncio.run(forget())
    gate.open.set()
    deadline = time.monotonic() + 10
    while not gate.is_closed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gate.is_closed
    del stream
